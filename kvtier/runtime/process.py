"""Which process this is. A child of a fork has the memory of its parent, but none of its threads."""

from __future__ import annotations

import os


class Process:
    """One process; in a child of it ``is_here`` turns False on all that the parent had."""

    __slots__ = ("is_here",)

    def __init__(self) -> None:
        self.is_here = True


_this = Process()


def this_process() -> Process:
    """The process that asks. Whoever keeps it finds out, by looking at ``is_here``, that a fork took it elsewhere."""
    return _this


def _forked() -> None:
    global _this  # noqa: PLW0603  the fork changed it, and nobody but us is told
    _this.is_here = False
    _this = Process()


os.register_at_fork(after_in_child=_forked)
