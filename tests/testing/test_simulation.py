"""The simulation: equal seeds run alike, time passes only when nobody can run, and bad manners are found out."""

import pytest

from kvtier.runtime.seam import Event, IORequest, Op
from kvtier.testing.simulation import Simulation, SimulationError
from tests.runtime.contract_files import PAGE, aligned


def run_three_workers(seed: int) -> tuple[str, list[str]]:
    """Three loops that wake each other, one of them with I/O; returns the digest and the order of their turns."""
    simulation, turns = Simulation(seed), list[str]()
    machine = simulation.machine()
    machine.files.make_directory("/cache")
    fd = machine.files.open("/cache/x", create=True)
    engine = machine.io_engine("io", 4)
    wakes = [engine.ready, simulation.event(), simulation.event()]

    def turn(number: int) -> bool:
        turns.append(str(number))
        if number == 0:
            engine.reap()
            engine.submit(IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], len(turns)))
        wakes[(number + 1) % 3].set()
        return len(turns) % 2 == 0

    for number in range(3):
        simulation.spawn(f"worker-{number}", lambda number=number: turn(number), wakes[number])
    simulation.run_until(lambda: len(turns) >= 100)
    return simulation.trace_digest(), turns


def test_equal_seeds_make_equal_decisions() -> None:
    assert run_three_workers(7) == run_three_workers(7)


def test_different_seeds_make_different_decisions() -> None:
    assert len({run_three_workers(seed)[0] for seed in range(5)}) == 5


def test_time_passes_only_when_nobody_can_run() -> None:
    simulation, turns = Simulation(1), list[float]()
    begun_s = simulation.clock.monotonic()

    def step() -> bool:
        turns.append(simulation.clock.monotonic() - begun_s)
        return len(turns) % 10 != 0

    simulation.spawn("loop", step, simulation.event(), idle_s=60.0)
    assert not simulation.run_until(lambda: False, timeout_s=150.0)
    assert [round(turn_s) for turn_s in turns] == [0] * 10 + [60] * 10 + [120] * 10
    assert simulation.clock.monotonic() == begun_s + 150.0


def test_wall_time_passes_with_virtual_time() -> None:
    simulation = Simulation(1)
    before = simulation.clock.wall()
    simulation.run_for(3600.0)
    assert simulation.clock.wall() == before + 3600.0


def test_run_idle_ends_what_is_under_way_and_leaves_idle_timeouts() -> None:
    simulation, turns = Simulation(1), list[int]()
    machine = simulation.machine()
    machine.files.make_directory("/cache")
    fd = machine.files.open("/cache/x", create=True)
    engine = machine.io_engine("io", 1)
    simulation.spawn("idle", lambda: turns.append(1) is not None, simulation.event(), idle_s=1.0)
    for _ in range(3):
        engine.submit(IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], None))
    simulation.run_idle()
    assert len(engine.reap()) == 3
    assert len(turns) == 1


def test_waiting_from_outside_runs_everything_else() -> None:
    simulation = Simulation(1)
    answer = simulation.event()

    def step() -> bool:
        answer.set()
        return False

    simulation.spawn("loop", step, simulation.event(), idle_s=1.0)
    assert answer.wait(5.0)


def test_waiting_for_what_nobody_will_ever_do_is_an_error_with_the_seed() -> None:
    simulation = Simulation(41)
    simulation.spawn("rests", lambda: False, simulation.event())
    with pytest.raises(SimulationError, match=r"nothing is left to run \(seed 41.*rests@"):
        simulation.event().wait(None)


def test_a_loop_that_never_rests_is_an_error_after_the_limit_of_steps() -> None:
    simulation = Simulation(1)
    simulation.spawn("busy", lambda: True, simulation.event())
    with pytest.raises(SimulationError, match="not there after 500 steps"):
        simulation.run_until(lambda: False, limit_steps=500)


def expect_error_of_step(simulation: Simulation, step: object, match: str) -> None:
    simulation.spawn("rude", step, simulation.event())  # type: ignore[arg-type]
    with pytest.raises(SimulationError, match=match):
        simulation.run_idle()


def test_a_step_that_blocks_is_found_out() -> None:
    simulation = Simulation(1)
    event: Event = simulation.event()
    expect_error_of_step(simulation, lambda: event.wait(1.0), "rude blocks inside its step")


def test_a_step_that_waits_for_an_engine_to_close_is_found_out() -> None:
    simulation = Simulation(1)
    machine = simulation.machine()
    machine.files.make_directory("/cache")
    fd = machine.files.open("/cache/x", create=True)
    engine = machine.io_engine("io", 1)
    engine.submit(IORequest(Op.SYNC, fd, 0, (), None))
    expect_error_of_step(simulation, lambda: engine.close(1.0) == 0, "rude blocks inside its step")


def test_a_lock_that_is_taken_twice_is_found_out() -> None:
    simulation = Simulation(1)
    lock = simulation.lock()

    def step() -> bool:
        with lock, lock:
            return False

    expect_error_of_step(simulation, step, "held already")


def test_a_lock_that_a_step_leaves_held_is_found_out() -> None:
    simulation = Simulation(1)
    lock = simulation.lock()

    def step() -> bool:
        lock.__enter__()
        return False

    expect_error_of_step(simulation, step, "rude left a lock held")


def test_waiting_under_a_lock_is_found_out() -> None:
    simulation = Simulation(1)
    with simulation.lock(), pytest.raises(SimulationError, match="a lock is held while others run"):
        simulation.event().wait(1.0)


def test_an_exception_of_a_step_comes_out_of_the_run_and_ends_only_that_loop() -> None:
    simulation, turns = Simulation(1), list[int]()

    def defect() -> bool:
        raise ZeroDivisionError

    def step() -> bool:
        turns.append(1)
        return len(turns) < 10

    simulation.spawn("defect", defect, simulation.event())
    simulation.spawn("sound", step, simulation.event())
    with pytest.raises(ZeroDivisionError):
        simulation.run_idle()
    simulation.run_idle()
    assert len(turns) == 10


def test_nothing_of_a_killed_process_runs_on() -> None:
    for death in (Simulation.kill, Simulation.power_cut):
        simulation, turns = Simulation(1), list[int]()
        machine = simulation.machine()
        machine.files.make_directory("/cache")
        fd = machine.files.open("/cache/x", create=True)
        engine = machine.io_engine("io", 1)
        engine.submit(IORequest(Op.WRITE, fd, 0, [aligned(PAGE)], None))
        simulation.spawn("loop", lambda turns=turns: turns.append(1) is None, engine.ready)  # type: ignore[misc]
        death(simulation)
        simulation.run_for(1.0)
        assert turns == []
        assert engine.reap() == []
