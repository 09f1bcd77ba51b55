# ruff: noqa: D102  (the name of a test is its sentence)
"""What every codec must do. Inherit, name the class ``Test...``, and say which codec.

class TestMine(ByteCodecContract):
    codec = Mine()
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest

from kvtier.codecs.base import ByteCodec, TensorCodec, wins
from kvtier.core.memory import Bytes1D
from kvtier.errors import CorruptBlockError
from kvtier.models import Part

SIZES = (1, 4095, 4096, 256 * 1024, 1024 * 1024, 1024 * 1024 + 1, 3 * 1024 * 1024 + 4096)
GUARD = 64
GUARD_BYTE = 0xA5


def guarded(nbytes: int) -> tuple[Bytes1D, Bytes1D]:
    """A buffer of ``nbytes`` inside a larger one whose rim shows any write beyond it."""
    whole = np.full(nbytes + 2 * GUARD, GUARD_BYTE, np.uint8)
    return whole, whole[GUARD : GUARD + nbytes]


def assert_rim_untouched(whole: Bytes1D) -> None:
    """Nothing was written outside of the buffer that ``guarded`` gave."""
    assert (whole[:GUARD] == GUARD_BYTE).all()
    assert (whole[-GUARD:] == GUARD_BYTE).all()


def noise(nbytes: int, seed: int = 0) -> Bytes1D:
    """Bytes that no byte codec makes smaller."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def repetitive(nbytes: int, seed: int = 0) -> Bytes1D:
    """Bytes that every byte codec makes much smaller."""
    return np.resize(noise(97, seed), nbytes)


class ByteCodecContract:
    """Fewer bytes or None, exactly the same bytes back, and only ``CorruptBlockError`` on damage."""

    codec: ClassVar[ByteCodec]

    def coded(self, raw: Bytes1D) -> Bytes1D:
        """``raw`` coded; it has to win."""
        out = np.empty(raw.nbytes, np.uint8)
        size = self.codec.encode(raw, out)
        assert size is not None
        return out[:size].copy()

    @pytest.mark.parametrize("nbytes", [size for size in SIZES if size > 8192])
    def test_what_was_coded_decodes_to_the_same_bytes(self, nbytes: int) -> None:
        raw = repetitive(nbytes)
        stored = self.coded(raw)
        whole, out = guarded(nbytes)
        self.codec.decode(stored, out)
        assert np.array_equal(out, raw)
        assert_rim_untouched(whole)

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_noise_does_not_win(self, nbytes: int) -> None:
        whole, out = guarded(nbytes)
        assert self.codec.encode(noise(nbytes), out) is None
        assert_rim_untouched(whole)

    @pytest.mark.parametrize("nbytes", SIZES)
    @pytest.mark.parametrize("room", [0, 1, 100, 4096])
    def test_a_short_out_is_never_overrun(self, nbytes: int, room: int) -> None:
        whole, out = guarded(room)
        size = self.codec.encode(repetitive(nbytes), out)
        assert size is None or size <= room
        assert_rim_untouched(whole)

    @pytest.mark.parametrize("noisy", [0.0, 0.5, 0.85, 0.9, 0.94, 0.95, 0.96, 1.0])
    def test_it_wins_by_a_page_and_five_percent_or_not_at_all(self, noisy: float) -> None:
        nbytes = 1024 * 1024
        raw = np.zeros(nbytes, np.uint8)
        raw[: int(noisy * nbytes)] = noise(int(noisy * nbytes))
        size = self.codec.encode(raw, np.empty(nbytes, np.uint8))
        assert size is None or wins(size, nbytes)
        assert (size is None) == (noisy > 0.9) or 0.9 < noisy < 0.96

    def test_the_input_is_not_changed(self) -> None:
        raw = repetitive(300_000)
        stored = self.coded(raw)
        before = stored.copy()
        self.codec.decode(stored, np.empty_like(raw))
        assert np.array_equal(raw, repetitive(300_000))
        assert np.array_equal(stored, before)

    @pytest.mark.parametrize("difference", [-4096, -1, 1, 4096])
    def test_another_size_than_was_coded_is_damage(self, difference: int) -> None:
        stored = self.coded(repetitive(300_000))
        with pytest.raises(CorruptBlockError):
            self.codec.decode(stored, np.empty(300_000 + difference, np.uint8))

    def test_every_truncation_is_damage(self) -> None:
        raw = repetitive(300_000)
        stored = self.coded(raw)
        for size in {*range(min(64, stored.nbytes)), *range(0, stored.nbytes, 97), stored.nbytes - 1}:
            with pytest.raises(CorruptBlockError):
                self.codec.decode(stored[:size], np.empty_like(raw))

    def test_bytes_after_the_end_are_damage(self) -> None:
        raw = repetitive(300_000)
        with pytest.raises(CorruptBlockError):
            self.codec.decode(np.append(self.coded(raw), np.uint8(0)), np.empty_like(raw))

    def test_flipped_bits_never_write_outside_or_raise_anything_else(self) -> None:
        raw = repetitive(20_000)
        stored = self.coded(raw)
        whole, out = guarded(raw.nbytes)
        for damaged in _single_bit_flips(stored, limit=2000):
            try:
                self.codec.decode(damaged, out)
            except CorruptBlockError:
                continue
        assert_rim_untouched(whole)

    def test_noise_as_input_of_decode_is_damage_or_bytes_but_no_other_error(self) -> None:
        whole, out = guarded(70_000)
        for seed in range(300):
            try:
                self.codec.decode(noise(1 + 37 * seed, seed), out)
            except CorruptBlockError:
                continue
        assert_rim_untouched(whole)

    def test_several_threads_may_use_it_at_once(self) -> None:
        def round_trip(seed: int) -> bool:
            raw = repetitive(500_000 + seed, seed)
            out = np.empty_like(raw)
            self.codec.decode(self.coded(raw), out)
            return np.array_equal(out, raw)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(round_trip, range(32)))


class TensorCodecContract:
    """The announced size, the announced error, and the same bytes back from an exact codec."""

    codec: ClassVar[TensorCodec]

    def parts(self) -> tuple[Part, ...]:
        """Parts to encode; override for a codec that takes only some dtypes."""
        return tuple(
            Part(layer, kind, "bfloat16", ("head", "token", "dim"), (2, 16, 64))
            for layer in range(2)
            for kind in ("k", "v")
        )

    def values(self, seed: int = 0) -> Bytes1D:
        """Gaussian bfloat16 numbers, two pages of each part."""
        count = sum(part.page_bytes for part in self.parts())
        numbers = np.random.default_rng(seed).standard_normal(count).astype("<f4")
        return (numbers.view("<u4") >> 16).astype("<u2").view(np.uint8)

    def encoded(self, raw: Bytes1D) -> tuple[Bytes1D, float]:
        """The content of ``raw`` and the error."""
        whole, out = guarded(self.codec.encoded_bytes(self.parts(), raw.nbytes))
        error = self.codec.encode(raw, self.parts(), out)
        assert_rim_untouched(whole)
        return out, error

    def test_content_is_never_longer_than_the_kv(self) -> None:
        nbytes = self.values().nbytes
        assert 0 < self.codec.encoded_bytes(self.parts(), nbytes) <= nbytes

    def test_decode_gives_back_what_the_error_allows(self) -> None:
        raw = self.values()
        content, error = self.encoded(raw)
        whole, out = guarded(raw.nbytes)
        self.codec.decode(content, self.parts(), out)
        assert_rim_untouched(whole)
        if self.codec.exact:
            assert error == 0.0
            assert np.array_equal(out, raw)
        else:
            before, after = _bfloat16(raw), _bfloat16(out)
            assert np.linalg.norm(after - before) <= 1.01 * error * np.linalg.norm(before)

    def test_the_same_input_gives_the_same_content(self) -> None:
        assert np.array_equal(self.encoded(self.values())[0], self.encoded(self.values())[0])

    def test_the_input_is_not_changed(self) -> None:
        raw = self.values()
        self.encoded(raw)
        assert np.array_equal(raw, self.values())

    @pytest.mark.parametrize("difference", [-1, 1])
    def test_content_of_another_size_is_damage(self, difference: int) -> None:
        raw = self.values()
        content, _ = self.encoded(raw)
        with pytest.raises(CorruptBlockError):
            self.codec.decode(np.resize(content, content.nbytes + difference), self.parts(), np.empty_like(raw))


def _bfloat16(data: Bytes1D) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return (data.view("<u2").astype("<u4") << 16).view("<f4")


def _single_bit_flips(data: Bytes1D, limit: int) -> Iterator[Bytes1D]:
    bits = min(8 * data.nbytes, limit)
    for bit in np.linspace(0, 8 * data.nbytes - 1, bits).astype(int):
        damaged = data.copy()
        damaged[bit // 8] ^= np.uint8(1 << (bit % 8))
        yield damaged
