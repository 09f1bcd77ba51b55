"""What a model caches: groups of parts with a reuse rule, as a layout that nothing below needs a model's name for."""

from kvtier.models.layout import KVLayout, SliceSpan
from kvtier.models.parts import DTYPE_BYTES, Axis, KVGroup, Part, PartKind, Reuse, dtype_name

__all__ = ["DTYPE_BYTES", "Axis", "KVGroup", "KVLayout", "Part", "PartKind", "Reuse", "SliceSpan", "dtype_name"]
