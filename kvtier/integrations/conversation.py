"""A conversation: its tokens, turn by turn, on top of what the cache has of the turns before."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from kvtier.errors import ConfigError
from kvtier.integrations.transformers import CachedGenerator, GenerationWithReport


class Conversation:
    """Holds the tokens of one conversation and says so to the cache; a context manager that ends it.

    ::

        with Conversation(generator, "chat-42") as chat:
            reply = chat.say(tokenizer(text, return_tensors="pt").input_ids, max_new_tokens=100)
    """

    def __init__(self, generator: CachedGenerator, session: str, *, tenant: str = "", adapter: str = "") -> None:
        """``session`` names the conversation for hints; see ``cache.session``."""
        self.generator = generator
        self.session = session
        self._names: dict[str, Any] = {"tenant": tenant, "adapter": adapter}
        self.tokens: torch.Tensor = torch.empty((1, 0), dtype=torch.long, device=generator.model.device)
        """All that was said, ``[1, tokens]``."""

    def say(self, tokens: torch.Tensor, **kwargs: Any) -> GenerationWithReport:
        """Append ``tokens`` (``[tokens]`` or ``[1, tokens]``) and what the model answers; ``kwargs`` as ``generate``.

        Raises:
            ConfigError: as ``CachedGenerator.generate``, or more than one sequence is asked for.
        """
        said = tokens if tokens.ndim == 2 else tokens[None]
        if len(said) != 1:
            raise ConfigError(f"tokens: shape {list(tokens.shape)}, want one row: a conversation has one")
        prompt = torch.cat((self.tokens, said.to(self.tokens.device)), 1)
        done = self.generator.generate(prompt, session=self.session, **self._names, **kwargs)
        if len(done.sequences) != 1:
            raise ConfigError(f"num_return_sequences = {len(done.sequences)}: a conversation goes on with one answer")
        self.tokens = done.sequences
        return done

    def end(self) -> None:
        """Nothing more of it will come: its blocks are the first to go."""
        self.generator.cache.session(self.session).end()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
