"""Plans, completions and reports as bytes: a JSON head with the scalars, then the tables as they lie in memory.

    "KVTW" | u32 bytes of head | head | table | table | ...

The head names the kind, the scalars and the byte length of every table, in the order of the fields. Lengths and types
are checked against what arrived before anything is used; nothing is evaluated.
"""

from __future__ import annotations

import json
from dataclasses import fields
from struct import Struct
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt

from kvtier.core import plan as nouns
from kvtier.core.memory import GroupPages, PageTable
from kvtier.core.plan import COMPLETED, LOST, RECOVERED, ROW, Message, Plan
from kvtier.errors import CorruptBlockError

_HEAD: Final = Struct("<4sI")
_MAGIC: Final = b"KVTW"
_KINDS: Final[dict[str, type[Any]]] = {kind.__name__: kind for kind in (Plan, *get_args(Message))}
_TABLES: Final[dict[tuple[str, str], np.dtype[Any]]] = {
    ("Plan", "rows"): ROW,
    ("Completion", "rows"): COMPLETED,
    ("Recovered", "rows"): RECOVERED,
    ("Lost", "rows"): LOST,
    ("DiskState", "sealed"): np.dtype("<i8"),
}
_ENUMS: Final = {"PlanKind": nouns.PlanKind, "Priority": nouns.Priority, "Tier": nouns.Tier}
_TUPLES: Final = {"tuple[str, ...]": "str", "tuple[int, ...]": "int"}
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
}


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
    text = json.dumps({"kind": kind, "scalars": scalars, "tables": [len(table) for table in tables]}, default=_plain)
    head = text.encode()
    return b"".join((_HEAD.pack(_MAGIC, len(head)), head, *tables))


def decode(data: bytes | bytearray | memoryview) -> Plan | Message:
    """The message in ``data``.

    Raises:
        CorruptBlockError: the bytes are not one whole message of a known kind.
    """
    try:
        return _decode(data)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptBlockError(f"not a kvtier message ({len(data)} bytes): {error}") from error


def _decode(data: bytes | bytearray | memoryview) -> Plan | Message:
    magic, head_bytes = _HEAD.unpack_from(data) if len(data) >= _HEAD.size else (b"", 0)
    at = _HEAD.size + head_bytes
    if magic != _MAGIC or at > len(data):
        raise ValueError("no head")
    head = json.loads(bytes(data[_HEAD.size : at]))
    kind, scalars, sizes = _KINDS[head["kind"]], head["scalars"], head["tables"]
    if not isinstance(scalars, dict) or not isinstance(sizes, list):
        raise ValueError("no head")
    if not all(type(size) is int and size >= 0 for size in sizes) or at + sum(sizes) != len(data):
        raise ValueError("lengths do not add up")
    tables: list[memoryview] = []
    for size in sizes:
        tables.append(memoryview(data)[at : at + size])
        at += size
    tables.reverse()
    values: dict[str, Any] = {}
    for item in fields(kind):
        dtype = _TABLES.get((kind.__name__, item.name))
        if dtype is not None:
            values[item.name] = _table(item.name, dtype, tables)
        elif item.type == "PageTable | None":
            values[item.name] = _page_table(scalars[item.name], tables)
        else:
            values[item.name] = _scalar(str(item.type), scalars[item.name])
    if tables:
        raise ValueError("a table too many")
    message: Plan | Message = kind(**values)
    return message


def _next(tables: list[memoryview]) -> memoryview:
    if not tables:
        raise ValueError("a table is missing")
    return tables.pop()


def _table(name: str, dtype: np.dtype[Any], tables: list[memoryview]) -> npt.NDArray[Any]:
    table = np.frombuffer(_next(tables), dtype)
    return table.reshape(-1, 2) if name == "sealed" else table


def _page_table(shape: Any, tables: list[memoryview]) -> PageTable | None:
    if shape is None:
        return None
    memory_id, groups = shape
    lengths = [(_scalar("int", first_token), _scalar("int", count)) for first_token, count in groups]
    ids, at, out = np.frombuffer(_next(tables), "<i4"), 0, []
    if sum(count for _, count in lengths) != len(ids) or any(count < 0 for _, count in lengths):
        raise ValueError("page table of another length")
    for first_token, count in lengths:
        out.append(GroupPages(first_token, ids[at : at + count]))
        at += count
    return PageTable(_scalar("int", memory_id), tuple(out))


def _scalar(kind: str, value: Any) -> Any:
    if of_each := _TUPLES.get(kind):
        if type(value) is not list:
            raise ValueError(f"{value!r} is no {kind}")
        return tuple(_scalar(of_each, item) for item in value)
    if kind in _ENUMS:
        return _ENUMS[kind](_scalar("int", value))
    if type(value) not in _TYPES[kind] or (type(value) is int and not -(2**63) <= value < 2**63):
        raise ValueError(f"{str(value)[:40]!r} is no {kind}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} does not cross: a message holds plain values")
