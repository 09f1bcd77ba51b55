"""Pages on a device to blocks and back: torch against plain indexing, triton's kernel against torch.

Without a GPU the kernel runs by triton's interpreter, which a process has to be told at its start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from kvtier.kernels.device_pages import DevicePages, TorchPages, pages_on

BLOCK_PAGES = 2
SIZES = (48, 2_624, 10_240)
"""Bytes of a page: the kernel moves the first two in one chunk, the last in two."""

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'kvtier[gpu]', or make test-triton"
)


def pages_of(sizes: tuple[int, ...], device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 256, (13, size), dtype=torch.uint8, generator=generator) for size in sizes]
    return [pages.to(device) for pages in made]


def ids_on(device: str) -> torch.Tensor:
    return torch.tensor([[3, 12], [1, 0], [0, 7]], dtype=torch.int64, device=device)


def compare(kind: type[DevicePages], sizes: tuple[int, ...], parts: range, device: str, spare: int) -> None:
    """Blocks that ``kind`` gathers and scatters are those that indexing says; what lies beside them stays."""
    pages, ids = pages_of(sizes, device), ids_on(device)
    wanted = torch.cat([pages[part][ids].view(len(ids), -1) for part in parts], dim=1)
    room = torch.zeros((len(ids), spare + wanted.shape[1] + 64), dtype=torch.uint8, device=device)
    out = room[:, spare : spare + wanted.shape[1]]
    kind(pages, BLOCK_PAGES).gather(ids, parts, out)
    assert torch.equal(out, wanted)
    assert not room[:, :spare].any()
    assert not room[:, spare + wanted.shape[1] :].any()
    targets = [torch.zeros_like(each) for each in pages]
    disjoint = ids[:2]  # where two blocks share a page nobody says whose bytes it gets
    kind(targets, BLOCK_PAGES).scatter(disjoint, parts, out[:2])
    for part, (source, target) in enumerate(zip(pages, targets, strict=True)):
        written = disjoint.flatten().tolist() if part in parts else []
        for page in range(len(source)):
            assert torch.equal(target[page], source[page] if page in written else torch.zeros_like(source[page]))
    kind(pages, BLOCK_PAGES).gather(ids[:0], parts, out[:0])


CASES = [
    (sizes, parts, spare)
    for sizes in (SIZES, (12, 20))  # the latter are no words of 8 bytes
    for parts in (range(len(sizes)), range(1, len(sizes)), range(1))
    for spare in (8, 3)
]


@pytest.mark.parametrize(("sizes", "parts", "spare"), CASES)
def test_torch_moves_the_bytes_that_indexing_says(sizes: tuple[int, ...], parts: range, spare: int) -> None:
    compare(TorchPages, sizes, parts, "cpu", spare)


def test_without_a_gpu_torch_moves_them() -> None:
    assert pages_on(torch.device("cpu")) is TorchPages


@needs_triton
@pytest.mark.timeout(300)
def test_the_interpreted_kernel_moves_the_bytes_that_indexing_says() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("sizes", "parts", "spare"), CASES)
def test_the_compiled_kernel_moves_the_bytes_that_indexing_says(
    sizes: tuple[int, ...], parts: range, spare: int
) -> None:
    assert pages_on(torch.device("cuda")) is not TorchPages
    compare(pages_on(torch.device("cuda")), sizes, parts, "cuda", spare)


def main() -> None:
    """What the interpreter is to do."""
    from kvtier.kernels.triton_copy import TritonPages  # not in the process that asks for it

    for sizes, parts, spare in CASES:
        compare(TritonPages, sizes, parts, "cpu", spare)


if __name__ == "__main__":
    main()
