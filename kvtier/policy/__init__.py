"""WHICH block goes or comes. Pure: sees entry numbers and hints only; imports nothing of where bytes lie."""

from kvtier.policy.ages import TwoAges
from kvtier.policy.base import EvictionPolicy
from kvtier.policy.lru import LeafFirstLRU

EVICTION_POLICIES: dict[str, type[EvictionPolicy]] = {
    "lru": LeafFirstLRU,
}

__all__ = ["EVICTION_POLICIES", "EvictionPolicy", "LeafFirstLRU", "TwoAges"]
