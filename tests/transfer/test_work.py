"""The queue of the copy threads: order of service, and who is woken."""

from typing import Any

from kvtier.runtime import system_machine
from kvtier.transfer.work import (
    HALVED_BYTES,
    PIECE_BYTES,
    STEP_BYTES,
    Piece,
    Service,
    WorkQueue,
    halved,
    pieces,
    steps,
)


def _piece(service: Service) -> Piece:
    return Piece(service, lambda: None, lambda result: None)


def _event() -> Any:
    return system_machine("threads").runtime.event()


def test_pieces_come_by_class_of_service_and_then_in_order() -> None:
    queue, wake = WorkQueue(), _event()
    pieces = [_piece(service) for service in (Service.BACKGROUND, Service.GATHER, Service.LOAD, Service.GATHER)]
    for piece in pieces:
        queue.put(piece)
    assert [queue.take(wake) for _ in range(4)] == [pieces[2], pieces[1], pieces[3], pieces[0]]


def test_a_thread_that_found_nothing_is_woken_by_the_next_piece_and_only_once() -> None:
    queue, wake = WorkQueue(), _event()
    assert queue.take(wake) is None
    queue.put(_piece(Service.LOAD))
    assert wake.wait(0)
    wake.clear()
    queue.put(_piece(Service.LOAD))
    assert not wake.wait(0)


def test_each_piece_wakes_a_thread_while_there_are_some_that_wait() -> None:
    queue, first, second = WorkQueue(), _event(), _event()
    assert queue.take(first) is None
    assert queue.take(second) is None
    queue.put(_piece(Service.LOAD))
    assert [first.wait(0), second.wait(0)].count(True) == 1
    queue.put(_piece(Service.LOAD))
    assert first.wait(0)
    assert second.wait(0)


def test_what_is_left_of_a_piece_comes_first_of_its_class() -> None:
    queue, wake = WorkQueue(), _event()
    gather, rest, load = _piece(Service.GATHER), _piece(Service.GATHER), _piece(Service.LOAD)
    queue.put(gather)
    queue.put_back(rest)
    assert not queue.has_before(Service.GATHER)
    queue.put(load)
    assert queue.has_before(Service.GATHER)
    assert [queue.take(wake) for _ in range(3)] == [load, rest, gather]


def test_rows_are_cut_into_pieces_of_eight_mebibytes() -> None:
    assert list(pieces([4, 5, 6, 7, 9], PIECE_BYTES // 2)) == [[4, 5], [6, 7], [9]]
    assert list(pieces([1, 2], 4 * PIECE_BYTES)) == [[1], [2]]


def test_pieces_for_kernels_are_longer_where_two_threads_have_enough_all_the_same() -> None:
    def lengths(count: int) -> list[int]:
        return [len(piece) for piece in pieces(list(range(count)), PIECE_BYTES, are_long=True)]

    assert lengths(2) == [1, 1]
    assert lengths(4) == [2, 2]
    assert lengths(16) == [8, 8]
    assert lengths(64) == [8] * 8


def test_a_long_piece_is_moved_in_steps_between_which_others_may_come_first() -> None:
    assert list(steps([1, 2, 3, 4, 5], STEP_BYTES // 2)) == [[1, 2], [3, 4], [5]]
    assert list(steps([1, 2], 4 * STEP_BYTES)) == [[1], [2]]


def _in_halves(count: int) -> Piece:
    """Work on ``count`` things; ``work`` says how many."""

    def halves() -> tuple[Piece, Piece]:
        return _in_halves(count // 2), _in_halves(count - count // 2)

    return Piece(Service.GATHER, lambda: count, lambda result: None, halves if count > 1 else None)


def test_the_last_piece_is_shared_with_threads_that_would_find_nothing() -> None:
    queue, wake, other = WorkQueue(), _event(), _event()
    assert queue.take(other) is None
    queue.put(_in_halves(8))
    queue.put(_in_halves(8))
    other.clear()
    taken: list[int] = []
    while (piece := queue.take(wake)) is not None:
        taken.append(piece.work())
    assert taken == [8, 4, 2, 1, 1]


def test_whoever_waits_is_woken_for_the_other_half() -> None:
    queue, wake, other = WorkQueue(), _event(), _event()
    assert queue.take(wake) is None
    assert queue.take(other) is None
    queue.put(_in_halves(2))  # wakes one of them, which takes half of it
    first, second = (wake, other) if wake.wait(0) else (other, wake)
    assert not second.wait(0)
    assert queue.take(first) is not None
    assert second.wait(0)


def test_rows_are_halved_while_each_half_is_worth_a_thread() -> None:
    assert halved([1, 2, 3, 4, 5], HALVED_BYTES) == ([1, 2], [3, 4, 5])
    assert halved([1], 8 * HALVED_BYTES) is None
    assert halved([1, 2, 3], HALVED_BYTES // 4) is None
