"""Blocks on disk: preallocated log segments, one directory per placement, no journal. See ``docs/format.md``."""

from kvtier.tiers.disk.places import DiskEvents, Place, SyncTarget
from kvtier.tiers.disk.recovery import Recovery
from kvtier.tiers.disk.tier import DiskTier

__all__ = ["DiskEvents", "DiskTier", "Place", "Recovery", "SyncTarget"]
