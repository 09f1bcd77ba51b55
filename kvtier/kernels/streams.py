"""The order of copies and compute on a GPU. On a CPU everything is over when a call returns, and nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_order(device: torch.device) -> Iterator[None]:
    """What is queued to ``device`` inside runs in a stream of its own, and is over when the block ends.

    While the GPU works the interpreter is free.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # one of a pool: none is made anew
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # whatever was queued still reads and writes: nobody may have those bytes before
        stream.synchronize()


class Marks:
    """Moments of an engine's streams that copies wait for. Safe to use from any thread."""

    def __init__(self, device: torch.device) -> None:
        """None yet."""
        self._device = device
        self._events: dict[int, torch.cuda.Event] = {}  # by stream; the last one of a stream stands for all before

    def add(self) -> None:
        """What the current stream of this thread has been given until now comes before what waits from here on."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            self._events[stream.cuda_stream] = event

    def wait(self) -> None:
        """Whatever this thread gives its current stream from here on comes after all marks."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            for event in list(self._events.values()):
                stream.wait_event(event)
