"""Copies between engine pages and contiguous bytes, and the arithmetic of codecs. Plain numpy is the reference."""

from kvtier.kernels.copy import PageRows, gather_pages, page_rows, scatter_pages

__all__ = ["PageRows", "gather_pages", "page_rows", "scatter_pages"]
