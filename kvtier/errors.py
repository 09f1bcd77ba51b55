"""Everything kvtier raises.

    KVTierError
    ├── ConfigError          a setting or an argument is wrong; names it, its value and the remedy (a ValueError)
    ├── CapacityError        a block cannot fit where it is asked to go
    ├── TierError            a tier cannot be used; wraps the error of the operating system or of CUDA
    ├── CorruptBlockError    bytes that were read are not the bytes that were written
    └── ClosedError          the cache was closed

A miss is a value, never an error.
"""


class KVTierError(Exception):
    """Root of every error that kvtier raises on purpose."""


class ConfigError(KVTierError, ValueError):
    """A setting or an argument is wrong; the message names it, its value and the remedy."""


class CapacityError(KVTierError):
    """A block is larger than the place that has to hold it."""


class TierError(KVTierError):
    """A tier cannot be used; ``__cause__`` is the error underneath, where there is one."""


class CorruptBlockError(KVTierError):
    """Bytes that were read are damaged, stale or foreign."""


class ClosedError(KVTierError):
    """The cache was closed before or during the call."""
