"""A disk tier with small records, and by hand what lanes and control do around it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from kvtier.codecs.record import RecordHeader, check_payload, raw_slice, restamp, zero_padding
from kvtier.core.plan import PAGE_BYTES
from kvtier.errors import CorruptBlockError
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.runtime.seam import Buffer, Files, Runtime
from kvtier.tiers.disk import DiskTier, Place
from kvtier.tiers.disk.directory import read_superblocks
from kvtier.tiers.disk.format import new_pages
from kvtier.tiers.disk.geometry import pages_with
from kvtier.tiers.disk.traffic import QUIET_S

RECORDS = 8
SEGMENTS = 4


def layout(payload_bytes: int = 8192, **changes: int) -> KVLayout:
    """One group whose records have ``payload_bytes``."""
    part = Part(0, "kv", "uint8", ("token", "dim"), (16, payload_bytes // 16))
    return KVLayout(16, 16, (KVGroup("attention", (part,)),), **changes)


LAYOUT = layout()
RECORD_PAGES = LAYOUT.record_pages[0]
SEGMENT_PAGES = pages_with(RECORDS, RECORD_PAGES)
SEGMENT_BYTES = SEGMENT_PAGES * PAGE_BYTES


def key(number: int) -> bytes:
    """The key of block ``number``."""
    return sha256(f"block {number}".encode()).digest()


def payload(number: int, of: KVLayout = LAYOUT) -> Buffer:
    """The bytes of block ``number``: they say themselves whose they are."""
    return np.random.default_rng(number).integers(0, 256, of.block_bytes[0], np.uint8)


def record(number: int, of: KVLayout = LAYOUT, lineage: int = 0, content: Buffer | None = None) -> Buffer:
    """Block ``number`` as it lies in host memory, with its own content or another."""
    content = payload(number, of) if content is None else content
    header = RecordHeader(
        key(number), key(number - 1), bytes.fromhex(of.placement), 0, number, 16, lineage, 0.0, "raw",
        (raw_slice(content),),
    )  # fmt: skip
    image = new_pages(header.pages)
    header.pack_into(image[:PAGE_BYTES])
    image[PAGE_BYTES : PAGE_BYTES + content.nbytes] = content
    zero_padding(header, image)
    return image


class Workbench:
    """One tier, opened; ``rows`` is what it recovered, by block number."""

    def __init__(
        self, files: Files, runtime: Runtime, directory: str, *, of: KVLayout = LAYOUT, segments: int = SEGMENTS,
        segment_bytes: int | None = SEGMENT_BYTES, clean_segments: int | None = 1, owner: str = "tester",
    ) -> None:  # fmt: skip
        self.files = files
        self.runtime = runtime
        self.directory = directory
        self.layout = of
        self.tier = DiskTier(
            files, runtime, directory=directory, layout=of, capacity_bytes=segments * (segment_bytes or SEGMENT_BYTES),
            segment_bytes=segment_bytes, clean_segments=clean_segments, owner=owner,
        )  # fmt: skip
        self.rows: list[np.void] = []

    def open(self) -> Workbench:
        for table in self.tier.open():
            self.rows.extend(table)
        self.keep_house()
        return self

    def keep_house(self, steps: int = 10_000) -> int:
        """Let nobody use the tier for a while, and run housekeeping until there is nothing to do; how many steps."""
        self.pause(2 * QUIET_S)
        for step in range(steps):
            if not self.tier.housekeep():
                return step
        raise AssertionError("housekeeping does not come to an end")

    def pause(self, seconds: float) -> None:
        """Let time pass: every clock that tests use can be moved."""
        self.runtime.clock.now_s += seconds  # type: ignore[attr-defined]

    def image_for(self, number: int, place: Place, lineage: int = 0, content: Buffer | None = None) -> Buffer:
        """Block ``number`` as it belongs at ``place``."""
        image = record(number, self.layout, lineage, content)
        restamp(
            image[:PAGE_BYTES], nonce=self.tier.nonce, segment=place.segment, generation=place.generation,
            page_number=place.page, sequence=place.sequence,
        )  # fmt: skip
        return image

    def put(self, number: int, lineage: int = 0) -> Place:
        """Write block ``number``; a clean segment must be there."""
        place = self.tier.place(self.layout.record_pages[0])
        assert place is not None, "no clean segment"
        return self.write(number, place, lineage)

    def write(self, number: int, place: Place, lineage: int = 0) -> Place:
        """Write block ``number`` to ``place``."""
        image = self.image_for(number, place, lineage)
        self.files.write_at(place.fd, place.page * PAGE_BYTES, image)
        self.tier.written(place, image[:PAGE_BYTES])
        return place

    def fill(self, numbers: Iterable[int]) -> list[Place]:
        """Write blocks one after the other, with housekeeping between them."""
        places = []
        for number in numbers:
            places.append(self.put(number))
            self.keep_house()
        return places

    def sync(self) -> bool:
        """Make all that is written durable, as a lane does; False when that failed."""
        good = True
        for target in self.tier.unsynced():
            if target.fd < 0:
                good = False
                continue
            assert self.tier.begin_sync(target)
            error = None
            try:
                self.files.sync(target.fd)
            except OSError as failure:
                error, good = failure, False
            self.tier.synced(target, error)
        return good

    def read(self, number: int, place: Place | np.void) -> bool:
        """Whether block ``number`` is whole at ``place`` (or at the place in a recovered row)."""
        at = {
            name: int(place[name] if isinstance(place, np.void) else getattr(place, name))
            for name in ("segment", "generation", "page", "pages")
        }
        fd = self.tier.locate(at["segment"], at["generation"])
        if fd is None:
            return False
        image = new_pages(at["pages"])
        if self.files.read_at(fd, at["page"] * PAGE_BYTES, image) < image.nbytes:
            return False
        try:
            header = RecordHeader.unpack(image[:PAGE_BYTES])
            check_payload(header, image)
        except CorruptBlockError:
            return False
        own = header.matches(
            key=key(number), group=0, placement=self.tier.placement, nonce=self.tier.nonce, segment=at["segment"],
            generation=at["generation"], page=at["page"],
        )  # fmt: skip
        return own and np.array_equal(image[PAGE_BYTES:][: self.layout.block_bytes[0]], payload(number, self.layout))

    def recovered(self) -> dict[int, np.void]:
        """The recovered rows by block number; the younger where there are two."""
        found: dict[int, np.void] = {}
        for row in self.rows:
            number = int(row["depth"])
            assert row["key"].tobytes() == key(number), "a foreign key"
            assert row["parent"].tobytes() == key(number - 1)
            assert (row["group"], row["tokens"], row["pages"]) == (0, 16, self.layout.record_pages[0])
            if number not in found or found[number]["sequence"] < row["sequence"]:
                found[number] = row
        return found

    def segment_path(self, number: int) -> str:
        return f"{self.tier.path}/seg-{number:06d}.kvs"


def rewrite_superblocks(bench: Workbench, **changes: int | bytes) -> None:
    """Change both superblocks from outside, as another version or an earlier copy would have them."""
    found = read_superblocks(bench.files, bench.tier.path)
    assert found is not None
    page = replace(found, **changes).pack()
    for name in ("superblock.a", "superblock.b"):
        (Path(bench.tier.path) / name).write_bytes(page.tobytes())


class FaultyFiles:
    """Files of which single calls fail: ``fail(operation, error, after)``, once or for good."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._faults: dict[str, tuple[int, int, bool]] = {}
        self.calls: list[str] = []
        self.fired = False

    def fail(self, operation: str, code: int, *, after: int = 0, sticky: bool = False) -> None:
        self._faults[operation] = (code, after, sticky)

    def heal(self) -> None:
        self._faults.clear()

    def __getattr__(self, name: str) -> object:
        call = getattr(self._files, name)

        def faulty(*args: object, **kwargs: object) -> object:
            self.calls.append(name)
            if name in self._faults:
                code, after, sticky = self._faults[name]
                if after > 0:
                    self._faults[name] = (code, after - 1, sticky)
                else:
                    self.fired = True
                    if not sticky:
                        del self._faults[name]
                    raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return faulty
