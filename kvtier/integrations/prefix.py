"""For programs that call ``model.generate`` themselves: a cache of transformers that begins with a stored prefix."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from kvtier.cache import TieredCache
from kvtier.config import MOST_SECONDS
from kvtier.core.checks import at_least, timeout
from kvtier.errors import ConfigError
from kvtier.integrations.fit import check_autocast, check_dropout, check_keeps_kv, fit_of
from kvtier.integrations.sequences import CachedSequence
from kvtier.jobs import LoadResult, StoreResult
from kvtier.manager import CacheManager


class PrefixCache(DynamicCache):
    """What to pass as ``past_key_values=`` with the whole prompt: filled at construction, stored at the end.

    ::

        with PrefixCache(model, cache, prompt) as past:
            sequences = model.generate(prompt, past_key_values=past, streamer=streamer, prefill_chunk_size=512)
            past.store(sequences)

    Leaving ``with`` stores the prompt if nothing was stored. Without ``with`` call ``store``; of models with states
    what ends behind the prompt is then not found again. One object serves one generation.
    """

    def __init__(
        self,
        model: Any,
        cache: TieredCache | CacheManager,
        prompt: torch.Tensor,
        *,
        rows: int = 1,
        tenant: str = "",
        adapter: str = "",
        session: str | None = None,
        exact: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        """``prompt`` is ``[tokens]`` or ``[1, tokens]``; ``rows``: ``num_beams`` or ``num_return_sequences``.

        Of several rows only the prompt is stored. At least one token of the prompt is left to compute.

        Raises:
            ConfigError: as ``CachedGenerator``; or a prompt of several rows; or a MiniMax M1, whose model takes a class
                of its own only.
            ClosedError: the cache is closed.
        """
        core = cache.core if isinstance(cache, CacheManager) else cache
        tokens = prompt[0] if prompt.ndim == 2 and len(prompt) == 1 else prompt
        if tokens.ndim != 1 or not len(tokens):
            raise ConfigError(f"prompt: shape {list(prompt.shape)}, want [tokens] or [1, tokens]; rows are for copies")
        check_dropout(model)
        check_keeps_kv(model)
        check_autocast(model)
        core.match(())  # a closed cache is an error here
        self._rows = at_least("rows", rows, 1)
        self._sequence = CachedSequence(
            model, fit_of(core.layout, model), core, tokens, tenant=tenant, adapter=adapter, session=session,
            exact=exact, timeout_s=timeout(timeout_s, MOST_SECONDS),
        )  # fmt: skip
        if isinstance(self._sequence.past, MiniMaxCache):
            raise ConfigError("model: this one takes a MiniMaxCache and no other; use CachedGenerator")
        super().__init__()
        self._sequence.restore()
        self._sequence.prefill()
        self._sequence.expand(self._rows)
        self.layers = self._sequence.past.layers
        self._sequence.past = self
        self._watch = ExitStack()
        self._is_stored = False

    @property
    def loaded(self) -> LoadResult | None:
        """What was loaded, by tier; None where nothing was."""
        return self._sequence.loaded

    @property
    def hit_tokens(self) -> int:
        """Tokens of the prompt that came from the cache."""
        return self._sequence.start

    def store(self, sequences: torch.Tensor | None = None) -> StoreResult | None:
        """Offer what was computed: of ``sequences``, as ``model.generate`` returned them, or of the prompt alone.

        Raises:
            ConfigError: they do not begin with the prompt, or are shorter than what this cache holds.
        """
        sequence, prompt = self._sequence, self._sequence.prompt
        sequence.release()
        self._is_stored = True
        computed = self.get_seq_length()
        if sequences is not None and self._rows == 1:
            tokens = (sequences[0] if sequences.ndim == 2 else sequences).to(prompt.device)
            if len(tokens) < computed or not torch.equal(tokens[: len(prompt)], prompt):
                raise ConfigError(
                    f"sequences: {len(tokens)} tokens, want the prompt and all {computed} that this cache holds:"
                    " KV under the wrong tokens would be found again"
                )
            sequence.keys.append(tokens[len(prompt) : computed])
        return sequence.store()

    def __enter__(self) -> PrefixCache:
        self._watch.enter_context(self._sequence.watched(prompt_only=self._rows > 1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.close()
        self._sequence.release()
        if kind is None and not self._is_stored:
            self.store()
