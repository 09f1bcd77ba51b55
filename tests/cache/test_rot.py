"""What lies on disk changes under an open cache: it is a miss, the copy is forgotten, and nothing wrong comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier import TieredCache
from kvtier.codecs.record import RecordHeader, restamp
from kvtier.core.plan import PAGE_BYTES
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout(dim=64)  # a payload of a whole page, so that every byte of it counts
SIZE, PAGES = LAYOUT.block_tokens, LAYOUT.record_pages[0]
BLOCKS = 4
TOKENS = list(range(BLOCKS * SIZE + 1))
DAMAGED = 2
"""The block that is changed."""


class OnDisk:
    """A cache whose blocks are on disk and nowhere else, and the file that they are in."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.config = {
            "host": {"capacity": "1MiB", "staging": "1MiB"},
            "disk": {"directories": [str(directory)], "capacity": "8MiB", "segment": "1MiB"},
        } | settings
        self.engine = PseudoEngine(LAYOUT, BLOCKS)
        with self.open() as cache:
            keys = cache.keys(TOKENS)
            self.engine.write(keys, range(BLOCKS))
            assert cache.submit_store(keys, self.engine.pages, durability="process").result(30).stored == BLOCKS * SIZE
        self.key = keys.digests[DAMAGED]
        (self.path, self.offset) = next(self.records(directory))
        self.cache = self.open()
        self.cache.wait_attached(30)

    def open(self) -> TieredCache:
        return TieredCache(self.config, LAYOUT, "m")

    def records(self, directory: Path) -> Iterator[tuple[Path, int]]:
        """Where the record of the block lies."""
        for path in directory.glob("*/seg-*.kvs"):
            pages = np.fromfile(path, np.uint8).reshape(-1, PAGE_BYTES)
            for page in np.flatnonzero(np.all(pages[:, :4] == np.frombuffer(b"KVTR", np.uint8), axis=1)).tolist():
                if RecordHeader.unpack(pages[page]).key == self.key:
                    yield path, page * PAGE_BYTES

    def change(self, page: int, data: np.ndarray) -> None:
        """Overwrite that page of the record, past the caches of the file system."""
        with open(self.path, "r+b") as file:
            file.seek(self.offset + page * PAGE_BYTES)
            file.write(data.tobytes())
            file.flush()

    def page(self, page: int) -> np.ndarray:
        with open(self.path, "rb") as file:
            file.seek(self.offset + page * PAGE_BYTES)
            return np.frombuffer(file.read(PAGE_BYTES), np.uint8).copy()

    def loaded(self) -> tuple[int, dict[str, int]]:
        """Tokens that came back, each compared, and why others did not."""
        self.engine.wipe()
        with self.cache.lookup(TOKENS) as hit:
            assert hit.by_tier["disk"] == BLOCKS * SIZE
            result = self.cache.submit_load(hit, self.engine.pages).result(30)
            assert self.engine.wrong_blocks(hit.keys, range(result.ok_tokens // SIZE)) == []
        return result.ok_tokens, result.failed


STALE: dict[str, dict[str, Any]] = {
    "another store": {"nonce": b"another store..."},
    "another segment": {"segment": 77},
    "an earlier life of the segment": {"generation": 1},
    "another place": {"page_number": 5},
}


@pytest.mark.parametrize("codec", ["raw", "raw+lz4"])
@pytest.mark.parametrize("whose", STALE)
def test_a_record_of_another_place_or_life_is_a_miss_though_all_its_checksums_are_right(
    tmp_path: Path, whose: str, codec: str
) -> None:
    disk = {"directories": [str(tmp_path)], "capacity": "8MiB", "segment": "1MiB", "codec": codec}
    world = OnDisk(tmp_path, disk=disk)
    with world.cache:
        page = world.page(0)
        header = RecordHeader.unpack(page)
        place = {
            "nonce": header.nonce, "segment": header.segment, "generation": header.generation,
            "page_number": header.page, "sequence": header.sequence,
        }  # fmt: skip
        restamp(page, **(place | STALE[whose]))
        world.change(0, page)
        assert world.loaded() == (DAMAGED * SIZE, {"damaged": SIZE})


@pytest.mark.parametrize("verify_memory", [True, False])
def test_a_flipped_bit_is_a_miss_and_its_copy_is_forgotten(tmp_path: Path, verify_memory: bool) -> None:
    """``read.verify_memory`` is about host memory: what comes from a disk is always verified."""
    world = OnDisk(tmp_path, read={"verify_memory": verify_memory})
    with world.cache as cache:
        page = world.page(1)
        page[77] ^= 1
        world.change(1, page)
        assert world.loaded() == (DAMAGED * SIZE, {"damaged": SIZE})
        assert cache.match(TOKENS) == DAMAGED * SIZE
        stored = cache.submit_store(TOKENS, PseudoEngine(LAYOUT, BLOCKS).pages).result(30)
        assert stored.stored == SIZE, "it can be stored again"


def test_damage_that_is_found_at_opening_is_counted(tmp_path: Path) -> None:
    """Nobody looks such a block up in vain: its miss is counted here or nowhere."""
    world = OnDisk(tmp_path)
    assert world.cache.stats()["recovered_records{lane=disk-0}"] == BLOCKS
    assert world.cache.stats()["damaged_records{lane=disk-0}"] == 0
    assert world.cache.close(30)
    page = world.page(1)
    page[77] ^= 1
    world.change(1, page)
    with world.open() as cache:
        cache.wait_attached(30)
        assert cache.match(TOKENS) == DAMAGED * SIZE
        assert cache.stats()["recovered_records{lane=disk-0}"] == BLOCKS - 1
        assert cache.stats()["damaged_records{lane=disk-0}"] == 1


@pytest.mark.parametrize("codec", ["raw", "raw+lz4"])
@pytest.mark.parametrize("verify_memory", [True, False])
def test_a_header_that_changes_in_host_memory_is_not_written_and_all_else_goes_on(
    tmp_path: Path, codec: str, verify_memory: bool
) -> None:
    """Memory rots, too: of four blocks that are to be written together one is not what was stored."""
    config = {
        "host": {"capacity": "1MiB", "staging": "1MiB"},
        "disk": {"directories": [str(tmp_path)], "capacity": "8MiB", "segment": "1MiB", "codec": codec},
        "policy": {"write": "write_back"},
        "read": {"verify_memory": verify_memory},
    }
    engine = PseudoEngine(LAYOUT, BLOCKS)
    with TieredCache(config, LAYOUT, "m") as cache:
        keys = cache.keys(TOKENS)
        engine.write(keys, range(BLOCKS))
        assert cache.submit_store(keys, engine.pages).result(30).stored == BLOCKS * SIZE
        plane = cache._dispatch.channels[0]._plane  # type: ignore[attr-defined]
        pages = plane._equipment.host.data.reshape(-1, PAGE_BYTES)
        is_header = np.all(pages[:, :4] == np.frombuffer(b"KVTR", np.uint8), axis=1)
        (page,) = (
            at for at in np.flatnonzero(is_header) if RecordHeader.unpack(pages[at]).key == keys.digests[DAMAGED]
        )
        pages[page, 100] ^= 1
        assert cache.submit_flush("process").result(30).reason == "damaged"
        assert cache.match(TOKENS) == DAMAGED * SIZE, "its copy is forgotten"
        assert cache.submit_store(keys, engine.pages, durability="durable").result(30).stored == SIZE
        assert cache.close(30)
        assert cache.stats()["write_backlog_entries"] == cache.stats()["pinned_entries"] == 0
    with TieredCache(config, LAYOUT, "m") as cache, cache.lookup(TOKENS) as hit:
        engine.wipe()
        assert cache.submit_load(hit, engine.pages).result(30).ok_tokens == BLOCKS * SIZE
        assert engine.wrong_blocks(keys, range(BLOCKS)) == []
