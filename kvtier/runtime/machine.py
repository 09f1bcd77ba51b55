"""The real machine: everything that the seam names."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from difflib import get_close_matches

from kvtier.errors import ConfigError
from kvtier.runtime.aiofiles_io import AiofilesIOEngine
from kvtier.runtime.arena import MemfdArena
from kvtier.runtime.files import SystemFiles
from kvtier.runtime.seam import IOEngine, Machine
from kvtier.runtime.system import SystemRuntime
from kvtier.runtime.threads_io import ThreadsIOEngine

IO_ENGINES: dict[str, Callable[[str, int], IOEngine]] = {
    "threads": ThreadsIOEngine,
    "aiofiles": AiofilesIOEngine,
}


def system_machine(io_engine: str = "threads") -> Machine:
    """The machine that we run on, with the I/O engine of that name.

    Raises:
        ConfigError: there is no such engine.
    """
    if io_engine not in IO_ENGINES:
        near = get_close_matches(io_engine, IO_ENGINES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"io_engine: {io_engine!r} is not an I/O engine; use one of {', '.join(IO_ENGINES)} (nearest: {near!r})"
        )
    owner = f"pid {os.getpid()} on {platform.node()}"
    return Machine(SystemRuntime(), SystemFiles(), MemfdArena, IO_ENGINES[io_engine], owner)
