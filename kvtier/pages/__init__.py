"""The engine's own KV memory, seen as bytes: paged tensors in CPU memory or on a GPU, dense ones of transformers."""

from kvtier.pages.dense import DenseKV
from kvtier.pages.on_device import DeviceTensors
from kvtier.pages.paged import PagedTensors
from kvtier.pages.sequences import SequenceTensors

__all__ = ["DenseKV", "DeviceTensors", "PagedTensors", "SequenceTensors"]
