"""Between one planner and the data planes of all ranks: wishes come in, plans go out, callers hear how it ended.

What callers want moved is a wish in a queue. Whoever decides next, under the one lock and in memory, first plans all
wishes, those that come together side by side; nearly always that is a copy thread. Plans are sent and callers told
after the lock is released, completions committed by whoever brings them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

from kvtier.channel import Channel
from kvtier.core.memory import KVMemory
from kvtier.core.plan import Message, Plan
from kvtier.errors import ClosedError
from kvtier.jobs import AnyJob, Client, Job, JobControl, R, tell
from kvtier.memories import Memories
from kvtier.models.layout import KVLayout
from kvtier.planner import Lease, Planner, Ticket, Wish
from kvtier.runtime.deadline import Deadline
from kvtier.runtime.seam import Event, Runtime
from kvtier.turn import Turn

T = TypeVar("T")
log = logging.getLogger(__name__)

_WISHES_A_TURN: Final = 128
"""Planned at once: enough to share what a plan costs, few enough that nobody waits a millisecond for the lock."""
_MOST_WISHES: Final = 1024
"""That wait for a copy thread; over it whoever submits plans some, unless another thread is at it."""
_ROUNDS_A_TURN: Final = 8
"""For one thread, which has other things to do; each takes in all that was heard, or plans so many wishes."""
_BYTES_A_TURN: Final = 64 << 20
"""Of what they move: the bytes of large wishes are on their way before the next ones are planned."""

_NOTHING_UNDER_WAY_S: Final = 5.0
"""For closing what was only just opened."""


class _News(NamedTuple):
    """What is left to be done once the lock is released."""

    plans: Sequence[Plan] = ()
    jobs: Sequence[AnyJob] = ()
    arrived: Sequence[Event] = ()
    mistakes: Sequence[tuple[str, BaseException]] = ()
    memories: Sequence[KVMemory] = ()
    """Of the jobs that ended: perhaps the last references to them, and finalizers are to run with no lock held."""


class Dispatch:
    """Safe to call from any thread. ``planner`` and ``memories`` are to be used under ``lock`` only."""

    def __init__(
        self,
        planner: Planner,
        runtime: Runtime,
        layout: KVLayout,
        *,
        make_channels: Callable[[Callable[[], None]], Sequence[Channel]],
        check_here: Callable[[], None],
    ) -> None:
        """``make_channels`` gets ``pump``, to be called on news; ``check_here`` raises in another process."""
        self.planner = planner
        self.lock = runtime.lock()
        self.closed = False
        self._runtime = runtime
        self._block_tokens = layout.block_tokens
        self._blocks_a_turn = max(1, _BYTES_A_TURN // sum(layout.block_bytes))
        self._check_here = check_here
        parts = sum(len(group.parts) for group in layout.groups)
        self._control = JobControl(runtime, self._cancel, check_here, parts)
        self._jobs: dict[Ticket, AnyJob] = {}
        self._wishes: deque[Wish | Lease] = deque()
        self._heard: deque[Message] = deque()
        self._cancelled: set[int] = set()
        """Plans that nobody wants, of jobs that have not ended."""
        self._ended = False
        self._on_attach: list[Event] = []
        self._turn = Turn(runtime.lock())  # ours until all is made: planes have news before they can be asked
        self.channels = tuple(make_channels(self.pump))
        self.memories = Memories(self.channels)
        try:
            self._take_turn()
        except BaseException:
            for channel in self.channels:
                channel.close(_NOTHING_UNDER_WAY_S)
            raise

    # --- wishes and decisions ---------------------------------------------------------------------------------------

    def submit(self, wish: Wish, span: range, memory: KVMemory | None, client: Client | None) -> Job[R]:
        """Queue ``wish``, and see to it that somebody plans it soon. ``memory`` is let go when the job ends."""
        job: Job[R] = Job(wish.ticket, span, self._block_tokens, self._control, client)
        job.memory = memory
        self._jobs[wish.ticket] = job
        self._wishes.append(wish)
        if self._ended:
            self._end_jobs()
        elif len(self._wishes) > _MOST_WISHES:
            self.pump()
        else:
            self._ask()
        return job

    def release(self, lease: Lease) -> None:
        """Unpin ``lease``, behind all that was wished for before, and see to what follows.

        It may stay in the queue, like any other wish, if another thread has the lock.
        """
        if self.let_go(lease):
            self.pump()

    def let_go(self, lease: Lease) -> bool:
        """As ``release``; waits for no lock: garbage collection calls it in the middle of anything, ours as well.

        Returns whether something follows that no copy thread could be asked to see to.
        """
        self._wishes.append(lease)
        taken: list[bool] = []
        try:
            taken.extend(map(self.lock.acquire, (False,)))  # one call: Ctrl-C never finds the lock taken and not noted
            if taken[0]:
                self._plan_wishes(len(self._wishes))
        finally:
            if taken and taken[0]:
                self.lock.release()
        if not taken[0]:
            if not self.closed:
                self.channels[0].call_back()
            return False
        follows = self.planner.has_news or bool(self._wishes)
        return follows and not self.closed and not self.channels[0].call_back()

    def decide(self, verb: Callable[[], T]) -> T:
        """Run ``verb`` under the lock, behind all that was wished for before; a copy thread sends and tells the rest.

        The caller goes on: of news there may be more than it has time for.
        """
        try:
            with self.lock:
                self._plan_wishes(len(self._wishes))
                return verb()
        finally:
            if self.planner.has_news or self._wishes:
                self._ask()

    def pump(self) -> None:
        """Commit what data planes report, plan wishes, send what follows, tell callers; with no lock held.

        One thread at a time does it; whoever comes meanwhile asks it to look again, and goes on with its own work.
        """
        if self._turn.ask():
            self._take_turn()

    def wait_attached(self, timeout_s: float) -> None:
        """Wait until every rank is there and has told what it found on disk.

        Raises:
            TimeoutError: a rank is missing.
            ClosedError: it was closed.
        """
        clock = self._runtime.clock
        deadline = clock.monotonic() + timeout_s
        while True:
            self.check_open()
            with self.lock:
                if not self.planner.recovering:
                    return
                arrived = self._runtime.event()
                self._on_attach.append(arrived)
            left = deadline - clock.monotonic()
            if left <= 0 or not arrived.wait(left):
                ready = f"{self.planner.recovered_ranks} of {len(self.channels)} ranks"
                raise TimeoutError(f"{ready} after {timeout_s} s")

    def close(self, timeout_s: float) -> bool:
        """Take no more wishes, end every job, close the data planes; True when nothing was left behind.

        ``timeout_s`` is for all of them: each gets what those before it left.
        """
        deadline = Deadline(self._runtime.clock, timeout_s)
        with self.lock:
            self.closed = True
        closed = [channel.close(deadline.left_s()) for channel in self.channels]
        self.pump()
        if not all(closed):
            return False
        self._ended = True
        self._end_jobs()
        return True

    def levels(self) -> dict[str, float]:
        """How much of what is held here; under the lock."""
        return {"jobs": len(self._jobs), "memories": len(self.memories)}

    def check_open(self) -> None:
        """Refuse what comes too late.

        Raises:
            ClosedError: it was closed.
        """
        if self.closed:
            raise ClosedError("the cache is closed; open a new one")

    # --- inside -----------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """See to it that somebody pumps soon: a copy thread, or where there is none that could, whoever asks."""
        if self.closed or not self.channels[0].call_back():
            self.pump()

    def _take_turn(self) -> None:
        """Look until nobody asks any more; after some rounds a copy thread goes on, if there is one."""
        try:
            rounds, more = 0, False
            while more or self._turn.goes_on():
                if rounds >= _ROUNDS_A_TURN:
                    self._turn.give_up()
                    if self.channels[0].call_back() or not self._turn.ask():
                        return
                    rounds = 0
                rounds += 1
                more = self._take_in()
        except BaseException:
            if self._turn.give_up() or self._wishes or self._heard or self.planner.has_news:
                self.channels[0].call_back()  # whoever asked meanwhile relies on us
            raise

    def _take_in(self) -> bool:
        """What data planes have to say and callers wish for now; True when there may be more of it at once."""
        news = _News()
        try:
            with self.lock:  # it is polled under the lock, too: then nobody has a message in hand that others wait for
                self._poll()
                if not self._heard and not self._wishes and not self.planner.has_news:
                    return False
                try:
                    if self._heard:  # what follows from it is sent before anything new is planned
                        self._hear()
                    elif self.planner.follows:  # what it follows from is on its way
                        self.planner.follow_up()
                    else:
                        self._plan_wishes(self._wishes_a_turn())
                finally:
                    news = self._collect()
        finally:
            self._deliver(news)
        if self._wishes:  # a copy thread plans them as soon as one is free: first the bytes that it has in hand
            return not self.channels[0].call_back()
        return bool(news.plans) or self.planner.follows

    def _end_jobs(self) -> None:
        """Every rank is closed: what has come is taken in, and of all else nobody will ever hear."""
        news = _News()
        try:
            with self.lock:
                self._poll()
                try:
                    self._hear()
                    self._pass_over_wishes()
                    self._plan_wishes(len(self._wishes))
                    self.planner.end([job.ticket for job in list(self._jobs.values())])
                finally:
                    news = self._collect()
        finally:
            self._deliver(news)

    # --- under the lock ---------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        for channel in self.channels:
            self._heard.extend(channel.poll())

    def _wishes_a_turn(self) -> int:
        """How many of the wishes that wait are planned now, the others being left to the next turn."""
        blocks = 0
        most = min(len(self._wishes), _WISHES_A_TURN)
        for count in range(most):
            wish = self._wishes[count]
            blocks += 0 if isinstance(wish, Lease) else len(wish.ticket.outcome)
            if blocks >= self._blocks_a_turn:
                return count + 1
        return most

    def _pass_over_wishes(self) -> None:
        """Of what waits, leave only leases."""
        for _ in range(len(self._wishes)):
            each = self._wishes.popleft()
            if isinstance(each, Lease):
                self._wishes.append(each)

    def _plan_wishes(self, count: int) -> None:
        """Plan the first ``count`` wishes and let go of leases, in order, whatever comes of one of them.

        None is taken out before it was its turn: Ctrl-C, wherever it strikes, leaves the others to whoever is next.
        """
        interrupts = []
        while count:
            side_by_side: list[Wish] = []
            try:
                while count and not isinstance(wish := self._wishes[0], Lease):
                    count -= 1
                    if not wish.ticket.finished:  # else it was given up, and then left here
                        side_by_side.append(wish)
                    self._wishes.popleft()
                if side_by_side:
                    self.planner.plan(side_by_side, now_s=self._runtime.clock.monotonic())
                elif count:
                    count -= 1
                    self._let_go_of_first()
            except BaseException as error:  # Ctrl-C, or a mistake of ours: nobody may wait for ever because of it
                self.planner.give_up(side_by_side, error)
                interrupts += [] if isinstance(error, Exception) else [error]
        if interrupts:
            raise interrupts[0]

    def _let_go_of_first(self) -> None:
        """Let go of the lease that is next; where Ctrl-C strikes it stays there, and a second time is harmless."""
        lease = self._wishes[0]
        assert isinstance(lease, Lease)
        try:
            self.planner.release(lease)
        except Exception:
            self._wishes.popleft()
            raise
        self._wishes.popleft()

    def _hear(self) -> None:
        """Take all of what was polled in, whatever comes of one message: the thread that brings it has to go on."""
        interrupt = None
        while self._heard:
            message = self._heard.popleft()
            try:
                self.planner.take_in(message)
            except BaseException as error:
                self.planner.pass_over(message, error)
                interrupt = interrupt if isinstance(error, Exception) else error
        self.planner.follow_up()
        if interrupt is not None:
            raise interrupt

    def _collect(self) -> _News:
        arrived, self._on_attach = self._on_attach, []
        memories: list[KVMemory] = []
        mistakes: list[tuple[str, BaseException]] = []
        jobs = self._jobs_with_news(memories, mistakes)
        return _News(self.planner.take_plans(), jobs, arrived, self.planner.take_mistakes() + mistakes, memories)

    def _jobs_with_news(self, memories: list[KVMemory], mistakes: list[tuple[str, BaseException]]) -> list[AnyJob]:
        """Jobs that have news; adds the memories of those that ended to ``memories``."""
        jobs = []
        for ticket in self.planner.take_finished():
            job = self._jobs.get(ticket)
            if job is None:
                continue
            jobs.append(job)
            if ticket.finished:
                if self._cancelled:
                    self._cancelled.difference_update(ticket.plan_ids)
                del self._jobs[ticket]
                if job.memory is not None:
                    memories.append(job.memory)
                    try:
                        self.memories.let_go(job.memory)
                    except Exception as error:  # of a channel: the others' news must not go with it
                        mistakes.append(("telling ranks to forget engine memory", error))
                    job.memory = None
        return jobs

    # --- with no lock held ------------------------------------------------------------------------------------------

    def _deliver(self, news: _News) -> None:
        """Send and tell what came of a turn, and what comes of it where a rank does not take its plans."""
        while not self._deliver_once(news):
            with self.lock:
                following = self._collect()
            news = following  # what was delivered dies with no lock held

    def _deliver_once(self, news: _News) -> bool:
        """Whether every rank took its plans."""
        for what, error in news.mistakes:
            log.error("%s failed; a job that waits for it, if any, is refused", what, exc_info=error)
        try:
            return self._send(news.plans)
        finally:
            for event in news.arrived:
                event.set()
            tell(news.jobs)

    def _send(self, plans: Sequence[Plan]) -> bool:
        """Each rank gets its plans, whatever becomes of another; whether all took them.

        Where Ctrl-C strikes nobody knows what the rank has begun, so its plans are left to it.
        """
        interrupt, all_taken = None, True
        for rank, channel in enumerate(self.channels):
            mine = [plan for plan in plans if plan.rank == rank]
            try:
                if mine:
                    all_taken &= self._send_to(channel, mine)
            except BaseException as error:
                interrupt = error
        for plan in plans if self._cancelled else ():
            if plan.plan_id in self._cancelled:  # before there was anything to be cancelled
                self.channels[plan.rank].cancel(plan.plan_id)
        if interrupt is not None:
            raise interrupt
        return all_taken

    def _send_to(self, channel: Channel, plans: Sequence[Plan]) -> bool:
        """One rank gets its plans, or takes none of them: then whoever waits for those is refused."""
        try:
            channel.send(plans)
        except Exception:
            log.exception("rank %d did not take %d plans; whoever waits is refused", plans[0].rank, len(plans))
            with self.lock:
                self.planner.disown(plans)
            return False
        return True

    def _cancel(self, job: AnyJob) -> None:
        self._check_here()

        def plans() -> list[int]:
            plan_ids = [] if job.ticket.finished else job.ticket.plan_ids
            self._cancelled.update(plan_ids)
            return list(plan_ids)

        for plan_id in self.decide(plans):
            for channel in self.channels:
                channel.cancel(plan_id)
