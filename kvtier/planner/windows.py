"""Groups that need no whole prefix: which of their blocks a hit needs, and which of them are worth keeping."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvtier.config import PolicyConfig
from kvtier.index.entries import Mask
from kvtier.models.layout import KVLayout

Blocks = npt.NDArray[np.int64]


class Windows:
    """The groups of a layout by what a hit needs of them.

    ``whole`` are the numbers of the groups that need the whole prefix, ``partial`` of all others. Of these,
    ``required`` must be there where a hit ends, and the engine can compute ``optional`` ones again.
    """

    def __init__(self, layout: KVLayout, policy: PolicyConfig) -> None:
        """``policy`` says what is kept, and whether what is missing may be computed again."""
        rules = [group.reuse for group in layout.groups]
        self.whole = tuple(number for number, reuse in enumerate(rules) if reuse.rule == "all")
        self.partial = tuple(number for number, reuse in enumerate(rules) if reuse.rule != "all")
        replays = policy.windows in ("zero", "replay")
        self.optional = tuple(number for number in self.partial if replays and rules[number].replay_tokens)
        self.required = tuple(number for number in self.partial if number not in self.optional)
        self.stored = self.required if policy.windows == "zero" else self.partial
        self.keeps_every_block = policy.windows == "full"
        self.replay_is_exact = policy.windows == "zero"
        optional = [rules[number] for number in self.optional]
        tokens = [reuse.replay_tokens if self.replay_is_exact else reuse.window_tokens for reuse in optional]
        self.replay_tokens = max(tokens, default=0)
        self._block_tokens = layout.block_tokens
        self._window_blocks = layout.window_blocks
        self._checkpoint_tokens = policy.checkpoint_tokens

    def window_blocks(self, group: int) -> int:
        """Blocks at the end of a hit that ``group`` has to have."""
        return self._window_blocks[group]

    def needed(self, group: int, first: int, stop: int) -> range:
        """Blocks of ``group`` that a hit of blocks [first, stop) needs; what is before ``first`` the engine has."""
        reach = self._window_blocks[group]
        return range(max(first, stop - reach) if reach else first, stop)

    def reach(self, group: int, first: int, stop: int) -> range:
        """Blocks of ``group`` that a store of blocks [first, stop) may be about: windows reach further back."""
        return range(max(0, first + 1 - self._window_blocks[group]), stop)

    def ends(self, first: int, stop: int, tokens: Iterable[int]) -> Blocks:
        """Where a store of blocks [first, stop) makes checkpoints: block ends in (first, stop].

        They are those before ``tokens``, and every ``checkpoint_tokens``.
        """
        size, every = self._block_tokens, self._checkpoint_tokens
        found = {token // size for token in tokens}
        if every:
            next_one = (first * size // every + 1) * every
            found.update(token // size for token in range(next_one, stop * size + 1, every))
        return np.array(sorted(end for end in found if first < end <= stop), np.int64)

    def are_worth_keeping(self, group: int, first: int, stop: int, ends: Blocks) -> Mask:
        """Which of the blocks [first, stop) of ``group`` belong to what hits that end at ``ends`` need."""
        marks = np.zeros(stop - first + 1, np.int64)
        np.add.at(marks, np.maximum(ends - self._window_blocks[group], first) - first, 1)
        np.add.at(marks, ends - first, -1)
        worth: Mask = marks.cumsum()[:-1] > 0
        return worth
