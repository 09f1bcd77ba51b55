"""One rank in a process of its own: a data plane, its arena, its directory and its engine memory, driven over pipes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from multiprocessing.connection import Connection
from typing import Any

from kvtier.config import load_config
from kvtier.core import wire
from kvtier.core.keys import Keys
from kvtier.core.memory import KVMemory
from kvtier.core.plan import Farewell, Message, Plan
from kvtier.metrics import Sample
from kvtier.runtime import system_machine
from kvtier.testing.contents import PseudoEngine, tiny_layout
from kvtier.transfer import DataPlane

PAGES = 16


def rank_layout(rank: int) -> Any:
    return replace(tiny_layout(), tp_rank=rank, tp_size=2)


def rank_keys(keys: Keys, rank: int) -> Keys:
    """Each rank holds its own share of the heads, so each has its own contents under the same keys."""
    mine = Keys(keys.root, keys.block_tokens)
    mine.digests = [sha256(key + bytes([rank])).digest() for key in keys.digests]
    return mine


def run(rank: int, settings: dict[str, Any], plans: Connection, commands: Connection, incarnation: int) -> None:
    """Serve plans (as bytes) on one pipe and the test's own wishes on the other, until told to stop."""
    news = threading.Event()
    plane = DataPlane(
        load_config(settings), rank_layout(rank), system_machine(), rank=rank, incarnation=incarnation, on_news=news.set
    )
    engine = PseudoEngine(rank_layout(rank), PAGES)
    assert plane.register(engine.memory) == 0
    threads = [
        threading.Thread(target=_send_news, args=(plane, plans, news), daemon=True),
        threading.Thread(target=_take_plans, args=(plane, plans), daemon=True),
    ]
    news.set()
    for thread in threads:
        thread.start()
    while (command := commands.recv())[0] != "stop":
        if command[0] == "write":
            engine.write(rank_keys(command[1], rank), command[2])
        elif command[0] == "wipe":
            engine.wipe()
        commands.send(engine.wrong_blocks(rank_keys(command[1], rank), command[2]) if command[0] == "wrong" else None)
    commands.send(plane.close(10))


def _send_news(plane: DataPlane, plans: Connection, news: threading.Event) -> None:
    while news.wait():
        news.clear()
        for message in plane.poll():
            plans.send_bytes(wire.encode(message))


def _take_plans(plane: DataPlane, plans: Connection) -> None:
    while True:
        try:
            data = plans.recv_bytes()
        except EOFError:
            return
        plan = wire.decode(data)
        assert isinstance(plan, Plan)
        plane.submit([plan])


class PipeChannel:
    """The control side of the pipe: everything that crosses is bytes. It says when the process behind it is gone."""

    def __init__(self, plans: Connection) -> None:
        self.plans = plans
        self.sent_bytes = 0
        self._inbox: list[Message] = []
        self._lock = threading.Lock()
        self.on_news: Any = None

    def listen(self, on_news: Any) -> None:
        self.on_news = on_news
        threading.Thread(target=self._receive, args=(self.plans,), daemon=True).start()

    def connect(self, plans: Connection) -> None:
        """There is another process."""
        self.plans = plans
        self.listen(self.on_news)

    def _receive(self, plans: Connection) -> None:
        incarnation = -1
        while True:
            try:
                message = wire.decode(plans.recv_bytes())
            except (EOFError, OSError):
                break
            assert not isinstance(message, Plan)
            rank, incarnation = message.rank, message.incarnation
            self._tell(message)
        if incarnation >= 0:
            self._tell(Farewell(rank, incarnation))

    def _tell(self, message: Message) -> None:
        with self._lock:
            self._inbox.append(message)
        self.on_news()

    def send(self, plans: Sequence[Plan]) -> None:
        for plan in plans:
            data = wire.encode(plan)
            self.sent_bytes += len(data)
            with suppress(BrokenPipeError):  # the farewell says the rest
                self.plans.send_bytes(data)

    def call_back(self) -> bool:
        return False

    def cancel(self, plan_id: int) -> None:
        raise AssertionError("not used here")

    def poll(self) -> list[Message]:
        with self._lock:
            inbox, self._inbox = self._inbox, []
        return inbox

    def register(self, memory: KVMemory) -> int:
        raise AssertionError("each rank registers its own memory")

    def unregister(self, memory_id: int) -> None:
        raise AssertionError("each rank registers its own memory")

    def samples(self) -> list[Sample]:
        return []

    def close(self, timeout_s: float) -> bool:
        return True
