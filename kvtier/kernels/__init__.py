"""Copies between engine pages and contiguous bytes, and the arithmetic of codecs. Plain numpy is the reference."""

from kvtier.kernels.copy import Pages2D, Rows, RowSpace, address_of
from kvtier.kernels.fast_pages import FastPages
from kvtier.kernels.loading import compiled
from kvtier.kernels.record_memory import Addresses, RecordMemory, SliceTable

__all__ = [
    "Addresses", "FastPages", "Pages2D", "RecordMemory", "RowSpace", "Rows", "SliceTable", "address_of", "compiled",
]  # fmt: skip
