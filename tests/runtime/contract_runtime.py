"""What every ``seam.Runtime`` must do. A subclass gives the fixture ``runtime``."""

from contextlib import suppress

import pytest

from kvtier.runtime.seam import Event, Runtime, Worker

PATIENCE_S = 60.0
NOW_S = 0.0


class Loop:
    """A step that returns what it is told to, counts its turns and says when they are over."""

    def __init__(self, runtime: Runtime, answers: list[bool]) -> None:
        self.answers = answers
        self.turns = 0
        self.wake: Event = runtime.event()
        self.rested: Event = runtime.event()

    def step(self) -> bool:
        self.turns += 1
        more = self.answers.pop(0) if self.answers else False
        if not more:
            self.rested.set()
        return more

    def rest(self) -> None:
        """Wait until a step had nothing to do."""
        assert self.rested.wait(PATIENCE_S)
        self.rested.clear()


class RuntimeContract:
    def test_an_event_stays_set_until_it_is_cleared(self, runtime: Runtime) -> None:
        event = runtime.event()
        assert not event.wait(NOW_S)
        event.set()
        event.set()
        assert event.wait(NOW_S)
        assert event.wait(None)
        event.clear()
        event.clear()
        assert not event.wait(0.001)

    def test_a_lock_can_be_taken_again_when_it_was_released(self, runtime: Runtime) -> None:
        lock = runtime.lock()
        for _ in range(2):
            with pytest.raises(KeyError), lock:
                raise KeyError

    def test_the_clock_goes_forward(self, runtime: Runtime) -> None:
        before = runtime.clock.monotonic()
        runtime.event().wait(0.002)
        assert runtime.clock.monotonic() >= before + 0.001
        assert runtime.clock.wall() > 1.6e9

    def test_a_step_with_more_to_do_runs_again_at_once(self, runtime: Runtime) -> None:
        loop = Loop(runtime, [True, True, True])
        worker = runtime.spawn("loop", loop.step, loop.wake)
        loop.rest()
        assert worker.stop(PATIENCE_S)
        assert loop.turns == 4

    def test_a_resting_loop_runs_when_it_is_woken_and_not_before(self, runtime: Runtime) -> None:
        loop = Loop(runtime, [])
        worker = runtime.spawn("loop", loop.step, loop.wake)
        loop.rest()
        assert not loop.rested.wait(0.002)
        loop.wake.set()
        loop.rest()
        assert not loop.wake.wait(NOW_S), "the loop takes the wake-up back"
        assert worker.stop(PATIENCE_S)
        assert loop.turns == 2

    def test_a_wake_up_during_the_step_is_not_lost(self, runtime: Runtime) -> None:
        loop = Loop(runtime, [])

        def step() -> bool:
            if loop.turns == 0:
                loop.wake.set()
            elif loop.turns == 1:
                loop.rested.set()
            loop.turns += 1
            return False

        worker = runtime.spawn("loop", step, loop.wake)
        loop.rest()
        assert worker.stop(PATIENCE_S)

    def test_an_idle_limit_wakes_a_loop_that_nobody_wakes(self, runtime: Runtime) -> None:
        loop = Loop(runtime, [])
        worker = runtime.spawn("loop", loop.step, loop.wake, idle_s=0.001)
        for _ in range(3):
            loop.rest()
        assert worker.stop(PATIENCE_S)

    def test_a_stopped_loop_never_runs_again(self, runtime: Runtime) -> None:
        loop = Loop(runtime, [])
        worker = runtime.spawn("loop", loop.step, loop.wake, idle_s=0.001)
        loop.rest()
        assert worker.stop(PATIENCE_S)
        assert worker.stop(PATIENCE_S)
        turns = loop.turns
        loop.rested.clear()
        loop.wake.set()
        assert not loop.rested.wait(0.005)
        assert loop.turns == turns

    def test_a_loop_that_asks_itself_to_stop_ends_after_the_step(self, runtime: Runtime) -> None:
        wake, ended = runtime.event(), runtime.event()
        workers: list[Worker] = []
        answers: list[bool] = []

        def step() -> bool:
            if workers:
                answers.append(workers[0].stop(PATIENCE_S))
                ended.set()
            return True

        workers.append(runtime.spawn("loop", step, wake))
        assert ended.wait(PATIENCE_S)
        assert workers[0].stop(PATIENCE_S)
        assert answers == [False]

    def test_an_exception_ends_the_loop_and_comes_out_of_stop_once(self, runtime: Runtime) -> None:
        wake, reached = runtime.event(), runtime.event()

        def step() -> bool:
            reached.set()
            raise ZeroDivisionError("a defect")

        worker = runtime.spawn("loop", step, wake)
        with suppress(ZeroDivisionError):  # a simulation lets it out at once, besides
            reached.wait(PATIENCE_S)
        with pytest.raises(ZeroDivisionError, match="a defect"):
            worker.stop(PATIENCE_S)
        assert worker.stop(PATIENCE_S)
