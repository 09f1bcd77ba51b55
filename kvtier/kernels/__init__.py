"""Copies between engine pages and contiguous bytes, and the arithmetic of codecs. Plain numpy is the reference."""

from kvtier.kernels.copy import Pages2D, Rows, RowSpace

__all__ = ["Pages2D", "RowSpace", "Rows"]
