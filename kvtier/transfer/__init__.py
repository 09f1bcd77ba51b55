"""The data plane: runs plans, moves bytes, and decides nothing but which allowed source serves a row."""

from kvtier.transfer.data_plane import DataPlane

__all__ = ["DataPlane"]
