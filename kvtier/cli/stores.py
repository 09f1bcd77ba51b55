"""Reading what lies in a cache directory, beside or without the process that uses it. Nothing is changed or locked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from kvtier.codecs.record import RecordHeader, check_payload
from kvtier.core.plan import PAGE_BYTES, Lineage, Table
from kvtier.errors import ConfigError, CorruptBlockError
from kvtier.models import KVGroup, KVLayout, Part, Reuse
from kvtier.runtime.seam import Files
from kvtier.tiers.disk.directory import LAYOUT, LOCK, placements, read_superblocks, read_text, segment_numbers
from kvtier.tiers.disk.format import ENTRY, FORMAT_MAJOR, Superblock, new_pages
from kvtier.tiers.disk.recovery import Found, SegmentReader

Progress: TypeAlias = Callable[[int, int], None]
"""Told after every segment file how many bytes were read so far, and how many there are."""


@dataclass(slots=True)
class GroupReport:
    """One group of the layout. A block that was written twice is two records."""

    name: str
    records: int
    blocks: int
    record_bytes: int


@dataclass(slots=True)
class StoreReport:
    """What the directory of one placement holds. ``problem``: why no more could be said, else empty."""

    path: str
    problem: str = ""
    format: str = ""
    created_s: float = 0.0
    lives: int = 0
    last_opened_by: str = ""
    block_tokens: int = 0
    ranks: tuple[int, int, int, int] = (0, 1, 0, 1)
    segments: int = 0
    sealed: int = 0
    open: int = 0
    unreadable: int = 0
    unreadable_pages: int = 0
    file_bytes: int = 0
    records: int = 0
    record_bytes: int = 0
    approximate: int = 0
    damaged: int = 0
    groups: list[GroupReport] = field(default_factory=list)


def find_stores(files: Files, directory: str) -> list[str]:
    """The placement directories in ``directory``, or itself where it is one.

    Raises:
        ConfigError: it is no directory, or cannot be read.
    """
    path = directory.rstrip("/") or "/"
    try:
        if LAYOUT in files.list_directory(path):
            return [path]
        return [f"{path}/{name}" for name in placements(files, path)]
    except OSError as error:
        raise ConfigError(f"{directory}: cannot read the directory: {error.strerror or error}") from error


def read_store(files: Files, path: str, *, verify: bool, progress: Progress) -> StoreReport:
    """Read one placement directory. ``verify`` checks the payload of every record, also where a footer lists it."""
    report = StoreReport(path)
    try:
        segments = _segment_files(files, path)
        report.segments, report.file_bytes = len(segments), sum(nbytes for _, nbytes in segments.values())
        layout, store = _identity(files, report)
    except (OSError, CorruptBlockError) as error:
        report.problem = str(error)
        return report
    reader = _StoreReader(files, SegmentReader(files, store, layout), report, verify=verify)
    tables, done = [np.empty(0, ENTRY)], 0
    for number, (name, nbytes) in segments.items():
        tables.append(reader.read(name, number))
        done += nbytes
        progress(done, report.file_bytes)
    _count(report, layout, np.concatenate(tables))
    return report


class _StoreReader:
    """Reads segment after segment, and counts what it meets."""

    def __init__(self, files: Files, reader: SegmentReader, report: StoreReport, *, verify: bool) -> None:
        self._files = files
        self._reader = reader
        self._report = report
        self._verify = verify

    def read(self, name: str, number: int) -> Table:
        """The records of one segment, dtype ``ENTRY``: none where it cannot be read."""
        try:
            fd = self._files.open(name, writable=False)
        except OSError:
            self._report.unreadable += 1
            return np.empty(0, ENTRY)
        try:
            found = self._reader.read(fd, number)
            self._classify(found)
            return self._verified(fd, found) if self._verify and found.footed else found.entries
        except OSError:
            self._report.unreadable += 1
            return np.empty(0, ENTRY)
        finally:
            self._files.close(fd)

    def _classify(self, found: Found) -> None:
        self._report.damaged += found.damaged
        self._report.unreadable_pages += len(found.unreadable)
        if found.header is None:
            self._report.unreadable += 1
        elif found.sealed:
            self._report.sealed += 1
        else:
            self._report.open += 1

    def _verified(self, fd: int, found: Found) -> Table:
        whole = np.array([self._is_whole(fd, entry) for entry in found.entries], np.bool_)
        self._report.damaged += int(len(whole) - whole.sum())
        return found.entries[whole]

    def _is_whole(self, fd: int, entry: np.void) -> bool:
        image = new_pages(int(entry["pages"]))
        try:
            if self._files.read_at(fd, int(entry["page"]) * PAGE_BYTES, image) < image.nbytes:
                return False
            header = RecordHeader.unpack(image[:PAGE_BYTES])
            check_payload(header, image)
        except (CorruptBlockError, OSError):
            return False
        place = (header.segment, header.page, header.generation, header.key)
        return place == (entry["segment"], entry["page"], entry["generation"], entry["key"].tobytes())


def _segment_files(files: Files, path: str) -> dict[int, tuple[str, int]]:
    """By number, the path and the bytes of every segment file in ``path``."""
    names = {number: f"{path}/seg-{number:06d}.kvs" for number in segment_numbers(files, path)}
    return {number: (name, _size_of(files, name)) for number, name in names.items()}


def _size_of(files: Files, name: str) -> int:
    """Bytes of a file; 0 of one that cannot be opened, which is counted once it is to be read."""
    try:
        fd = files.open(name, writable=False)
    except OSError:
        return 0
    try:
        return files.size(fd)
    finally:
        files.close(fd)


def _identity(files: Files, report: StoreReport) -> tuple[KVLayout, Superblock]:
    report.last_opened_by = read_text(files, f"{report.path}/{LOCK}").strip()
    store = read_superblocks(files, report.path)
    if store is None:
        raise CorruptBlockError("no readable superblock")
    report.format, report.created_s, report.lives = f"{store.major}.{store.minor}", store.created_s, store.sequence
    if store.major != FORMAT_MAJOR:
        raise CorruptBlockError(f"format {report.format}; this version of kvtier reads {FORMAT_MAJOR}")
    layout = _layout_of(read_text(files, f"{report.path}/{LAYOUT}"))
    if layout is None or layout.placement != store.placement.hex():
        raise CorruptBlockError(f"{LAYOUT} is missing, damaged or of another placement")
    report.block_tokens = layout.block_tokens
    report.ranks = (layout.tp_rank, layout.tp_size, layout.pp_rank, layout.pp_size)
    return layout, store


def _layout_of(text: str) -> KVLayout | None:
    """The layout that ``KVLayout.describe`` wrote down; None for anything else."""
    try:
        values = json.loads(text)
        groups = tuple(
            KVGroup(
                group["name"],
                tuple(
                    Part(layer, kind, dtype, tuple(axes), tuple(shape), *more)
                    for layer, kind, dtype, axes, shape, *more in group["parts"]
                ),
                Reuse(*group["reuse"]),
            )
            for group in values["groups"]
        )
        return KVLayout(values["block_tokens"], values["page_tokens"], groups, *values["ranks"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _count(report: StoreReport, layout: KVLayout, entries: Table) -> None:
    pages = entries["pages"].astype(np.int64)
    report.records, report.record_bytes = len(entries), int(pages.sum()) * PAGE_BYTES
    report.approximate = int((entries["lineage"] == Lineage.APPROXIMATE).sum())
    for number, group in enumerate(layout.groups):
        own = entries["group"] == number
        keys = np.ascontiguousarray(entries["key"][own]).view("V32")
        report.groups.append(
            GroupReport(group.name, int(own.sum()), len(set(keys.ravel().tolist())), int(pages[own].sum()) * PAGE_BYTES)
        )
