from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.codecs.headers import Pages, Places, RawHeaders, identities, stamp, whole
from kvtier.codecs.record import RecordHeader, raw_slice, restamp
from kvtier.core.plan import PAGE_BYTES, ROW
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.models.layout import MAX_BLOCK_TOKENS, MAX_GROUPS, MAX_SLICE_BYTES
from kvtier.models.layout import KVLayout as Layout

NONCE = bytes(range(16))


def _layout(layers: int = 3, heads: int = 64) -> Layout:
    """Two groups; slices of at least 256 KiB, so that large layers give several of them."""
    axes = ("token", "head", "dim")
    parts = tuple(Part(layer, kind, "float32", axes, (16, heads, 64)) for layer in range(layers) for kind in ("k", "v"))
    tail = tuple(replace(part, layer=part.layer + layers, shape=(16, 1, 4)) for part in parts)
    return KVLayout(16, 16, (KVGroup("large", parts), KVGroup("small", tail)))


LAYOUT = _layout()


def _rows(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows = np.zeros(count, ROW)
    for name in ("key", "parent"):
        rows[name] = random.integers(0, 256, (count, 32))
    rows["depth"] = random.integers(0, 1 << 20, count)
    rows["tokens"] = random.integers(1, 1 << 20, count)
    rows["lineage"] = random.integers(0, 2, count)
    return rows


def _contents(group: int, count: int, seed: int = 0) -> list[list[np.ndarray]]:
    random = np.random.default_rng(seed)
    return [[random.integers(0, 256, span.nbytes, np.uint8) for span in LAYOUT.slices[group]] for _ in range(count)]


def _made(group: int, rows: np.ndarray, seed: int = 0) -> np.ndarray:
    contents = _contents(group, len(rows), seed)
    sums = [b"".join(raw_slice(slice_).content_sum for slice_ in block) for block in contents]
    pages = np.full((len(rows), PAGE_BYTES), 0xAA, np.uint8)
    RawHeaders(LAYOUT, group).write(_all(pages), rows, np.array([list(one) for one in sums], np.uint8))
    return pages


def _all(pages: np.ndarray) -> Pages:
    return Pages(pages, np.arange(len(pages)))


def _known(headers: RawHeaders, pages: np.ndarray, keys: np.ndarray, places: Places | None) -> np.ndarray:
    return headers.read(_all(pages), keys, places).good


def _places(rows: np.ndarray) -> Places:
    count = np.arange(len(rows))
    return Places(NONCE, 5 + count, 100 + 7 * count, (3 << 40) + count)


def _stamped(pages: np.ndarray, places: Places) -> np.ndarray:
    for at, page in enumerate(pages):
        restamp(
            page, nonce=NONCE, segment=int(places.segment[at]), generation=int(places.generation[at]),
            page_number=int(places.page[at]), sequence=at,
        )  # fmt: skip
    return pages


@given(st.integers(0, 1), st.integers(1, 5), st.integers(0, 99))
def test_a_page_is_the_one_that_a_record_header_packs(group, count, seed):
    rows = _rows(count, seed)
    for row, block, page in zip(rows, _contents(group, count, seed), _made(group, rows, seed), strict=True):
        want = np.full(PAGE_BYTES, 0xAA, np.uint8)
        RecordHeader(
            key=row["key"].tobytes(), parent=row["parent"].tobytes(), placement=bytes.fromhex(LAYOUT.placement),
            group=group, depth=int(row["depth"]), tokens=int(row["tokens"]), lineage=int(row["lineage"]), error=0.0,
            chain="raw", slices=tuple(raw_slice(slice_) for slice_ in block),
        ).pack_into(want)  # fmt: skip
        assert page.tobytes() == want.tobytes()


def test_a_header_has_room_for_the_largest_block_and_the_last_group_that_a_layout_may_have():
    part = Part(0, "k", "uint8", ("token", "dim"), (1, MAX_SLICE_BYTES // 3))
    layout = KVLayout(3, 1, (KVGroup("many", (part,)),) * MAX_GROUPS)
    assert layout.block_bytes[-1] == MAX_SLICE_BYTES
    rows, page = _rows(1), np.zeros((1, PAGE_BYTES), np.uint8)
    rows["tokens"] = MAX_BLOCK_TOKENS
    RawHeaders(layout, MAX_GROUPS - 1).write(_all(page), rows, np.zeros((1, 16), np.uint8))
    header = RecordHeader.unpack(page[0])
    assert header.group == MAX_GROUPS - 1
    assert header.slices[0].content_bytes == MAX_SLICE_BYTES
    assert header.tokens == MAX_BLOCK_TOKENS


@pytest.mark.parametrize("group", [0, 1])
def test_what_was_made_is_known_again_in_memory_and_on_disk(group):
    rows = _rows(4)
    headers, pages, places = RawHeaders(LAYOUT, group), _made(group, rows), _places(rows)
    assert _known(headers, pages, rows["key"], None).all()
    assert not _known(headers, pages, rows["key"], places).any()
    assert _known(headers, _stamped(pages, places), rows["key"], places).all()


@pytest.mark.parametrize("group", [0, 1])
def test_the_sums_of_the_slices_come_back(group):
    sums = RawHeaders(LAYOUT, group).read(_all(_made(group, _rows(2))), _rows(2)["key"], None).sums
    for row, block in zip(sums, _contents(group, 2), strict=True):
        assert row.tobytes() == b"".join(raw_slice(slice_).content_sum for slice_ in block)


@given(st.integers(0, PAGE_BYTES - 1), st.integers(1, 255), st.integers(0, 2))
def test_a_flipped_bit_anywhere_makes_a_page_unknown_and_leaves_its_neighbours(at, flip, victim):
    rows = _rows(3)
    pages, places = _made(0, rows), _places(rows)
    _stamped(pages, places)[victim, at] ^= flip
    known = _known(RawHeaders(LAYOUT, 0), pages, rows["key"], places)
    assert known.tolist() == [number != victim for number in range(3)]


def test_a_whole_page_of_another_key_group_layout_or_place_is_unknown():
    rows, other = _rows(2), _rows(2, seed=1)
    headers, places = RawHeaders(LAYOUT, 0), _places(rows)
    pages = _stamped(_made(0, rows), places)
    assert not _known(headers, pages, other["key"], places).any()
    assert not _known(RawHeaders(LAYOUT, 1), pages, rows["key"], places).any()
    assert not _known(RawHeaders(_layout(heads=32), 0), pages, rows["key"], places).any()
    for changed in (
        places._replace(nonce=bytes(16)),
        places._replace(segment=places.segment + 1),
        places._replace(page=places.page + 1),
        places._replace(generation=places.generation + 1),
    ):
        assert not _known(headers, pages, rows["key"], changed).any()


def test_only_the_rows_that_are_named_are_written_and_read():
    rows, table = _rows(2), np.full((7, PAGE_BYTES), 0xAA, np.uint8)
    headers, pages = RawHeaders(LAYOUT, 1), Pages(table, np.array([5, 2]))
    headers.write(pages, rows, np.zeros((2, 16), np.uint8))
    assert np.array_equal(table[[5, 2]], _made_with_sums(rows))
    assert (table[[0, 1, 3, 4, 6]] == 0xAA).all()
    assert headers.read(pages, rows["key"], None).good.all()
    assert not headers.read(pages._replace(rows=np.array([2, 5])), rows["key"], None).good.any()


def _made_with_sums(rows: np.ndarray) -> np.ndarray:
    pages = np.zeros((len(rows), PAGE_BYTES), np.uint8)
    RawHeaders(LAYOUT, 1).write(_all(pages), rows, np.zeros((len(rows), 16), np.uint8))
    return pages


@given(st.integers(0, 1), st.integers(1, 5), st.integers(0, 99))
def test_pages_stamped_at_once_are_those_that_are_stamped_one_by_one(group, count, seed):
    rows = _rows(count, seed)
    pages, places = _made(group, rows, seed), _places(rows)
    wanted = _stamped(pages.copy(), places)
    stamp(_all(pages), places, np.arange(count))
    assert np.array_equal(pages, wanted)
    assert whole(_all(pages)).all()


@given(st.integers(0, 2), st.integers(0, PAGE_BYTES - 1), st.integers(1, 255))
def test_any_damaged_byte_of_a_page_is_noticed_before_a_stamp_would_hide_it(at, byte, change):
    pages = _made(0, _rows(3))
    pages[at, byte] ^= change
    assert whole(_all(pages)).tolist() == [number != at for number in range(3)]


def test_a_page_without_a_header_is_none():
    assert not whole(_all(np.zeros((2, PAGE_BYTES), np.uint8))).any()


@given(st.integers(0, 1), st.permutations(range(4)))
def test_identities_are_those_of_each_header(group, order):
    pages = _made(group, _rows(4))
    found = identities(Pages(pages, np.array(order)))
    for who, at in zip(found, order, strict=True):
        header = RecordHeader.unpack(pages[at])
        assert (who["key"].tobytes(), who["parent"].tobytes()) == (header.key, header.parent)
        assert (who["group"], who["lineage"], who["depth"], who["tokens"]) == (
            header.group, header.lineage, header.depth, header.tokens,
        )  # fmt: skip
