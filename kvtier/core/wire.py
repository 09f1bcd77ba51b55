"""Plans, completions and reports as bytes: a JSON head with the scalars, then the tables as they lie in memory.

    "KVTW" | u32 bytes of head | head | table | table | ...

The head names the kind, the scalars and the byte length of every table, in the order of the fields. Lengths are
checked against what arrived before anything is used; nothing is evaluated.
"""

from __future__ import annotations

import json
from dataclasses import fields
from struct import Struct
from typing import Any, Final

import numpy as np

from kvtier.core import plan as nouns
from kvtier.core.memory import GroupPages, PageTable
from kvtier.core.plan import COMPLETED, LOST, RECOVERED, ROW, Message, Plan
from kvtier.errors import CorruptBlockError

_HEAD: Final = Struct("<4sI")
_MAGIC: Final = b"KVTW"
_KINDS: Final[dict[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (Plan, nouns.Completion, nouns.Hello, nouns.Recovered, nouns.Lost, nouns.DiskState, nouns.LaneRate)
}
_TABLES: Final[dict[tuple[str, str], np.dtype[Any]]] = {
    ("Plan", "rows"): ROW,
    ("Completion", "rows"): COMPLETED,
    ("Recovered", "rows"): RECOVERED,
    ("Lost", "rows"): LOST,
    ("DiskState", "sealed"): np.dtype("<i8"),
}
_ENUMS: Final = {"kind": nouns.PlanKind, "priority": nouns.Priority}


def encode(message: Plan | Message) -> bytes:
    """``message`` as bytes."""
    kind = type(message).__name__
    scalars: dict[str, Any] = {}
    tables: list[bytes] = []
    for item in fields(message):
        value = getattr(message, item.name)
        if isinstance(value, PageTable):
            scalars[item.name] = [value.memory_id, [[g.first_token, len(g.ids)] for g in value.groups]]
            tables.append(b"".join(np.ascontiguousarray(g.ids, "<i4").tobytes() for g in value.groups))
        elif isinstance(value, np.ndarray):
            tables.append(value.tobytes())
        else:
            scalars[item.name] = value
    head = json.dumps({"kind": kind, "scalars": scalars, "tables": [len(table) for table in tables]}).encode()
    return b"".join((_HEAD.pack(_MAGIC, len(head)), head, *tables))


def decode(data: bytes) -> Plan | Message:
    """The message in ``data``.

    Raises:
        CorruptBlockError: the bytes are not one whole message of a known kind.
    """
    try:
        return _decode(data)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptBlockError(f"not a kvtier message ({len(data)} bytes): {error}") from error


def _decode(data: bytes) -> Plan | Message:
    magic, head_bytes = _HEAD.unpack_from(data) if len(data) >= _HEAD.size else (b"", 0)
    at = _HEAD.size + head_bytes
    if magic != _MAGIC or at > len(data):
        raise ValueError("no head")
    head = json.loads(data[_HEAD.size : at])
    if at + sum(head["tables"]) != len(data) or any(size < 0 for size in head["tables"]):
        raise ValueError("lengths do not add up")
    kind = _KINDS[head["kind"]]
    values: dict[str, Any] = {}
    sizes = iter(head["tables"])
    for item in fields(kind):
        dtype = _TABLES.get((head["kind"], item.name))
        if dtype is not None:
            size = next(sizes)
            table = np.frombuffer(data, dtype, size // dtype.itemsize, at)
            values[item.name] = table.reshape(-1, 2) if item.name == "sealed" else table
            at += size
        elif item.name == "pages" and head["scalars"].get("pages", ...) is not None:
            size = next(sizes)
            values["pages"] = _page_table(head["scalars"]["pages"], data[at : at + size])
            at += size
        else:
            values[item.name] = _scalar(item.name, head["scalars"][item.name])
    message: Plan | Message = kind(**values)
    return message


def _page_table(shape: Any, data: bytes) -> PageTable:
    memory_id, groups = shape
    if 4 * sum(count for _, count in groups) != len(data):
        raise ValueError("page table of another length")
    ids, at, out = np.frombuffer(data, "<i4"), 0, []
    for first_token, count in groups:
        out.append(GroupPages(int(first_token), ids[at : at + count]))
        at += count
    return PageTable(int(memory_id), tuple(out))


def _scalar(name: str, value: Any) -> Any:
    if name in _ENUMS:
        return _ENUMS[name](value)
    return tuple(value) if isinstance(value, list) else value
