"""docs/format.md says what the code does: every offset in its tables is found again in bytes that the code wrote."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from kvtier.codecs.record import RecordHeader, Slice
from kvtier.tiers.disk.format import ENTRY, SegmentHeader, SegmentState, Superblock, pack_footer

TEXT = (Path(__file__).parents[3] / "docs" / "format.md").read_text()


def rows(heading: str, table: int = 0) -> dict[str, tuple[int, str]]:
    """Of the ``table``-th offset table under a heading: field (its first words) -> offset, type."""
    section = re.split(rf"^#+ {heading}$", TEXT, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    found = re.split(r"^\| offset[^\n]*\n\|[-|]*\n", section, flags=re.MULTILINE)[1 + table].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]
    return {re.split(r"[:,;]| of | where ", field)[0].strip("`"): (int(at), kind) for at, kind, field in cells}


def value(page: np.ndarray, at: int, kind: str) -> object:
    if match := re.match(r"(\d+) bytes", kind):
        return page[at : at + int(match[1])].tobytes()
    code = {
        "u8": "u1",
        "u16": "<u2",
        "u32": "<u4",
        "u64": "<u8",
        "i32": "<i4",
        "i64": "<i8",
        "f32": "<f4",
        "f64": "<f8",
    }
    dtype = np.dtype(code[kind.split(",", 1)[0]])
    return page[at : at + dtype.itemsize].view(dtype)[0]


def read(page: np.ndarray, table: dict[str, tuple[int, str]], field: str) -> object:
    return value(page, *table[field])


def test_superblock() -> None:
    page = Superblock(7, 1.5e9, b"u" * 16, b"n" * 16, b"p" * 32, 1, 2, 4, 8, 9).pack()
    table = rows("Superblock")
    expected = {
        "KVTSUPER": b"KVTSUPER", "format major": 8, "format minor": 9, "compatible features": 1,
        "read-only features": 2, "incompatible features": 4, "sequence": 7, "created": 1.5e9,
        "uuid": b"u" * 16, "nonce": b"n" * 16,
        "placement": b"p" * 32,
    }  # fmt: skip
    assert {field: read(page, table, field) for field in expected} == expected
    assert set(table) == {*expected, "page checksum"}


def test_segment_header() -> None:
    page = SegmentHeader(SegmentState.SEALED, 3, 500, 1 << 41, b"u" * 16, b"n" * 16, b"p" * 32).pack()
    table = rows("Segment header")
    expected = {
        "KVTSEG01": b"KVTSEG01", "format major": 1, "state": 2, "segment": 3, "pages": 500, "generation": 1 << 41,
        "uuid": b"u" * 16, "nonce": b"n" * 16, "placement": b"p" * 32,
    }  # fmt: skip
    assert {field: read(page, table, field) for field in expected} == expected
    assert set(table) == {*expected, "page checksum"}


def test_footer() -> None:
    entries = np.zeros(3, ENTRY)
    tail = pack_footer(entries, segment=3, generation=1 << 41, nonce=b"n" * 16)[-4096:]
    table = rows("Footer", 1)
    expected = {
        "KVTFOOT1": b"KVTFOOT1", "format major": 1, "bytes": 104, "segment": 3, "number": 3, "generation": 1 << 41,
        "nonce": b"n" * 16,
    }  # fmt: skip
    assert {field: read(tail, table, field) for field in expected} == expected
    assert set(table) == {*expected, "checksum", "page checksum"}


def test_footer_entry() -> None:
    table = rows("Footer")
    table["unused"] = table.pop("0")
    fields = ENTRY.fields
    assert fields is not None
    assert {name: at for name, (at, _) in table.items()} == {name: spec[1] for name, spec in fields.items()}


def test_record_header() -> None:
    page = np.empty(4096, np.uint8)
    piece = Slice(4096, 9000, b"c" * 16, b"s" * 16)
    RecordHeader(
        b"k" * 32, b"q" * 32, b"p" * 32, 2, 7, 64, 1, 0.5, "raw+lz4", (piece, piece), b"n" * 16, 3, 1 << 41, 11, 1 << 42
    ).pack_into(page)
    table = rows("Record")
    expected = {
        "KVTREC01": b"KVTREC01", "format": 1, "pages": 3, "number": 2, "key": b"k" * 32, "parent": b"q" * 32,
        "placement": b"p" * 32, "group": 2, "lineage": 1, "depth": 7, "tokens": 64, "relative error": 0.5,
        "codec chain": b"raw+lz4".ljust(32, b"\0"), "nonce": b"n" * 16, "segment": 3, "page": 11,
        "generation": 1 << 41, "sequence": 1 << 42,
    }  # fmt: skip
    assert {field: read(page, table, field) for field in expected} == expected
    at, kind = table["slices"]
    assert kind == "40 bytes each"
    assert page[at : at + 40].tobytes() == np.array([4096, 9000], "<u4").tobytes() + b"c" * 16 + b"s" * 16


@pytest.mark.parametrize("heading", ["Superblock", "Segment header", "Record"])
def test_fields_do_not_overlap(heading: str) -> None:
    spans = sorted(at for at, _ in rows(heading).values())
    assert len(spans) == len(set(spans))
