"""The slab moves records as bytes, and knows who lies where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.core.plan import PAGE_BYTES
from kvtier.errors import ConfigError
from kvtier.tiers.device import Residents, Slab, device_of

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]


def slab_of(pages: int, device: str = "cpu") -> Slab:
    return Slab(torch.zeros(pages * PAGE_BYTES, dtype=torch.uint8, device=device_of(device)), verifies=True)


def some_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("device", DEVICES)
def test_records_side_by_side_are_one_view(device: str) -> None:
    slab = slab_of(20, device)
    first = [4, 7, 10, 1, 16, 13]
    found = []
    for rows, records in slab.runs(first, 3):
        found.append(first[rows])
        assert records.shape == (len(first[rows]), 3 * PAGE_BYTES)
        records[:, 5] = torch.arange(rows.start, rows.stop, dtype=torch.uint8) + 1
    assert found == [[4, 7, 10], [1], [16], [13]]
    assert [int(slab.record(page, 3)[5]) for page in first] == [1, 2, 3, 4, 5, 6]
    assert int(slab.record(0, 20).count_nonzero()) == 6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("to", [[0, 2, 4], [4, 2, 0], [0, 2, 8], [9, 1, 3]])
def test_records_go_to_host_memory_and_back_wherever_they_lie(device: str, to: list[int]) -> None:
    slab, content = slab_of(12, device), some_bytes(3, 2 * PAGE_BYTES)
    for page, own in zip([3, 5, 7], content, strict=True):
        slab.record(page, 2).copy_(torch.from_numpy(own))
    host = np.zeros(12 * PAGE_BYTES, np.uint8)
    with slab.ordered():
        slab.copy_to_host([3, 5, 7], 2, host, to)
    assert [host[page * PAGE_BYTES :][: 2 * PAGE_BYTES].tolist() for page in to] == content.tolist()
    slab.record(0, 12).zero_()
    with slab.ordered():
        slab.copy_from_host(host, to, 2, [3, 5, 7])
    assert [slab.record(page, 2).tolist() for page in (3, 5, 7)] == content.tolist()
    assert int(slab.record(0, 3).sum()) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_digest_sees_every_bit_and_where_it_is(device: str) -> None:
    slab = slab_of(4, device)
    slab.record(0, 4).copy_(torch.from_numpy(some_bytes(4 * PAGE_BYTES)))
    (before,) = slab.digests([0], 4)
    record = slab.record(1, 3)
    for byte in (0, 5000, 3 * PAGE_BYTES - 1):
        record[byte] ^= 16
        assert slab.digests([0], 4) != [before]
        record[byte] ^= 16
    assert slab.digests([0], 4) == [before]
    words = record.view(torch.int64)
    one, other = int(words[3]), int(words[900])
    words[3], words[900] = other, one
    assert slab.digests([0], 4) != [before], "two words changed places"


@pytest.mark.parametrize("device", DEVICES)
def test_the_digest_of_a_record_does_not_depend_on_what_lies_beside_it(device: str) -> None:
    slab = slab_of(12, device)
    slab.record(0, 12).copy_(torch.from_numpy(some_bytes(12 * PAGE_BYTES)))
    first = [3, 6, 9, 0]
    assert slab.digests(first, 3) == [slab.digests([page], 3)[0] for page in first]


class TestResidents:
    def test_whoever_was_noted_is_found_by_all_that_was_said(self) -> None:
        residents = Residents(10)
        residents.note(2, 3, b"a" * 32, 1, sealed=True, digest=5)
        found = residents.find(2, 3, b"a" * 32, 1)
        assert found is not None
        assert (found.sealed, found.digest) == (True, 5)
        for place in [(2, 3, b"b" * 32, 1), (2, 3, b"a" * 32, 0), (2, 2, b"a" * 32, 1), (3, 3, b"a" * 32, 1)]:
            assert residents.find(*place) is None

    @pytest.mark.parametrize("page", [0, 2, 4])
    def test_what_was_overwritten_in_part_is_nobody(self, page: int) -> None:
        residents = Residents(10)
        residents.note(2, 3, b"a" * 32, 0, sealed=False)
        residents.note(page, 3, b"b" * 32, 0, sealed=False)
        assert residents.find(2, 3, b"a" * 32, 0) is None
        assert residents.find(page, 3, b"b" * 32, 0) is not None


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=rf'device.device = "cuda:{count}": torch sees {count} CUDA devices'):
        device_of(f"cuda:{count}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be found")
def test_without_a_gpu_auto_is_the_cpu() -> None:
    assert device_of("auto").type == device_of("cpu").type == "cpu"
