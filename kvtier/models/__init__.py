"""What a model caches: groups of parts with a reuse rule, as a layout that nothing below needs a model's name for."""

from kvtier.models.layout import KVGroup, KVLayout, Part, Reuse, SliceSpan

__all__ = ["KVGroup", "KVLayout", "Part", "Reuse", "SliceSpan"]
