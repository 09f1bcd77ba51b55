"""Raw, LZ4 and chains."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvtier.codecs.base import wins
from kvtier.codecs.chain import chain_names, chain_of
from kvtier.codecs.lz4 import UNIT_BYTES, Lz4
from kvtier.codecs.raw import Raw
from kvtier.errors import ConfigError, CorruptBlockError
from kvtier.models import KVGroup, KVLayout, Part
from kvtier.testing.contracts.codecs import ByteCodecContract, TensorCodecContract


class TestRaw(TensorCodecContract):
    codec = Raw()


class TestLz4(ByteCodecContract):
    codec = Lz4()

    def test_long_slices_are_cut_into_units(self) -> None:
        """Each unit decodes alone, so no call holds the GIL for longer than one unit."""
        raw = np.tile(np.arange(251, dtype=np.uint8), 5 * UNIT_BYTES // 251)
        stored = self.coded(raw)
        lengths, at = [], 0
        while at < stored.nbytes:
            lengths.append(int(stored[at : at + 4].view("<u4")[0]))
            at += 4 + lengths[-1]
        assert at == stored.nbytes
        assert len(lengths) == -(-raw.nbytes // UNIT_BYTES)

    def test_a_unit_length_beyond_the_end_is_damage(self) -> None:
        raw = np.zeros(100_000, np.uint8)
        stored = self.coded(raw)
        for length in (0, stored.nbytes - 3, 2**31, 2**32 - 1):
            stored[:4].view("<u4")[0] = length
            with pytest.raises(CorruptBlockError):
                self.codec.decode(stored, np.empty_like(raw))

    @given(
        runs=st.lists(st.tuples(arrays(np.uint8, st.integers(1, 64)), st.integers(1, 3000)), min_size=1, max_size=20)
    )
    def test_round_trips(self, runs: list[tuple[np.ndarray, int]]) -> None:
        raw = np.concatenate([np.tile(pattern, times) for pattern, times in runs])
        out = np.empty(raw.nbytes, np.uint8)
        size = self.codec.encode(raw, out)
        if size is not None:
            back = np.empty_like(raw)
            self.codec.decode(out[:size], back)
            assert wins(size, raw.nbytes)
            assert np.array_equal(back, raw)


@pytest.mark.parametrize(
    ("coded", "raw", "won"),
    [
        (4096, 8192, True),
        (4096, 4097, False),  # a page saved, not 5 %
        (90, 100, False),  # 10 % saved, but no page
        (95 * 4096, 100 * 4096, True),
        (95 * 4096 + 1, 100 * 4096, False),
    ],
)
def test_a_byte_codec_wins_by_a_page_and_five_percent(coded: int, raw: int, won: bool) -> None:
    assert wins(coded, raw) is won


@pytest.mark.parametrize("name", chain_names())
def test_a_chain_is_found_by_the_name_it_gives_itself(name: str) -> None:
    assert chain_of(name).name == name
    assert chain_of(name) is chain_of(name)


@pytest.mark.parametrize(
    ("name", "nearest"), [("raw+lz5", "raw+lz4"), ("rav", "raw"), ("lz4", "raw+lz4"), ("raw+", "raw")]
)
def test_an_unknown_chain_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest.replace('+', '[+]')}'"):
        chain_of(name)


def test_names_fit_the_field_in_the_record() -> None:
    assert all(len(name.encode("ascii")) <= 32 for name in chain_names())


def test_a_chain_knows_the_sizes_of_every_slice_and_of_the_record() -> None:
    part = [Part(layer, "kv", "bfloat16", ("token", "head", "dim"), (64, 8, 200)) for layer in range(12)]
    layout = KVLayout(64, 64, (KVGroup("attention", tuple(part)),))
    for name in ("raw", "raw+lz4"):
        assert chain_of(name).content_sizes(layout, 0) == tuple(span.nbytes for span in layout.slices[0])
        assert chain_of(name).record_pages(layout, 0) == layout.record_pages[0]
    assert all(a.parts.stop == b.parts.start for a, b in pairwise(layout.slices[0]))
