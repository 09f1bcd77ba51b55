"""A process that forks while it has a cache open: what its child may do, and what is left to it."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtier import ClosedError, TieredCache
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
TOKENS = list(range(4 * SIZE + 1))


def settings(directory: Path) -> dict[str, Any]:
    disk = {"directories": [str(directory)], "capacity": "8MiB", "segment": "1MiB"}
    return {"host": {"capacity": "1MiB", "staging": "1MiB"}, "disk": disk}


def is_whole(cache: TieredCache) -> bool:
    """Whether all blocks are found, and exact."""
    engine = PseudoEngine(LAYOUT, 8)
    with cache.lookup(TOKENS) as hit:
        ok_tokens = cache.submit_load(hit, engine.pages).result(30).ok_tokens
        return ok_tokens == 4 * SIZE and not engine.wrong_blocks(hit.keys, range(4))


def answer_of(call: Callable[[], Any]) -> str:
    try:
        return repr(call())
    except ClosedError as error:
        return f"ClosedError: {error}"


class Family:
    """A parent with a cache, a hit and a job that has not ended, and what its child hears of them."""

    def __init__(self, directory: Path) -> None:
        self.config = settings(directory / "parent")
        self.cache = TieredCache(self.config, LAYOUT, "m")
        self.engine = PseudoEngine(LAYOUT, 8)
        keys = self.cache.keys(TOKENS)
        self.engine.write(keys, range(4))
        self.cache.submit_store(keys, self.engine.pages, durability="process").result(30)
        self.hit = self.cache.lookup(TOKENS)
        self.client = self.cache.client()
        self.job = self.cache.submit_store([5] * SIZE, self.engine.pages, client=self.client)
        self.own = settings(directory / "child")

    def verbs(self) -> dict[str, Callable[[], Any]]:
        cache, pages = self.cache, self.engine.pages
        return {
            "keys": lambda: cache.keys(TOKENS),
            "match": lambda: cache.match(self.hit.keys),
            "lookup": lambda: cache.lookup(self.hit.keys),
            "load": lambda: cache.submit_load(self.hit, pages),
            "store": lambda: cache.submit_store(self.hit.keys, pages),
            "store in a session": lambda: cache.submit_store(self.hit.keys, pages, session="s"),
            "prefetch": lambda: cache.submit_prefetch(self.hit.keys),
            "flush": lambda: cache.flush("process", 1),
            "register": lambda: cache.register(self.engine.memory),
            "unregister": lambda: cache.unregister(self.engine.memory),
            "session": lambda: cache.session("s"),
            "version": lambda: cache.set_weights_version("v"),
            "events": cache.take_events,
            "stats": cache.stats,
            "attached": lambda: cache.wait_attached(1),
            "cancel": self.job.cancel,
            "poll": self.client.poll,
        }

    def child(self) -> dict[str, Any]:
        answers = {name: answer_of(call) for name, call in self.verbs().items()}
        with self.cache:
            self.hit.release()
        with TieredCache(self.own, LAYOUT, "m") as cache:
            cache.submit_store(self.hit.keys, self.engine.pages, durability="process").result(30)
            return {"answers": answers, "closed": self.cache.close(), "own": is_whole(cache)}

    def parent(self) -> dict[str, Any]:
        """With a child that lives on: the parent still has everything, and the directory is its own to give back."""
        whole, ended, leases = is_whole(self.cache), self.job.result(30).stored, self.cache.stats()["leases"]
        polled = len(self.client.poll())
        self.hit.release()
        closed = self.cache.close()
        with TieredCache(self.config, LAYOUT, "m") as again:
            found = is_whole(again)
        return {
            "whole": whole, "ended": ended, "leases": leases, "polled": polled, "closed": closed, "found": found,
        }  # fmt: skip


def fork_while_held(lock: Any) -> int:
    """``os.fork`` while another thread holds ``lock``: in the child it is held for ever."""
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            forked.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = os.fork()
    if pid:
        forked.set()
        thread.join()
    return pid


def run(directory: Path) -> dict[str, Any]:
    family = Family(directory)
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    pid = fork_while_held(family.cache._lock)
    if not pid:
        os.close(to_child)
        try:
            os.write(to_parent, json.dumps(family.child()).encode())
            os.read(from_parent, 1)  # until the parent is through
        finally:
            os._exit(0)
    os.close(to_parent)
    child = os.read(from_child, 1 << 16)
    found = {"child": json.loads(child), "parent": family.parent()}
    os.close(to_child)
    os.waitpid(pid, 0)
    return found


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))
