"""For tests, ours and yours: a seeded simulation of the machine, and contract test classes.

Nothing but tests imports this package.
"""
