"""WHERE a block is: keys to entries, links, pins, copies, and the space of a memory tier."""

from kvtier.index.entries import Index
from kvtier.index.space import Space

__all__ = ["Index", "Space"]
