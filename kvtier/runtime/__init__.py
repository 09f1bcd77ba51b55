"""The one seam to the machine, and the real machine behind it."""

from kvtier.runtime.aiofiles_io import AiofilesIOEngine
from kvtier.runtime.arena import MemfdArena
from kvtier.runtime.files import SystemFiles
from kvtier.runtime.machine import system_machine
from kvtier.runtime.process import Process, this_process
from kvtier.runtime.system import SystemClock, SystemEvent, SystemRuntime
from kvtier.runtime.threads_io import ThreadsIOEngine

__all__ = [
    "AiofilesIOEngine",
    "MemfdArena",
    "Process",
    "SystemClock",
    "SystemEvent",
    "SystemFiles",
    "SystemRuntime",
    "ThreadsIOEngine",
    "system_machine",
    "this_process",
]
