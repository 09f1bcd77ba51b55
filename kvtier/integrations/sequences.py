"""One sequence on its way through a model: its prefix comes from a cache, and what is computed goes there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from kvtier.cache import TieredCache
from kvtier.core.memory import KVPages
from kvtier.errors import ClosedError
from kvtier.hits import Hit
from kvtier.integrations.fit import Fit
from kvtier.integrations.layers import Kind, Past, Pieces, Recurrent
from kvtier.integrations.recording import Ends
from kvtier.integrations.transit import Arrival, departure, overlaps
from kvtier.jobs import Job, LoadResult, R, StoreResult

log = logging.getLogger(__name__)


class CachedSequence:
    """A prompt, and ``past``, the cache of transformers that it is computed with.

    The journey is ``restore``, ``prefill``, whatever computes on within ``watched``, then ``store``.
    """

    def __init__(
        self,
        model: Any,
        fit: Fit,
        cache: TieredCache,
        prompt: torch.Tensor,
        *,
        tenant: str = "",
        adapter: str = "",
        session: str | None = None,
        exact: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        """``prompt`` is ``[tokens]``; ``exact``: only KV that is what the model computes."""
        self.model = model
        self.fit = fit
        self.cache = cache
        self.prompt = prompt
        self.session = session
        self.exact = exact or not fit.replays  # what has its windows needs no replay
        self.timeout_s = timeout_s
        self._keys_of = partial(cache.keys, tenant=tenant, adapter=adapter)
        self.keys = self._keys_of(prompt)
        self.ends = Ends(cache.layout.block_tokens, cache.config.policy, len(prompt))
        self.past: Past = fit.new_cache(self.ends)
        self.hit: Hit | None = None
        self.loaded: LoadResult | None = None
        self.start = 0
        """Tokens that came from the cache."""
        self._states: dict[int, dict[Kind, Pieces]] = {}

    def restore(self) -> None:
        """Find the longest stored prefix and put it into ``past``; ``hit`` stays pinned until ``release``.

        Where windows and states make a hit useful as a whole only, and a part of it cannot be read, the prefix is
        looked up once more: by then the cache knows what it has lost. Nothing where the cache was closed meanwhile.
        """
        try:
            self._restore_from(self.cache.lookup(self.keys, session=self.session, exact=self.exact))
            if self.fit.needs_all and self.hit is not None and self.start < self.hit.num_tokens:
                self.release()
                self._restore_from(self.cache.lookup(self.keys, session=self.session, exact=self.exact))
        except ClosedError:
            self.past, self.start = self.fit.new_cache(self.ends), 0

    def restore_from(self, hit: Hit) -> None:
        """Put the prefix of ``hit`` into ``past``, or as much of it as could be read."""
        self._restore_from(hit)

    def begin_with(self, arrival: Arrival, tokens: int) -> None:
        """Put the first ``tokens`` tokens of ``arrival`` into ``past``, which is empty."""
        arrival.fill(self.past, tokens, self.model.device)
        self.start = tokens

    def release(self) -> None:
        """Let go of the hit: its blocks may make room."""
        if self.hit is not None:
            self.hit.release()

    def prefill(self) -> None:
        """Compute the prompt up to the last checkpoint in it, where states are there at the end of a forward only."""
        if not self.fit.needs_splits:
            return
        for end in self.ends.within(self.start, len(self.prompt) - 1):
            self._forward(end)
            self._observe(None)

    def prefill_whole(self) -> None:
        """As ``prefill``, and go on up to the last token of the prompt, which is left to begin decoding with."""
        self.prefill()
        if self.past.get_seq_length() < len(self.prompt) - 1:
            self._forward(len(self.prompt) - 1)
            self._observe(None)

    def expand(self, copies: int) -> None:
        """``past`` for ``copies`` sequences that begin alike."""
        if copies == 1 or not self.past.get_seq_length():
            return
        if isinstance(self.past, MiniMaxCache):  # the one that reorder_cache forgets states of
            self.past.batch_repeat_interleave(copies)
        else:
            self.past.reorder_cache(torch.zeros(copies, dtype=torch.long, device=self.model.device))

    @contextmanager
    def watched(self, *, prompt_only: bool = False) -> Iterator[None]:
        """While forwards of the model run on ``past``, keep the states that they leave where blocks end.

        ``prompt_only``: what comes after the prompt is not one sequence.
        """
        if not self.fit.needs_splits:
            yield
            return
        last = len(self.prompt) if prompt_only else None
        handle = self.model.register_forward_hook(lambda *_: self._observe(last))
        try:
            yield
        finally:
            handle.remove()

    def departure(self, stop: int) -> KVPages:
        """Memory of what was computed of the tokens before ``stop``, the end of a block."""
        states = {**self._states}
        for end, found in overlaps(self.fit, self.past).items():
            states[end] = {**states.get(end, {}), **found}
        return departure(self.fit, self.past, states, self.start, stop)

    def store(self) -> StoreResult | None:
        """Offer the full blocks of ``keys`` behind what came from the cache, as far as ``past`` holds them."""
        computed = self.past.get_seq_length()
        if computed < self.keys.num_tokens:
            self.keys = self._keys_of(self.prompt[:computed])
        stop = len(self.keys) * self.keys.block_tokens
        if stop <= self.start:
            return None
        pages = self.departure(stop)
        try:
            job = self.cache.submit_store(
                self.keys, pages, start=self.start, derived_from=self.hit if self.start else None,
                checkpoints=(len(self.prompt), self.keys.num_tokens), session=self.session,
            )  # fmt: skip
        except ClosedError:
            log.warning("the cache was closed while the model generated: %d tokens are not stored", stop - self.start)
            return None
        return self._result(job)

    def _restore_from(self, hit: Hit) -> None:
        self.hit = hit
        replays = self.fit.replays and len(self.prompt) >= hit.num_tokens  # it takes the tokens, which a hit has not
        if not hit.num_tokens or (hit.replay_tokens and not replays):
            return
        arrival = Arrival.of(self.fit, hit.num_tokens)
        loaded = self._result(self.cache.submit_load(hit, arrival.pages))
        tokens = loaded.ok_tokens if loaded else 0
        if not tokens or (self.fit.needs_all and tokens < hit.num_tokens):
            return
        self.loaded = loaded
        if hit.replay_tokens:
            self._replay(arrival, hit.replay_tokens)
        else:
            self.begin_with(arrival, tokens)

    def _replay(self, arrival: Arrival, tokens: int) -> None:
        """Begin with ``arrival``, whose windows the last ``tokens``, or some more, are computed again for."""
        start = max(0, arrival.tokens - tokens) // self.keys.block_tokens * self.keys.block_tokens
        arrival.replay(self.past, start, self.model.device, lambda: self._forward(arrival.tokens))
        self.start = arrival.tokens

    def _forward(self, stop: int) -> None:
        tokens = self.prompt[None, self.past.get_seq_length() : stop].to(self.model.device)
        with torch.no_grad():
            self.model(tokens, past_key_values=self.past, use_cache=True, logits_to_keep=1)

    def _observe(self, last: int | None) -> None:
        """Copy the states of ``past``, unless they are behind ``last``."""
        end = self.past.get_seq_length()
        if last is None or end <= last:
            self.keep_states(end, self.past, 0)

    def keep_states(self, end: int, past: Past, row: int) -> None:
        """Copy those of ``row`` if a block ends at ``end``: of those behind the prompt only the newest is kept."""
        if not self.fit.needs_splits or end % self.keys.block_tokens or end <= self.start:
            return
        kinds = [kind for kind in self.fit.kinds if isinstance(kind, Recurrent)]
        self._states = {at: found for at, found in self._states.items() if self.ends.is_fixed(at)}
        self._states[end] = {kind: kind.now(past, row) for kind in kinds}

    def _result(self, job: Job[R]) -> R | None:
        try:
            return job.result(self.timeout_s)
        except TimeoutError:
            job.cancel()  # the memory stays alive as long as the job holds it; nobody reads it any more
            return None
