"""The nouns that both planes share: keys, plans, completions, reports, page tables. Standard library and numpy only."""
