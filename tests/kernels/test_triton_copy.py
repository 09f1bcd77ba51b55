"""The GPU's kernels against torch: on the CPU by triton's interpreter, which a process has to be told at its start."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'kvtier[gpu]'"
)


def compare(device):
    """Gather and scatter some blocks of parts of three sizes, and compare with torch; raises where they differ."""
    from kvtier.kernels.triton_copy import DevicePages, gather_plainly, scatter_plainly

    generator = torch.Generator().manual_seed(0)
    shapes = [(13, 4, 1, 6), (13, 1312), (13, 4, 2, 640)]  # pages of 48, 2,624 and 10,240 bytes: one chunk, and two
    tensors = [torch.randn(shape, generator=generator).to(torch.bfloat16).to(device) for shape in shapes]
    ids = torch.tensor([7, 3, 12, 0, 5, 6, 1], dtype=torch.int32, device=device)
    bases = torch.tensor([1, 5, 3], dtype=torch.int64, device=device)
    pages, wanted = DevicePages.of(tensors, 2), gather_plainly(tensors, 2, ids, bases)
    room = torch.zeros((3, wanted.shape[1] + 64), dtype=torch.uint8, device=device)
    records = room.data_ptr() + 8 + room.shape[1] * torch.arange(3, device=device)
    pages.gather(ids, bases, records)
    assert torch.equal(room[:, 8 : 8 + wanted.shape[1]], wanted)
    assert not room[:, :8].any()
    assert not room[:, 8 + wanted.shape[1] :].any()
    mine, theirs = ([torch.zeros_like(tensor) for tensor in tensors] for _ in range(2))
    DevicePages.of(mine, 2).scatter(ids, bases, records)
    scatter_plainly(theirs, 2, ids, bases, wanted)
    for one, other, whole in zip(mine, theirs, tensors, strict=True):
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))
        assert torch.equal(one[3].view(torch.int16), whole[3].view(torch.int16))
        assert not one[7].any()
    pages.gather(ids, bases[:0], records[:0])


@pytest.mark.timeout(300)
def test_the_interpreted_kernel_moves_the_bytes_that_torch_moves():
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_the_compiled_kernel_moves_the_bytes_that_torch_moves():
    compare("cuda")


@pytest.mark.parametrize("tensor", [torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(8, 8)[:, ::2]])
def test_pages_that_are_no_whole_words_are_refused(tensor):
    from kvtier.kernels.triton_copy import DevicePages

    with pytest.raises(ValueError, match="words of 8 bytes"):
        DevicePages.of([tensor], 1)


if __name__ == "__main__":
    compare("cpu")
