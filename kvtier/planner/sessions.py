"""Sessions and what their users say of the future: hints for policies, accepted and recorded."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from kvtier.core.keys import Keys

_MAX_SESSIONS: Final = 65536


@dataclass(slots=True)
class SessionHints:
    """What is known of one session; None where nothing was said. Times are of the planner's clock, in seconds."""

    last_key: bytes = b""
    tokens: int = 0
    last_use_s: float = 0.0
    ended: bool = False
    one_shot: bool = False
    expected_reuse_s: float | None = None
    ttl_s: float | None = None


class Sessions:
    """Hints by session id; the least recently used go when there are too many."""

    def __init__(self) -> None:
        """No session is known."""
        self._hints: OrderedDict[str, SessionHints] = OrderedDict()

    def hints(self, session: str) -> SessionHints:
        """What is known of ``session``, to be read and written."""
        hints = self._hints.get(session)
        if hints is None:
            hints = self._hints[session] = SessionHints()
            if len(self._hints) > _MAX_SESSIONS:
                self._hints.popitem(last=False)
        self._hints.move_to_end(session)
        return hints

    def used(self, session: str, keys: Keys, now_s: float) -> None:
        """``session`` looked ``keys`` up."""
        hints = self.hints(session)
        hints.last_key = keys.digests[-1] if keys.digests else b""
        hints.tokens = keys.num_tokens
        hints.last_use_s = now_s
        hints.ended = False

    def __len__(self) -> int:
        """Number of sessions that are known."""
        return len(self._hints)
