"""kvtier keeps the KV cache of LLMs in tiers: GPU memory, host memory, disk.

The public names; each is imported when it is first used, so that ``import kvtier`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtier.cache import TieredCache
    from kvtier.config import Config, load_config
    from kvtier.core.keys import Keys
    from kvtier.errors import (
        CapacityError,
        ClosedError,
        ConfigError,
        CorruptBlockError,
        KVTierError,
        TierError,
    )
    from kvtier.hits import Hit
    from kvtier.integrations.weights import model_id
    from kvtier.jobs import Job, LoadResult, PrefetchResult, StoreResult
    from kvtier.manager import CacheManager
    from kvtier.models import KVGroup, KVLayout, Part, Reuse
    from kvtier.pages import DenseKV, PagedTensors

_HOMES = {
    "CacheManager": "kvtier.manager",
    "CapacityError": "kvtier.errors",
    "ClosedError": "kvtier.errors",
    "Config": "kvtier.config",
    "ConfigError": "kvtier.errors",
    "CorruptBlockError": "kvtier.errors",
    "DenseKV": "kvtier.pages",
    "Hit": "kvtier.hits",
    "Job": "kvtier.jobs",
    "KVGroup": "kvtier.models",
    "KVLayout": "kvtier.models",
    "KVTierError": "kvtier.errors",
    "Keys": "kvtier.core.keys",
    "LoadResult": "kvtier.jobs",
    "PagedTensors": "kvtier.pages",
    "Part": "kvtier.models",
    "PrefetchResult": "kvtier.jobs",
    "Reuse": "kvtier.models",
    "StoreResult": "kvtier.jobs",
    "TierError": "kvtier.errors",
    "TieredCache": "kvtier.cache",
    "load_config": "kvtier.config",
    "model_id": "kvtier.integrations.weights",
}

__all__ = [
    "CacheManager",
    "CapacityError",
    "ClosedError",
    "Config",
    "ConfigError",
    "CorruptBlockError",
    "DenseKV",
    "Hit",
    "Job",
    "KVGroup",
    "KVLayout",
    "KVTierError",
    "Keys",
    "LoadResult",
    "PagedTensors",
    "Part",
    "PrefetchResult",
    "Reuse",
    "StoreResult",
    "TierError",
    "TieredCache",
    "load_config",
    "model_id",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvtier' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
