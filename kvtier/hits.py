"""Hits and sessions: what a lookup found, held in place, and what callers say of the future."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

from kvtier.config import MOST_SECONDS
from kvtier.core.checks import is_number
from kvtier.core.keys import Keys
from kvtier.core.plan import Lineage, Tier
from kvtier.errors import ConfigError
from kvtier.planner import Lease
from kvtier.planner.sessions import SessionHints


class _Origin(Protocol):
    """What gave a hit, and takes its lease back."""

    def release(self, lease: Lease) -> None:
        """Let go of ``lease``, and see to what follows."""

    def let_go(self, lease: Lease) -> None:
        """As ``release``, in the middle of anything."""


class Hit:
    """The longest stored prefix of a sequence, pinned until released; a context manager that releases.

    Leaving ``with`` while a load of it is under way is allowed: the load holds what it needs itself. One that has no
    owner and is dropped lets go as well. Until then all of it keeps its place in host memory: release a long one before
    you store what follows it, or there may be no room; ``derived_from=`` takes a released hit, too.
    """

    def __init__(self, lease: Lease, start: int, origin: _Origin) -> None:
        self.lease = lease
        self.start = start
        self.origin = origin  # the cache that gave it: entries mean nothing in another one

    @property
    def keys(self) -> Keys:
        """The keys that were looked up."""
        return self.lease.keys

    @property
    def num_tokens(self) -> int:
        """Where the stored prefix ends: a multiple of block_tokens, counted from position 0.

        Tokens before ``start`` are the engine's own. Not beyond ``start``: nothing was found, and it may be the whole
        length of the sequence. What was found leaves one token of it to compute, or more.
        """
        return (self.lease.first_block + self.lease.blocks) * self.keys.block_tokens

    @property
    def by_tier(self) -> dict[str, int]:
        """Tokens found beyond ``start`` by the tier that the slowest of their groups and ranks comes from."""
        counts = {"device": 0, "host": 0, "disk": 0}
        tiers = self.lease.tiers.tolist()
        for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK):
            counts[tier.label] = tiers.count(tier) * self.keys.block_tokens
        if tiers:
            counts[Tier(tiers[0]).label] -= max(0, self.start - self.lease.first_block * self.keys.block_tokens)
        return counts

    @property
    def pending(self) -> int:
        """Tokens right behind ``num_tokens`` that are being stored; lookup never waits for them."""
        return self.lease.pending_blocks * self.keys.block_tokens

    @property
    def replay_tokens(self) -> int:
        """Tokens at its end that the engine has to compute again before it goes on: their windows are not there.

        0 unless ``policy.windows`` is ``zero`` or ``replay``. All else of the prefix is loaded; with ``zero`` what
        comes out is what was computed before, with ``replay`` it is approximate (``exact`` is false).
        """
        return self.lease.replay_tokens

    @property
    def exact(self) -> bool:
        """Whether every block is what the model computes, not derived from lossy or approximate KV."""
        return self.lease.lineage == Lineage.EXACT

    def release(self) -> None:
        """Let go, behind all that was submitted before; harmless a second time, and in a finalizer: it never waits.

        Over channels that cannot be called back it may send and tell what follows: drop the hit there, instead.
        """
        self.origin.release(self.lease)

    def __del__(self) -> None:
        if self.lease.owner is None and not self.lease.released:
            self.origin.let_go(self.lease)

    def __enter__(self) -> Hit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is GeneratorExit:  # an abandoned coroutine ends, by garbage collection and in the middle of anything
            self.origin.let_go(self.lease)
        else:
            self.release()

    def __repr__(self) -> str:
        return f"Hit({self.num_tokens} of {self.keys.num_tokens} tokens, {self.by_tier}, pending {self.pending})"


class Session:
    """What the caller knows of one conversation; hints are recorded and never change what is right."""

    def __init__(self, hints: SessionHints) -> None:
        self.hints = hints

    def end(self) -> None:
        """Nothing more of this session will come."""
        self.hints.ended = True

    def one_shot(self) -> None:
        """Its blocks will not be asked for again."""
        self.hints.one_shot = True

    def expect_reuse(self, after_s: float) -> None:
        """Its next request is expected in ``after_s`` seconds.

        Raises:
            ConfigError: that is no number of seconds.
        """
        self.hints.expected_reuse_s = _checked_seconds("after_s", after_s)

    def ttl(self, seconds: float) -> None:
        """Its blocks need not be kept longer than ``seconds`` after their last use.

        Raises:
            ConfigError: that is no number of seconds.
        """
        self.hints.ttl_s = _checked_seconds("seconds", seconds)


def _checked_seconds(name: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value <= MOST_SECONDS:
        raise ConfigError(f"{name} = {value!r}: must be a number of seconds from 0 up to {MOST_SECONDS:g}")
    return float(value)
