"""Taking turns: of many threads that bring news one takes it in, the others leave word and go on."""

from __future__ import annotations

from kvtier.runtime.seam import Lock


class Turn:
    """Whose turn it is; nobody ever waits for it longer than for a look at two flags."""

    def __init__(self, lock: Lock) -> None:
        """It is the maker's turn, who has been asked already: ``while goes_on(): ...`` begins the first one."""
        self._lock = lock
        self._taken = self._asked = True

    def ask(self) -> bool:
        """There is news. True: it is the caller's turn to look, until ``goes_on`` says no or ``give_up``."""
        with self._lock:
            self._asked = True
            if self._taken:
                return False
            self._taken = True
            return True

    def goes_on(self) -> bool:
        """Whether somebody asked since the last look; if not, the turn is over."""
        with self._lock:
            self._taken, self._asked = self._asked, False
            return self._taken

    def give_up(self) -> bool:
        """The turn is over before its time; True when somebody asked since the last look, and relies on it."""
        with self._lock:
            asked, self._taken, self._asked = self._asked, False, False
            return asked
