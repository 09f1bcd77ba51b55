"""The engine's own KV memory, seen as bytes: paged tensors, and the dense tensors of transformers."""

from kvtier.pages.dense import DenseKV
from kvtier.pages.paged import PagedTensors
from kvtier.pages.sequences import SequenceTensors

__all__ = ["DenseKV", "PagedTensors", "SequenceTensors"]
