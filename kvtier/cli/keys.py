"""The configuration's keys as people read them: as a table, as TOML with comments, as markdown."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from kvtier.config import Config, SegmentSize, Size, key_paths, section_of

_UNITS: Final = ("", "KiB", "MiB", "GiB", "TiB", "PiB")
_SIZE_MARKS: Final = (*get_args(Size)[1:], *get_args(SegmentSize)[1:])
_TOML_HEAD: Final = (
    "# Every key of kvtier with its default, as `kvtier config keys --toml` writes it.",
    '# Sizes are "512MiB", "8GiB" or a number of bytes, and hold for one process.',
)
_TYPE_NAMES: Final = {int: "integer", float: "number", bool: "boolean", str: "string"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One key; ``path`` is ``section.key``, and ``remote[].key`` inside ``[[remote]]`` tables."""

    path: str
    type: str
    default: Any
    description: str

    @property
    def is_size(self) -> bool:
        """Whether values are bytes that are written with a unit."""
        return self.type.endswith("size")

    @property
    def default_text(self) -> str:
        """The default as TOML writes it; a dash where the key must be given."""
        return "-" if self.default is ... else toml_text(self.default, is_size=self.is_size)


def settings() -> list[Setting]:
    """Every key there is, in the order of the reference."""
    return [_setting(path) for path in key_paths()]


def value_at(config: Config, path: str) -> Any:
    """What ``config`` says for ``section.key``."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def size_text(nbytes: int) -> str:
    """``nbytes`` in the largest unit that divides it."""
    power = 0
    while nbytes and nbytes % 1024 == 0 and power < len(_UNITS) - 1:
        nbytes, power = nbytes // 1024, power + 1
    return f"{nbytes}{_UNITS[power]}"


def toml_text(value: Any, *, is_size: bool = False) -> str:
    """``value`` as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    if is_size and isinstance(value, int) and value % 1024 == 0 and value:
        return f'"{size_text(value)}"'
    return f'"{value}"' if isinstance(value, str) else str(value)


def as_toml() -> str:
    """A configuration file that sets every key to its default and says what each means."""
    lines = list(_TOML_HEAD)
    section = ""
    for setting in settings():
        table, _, key = setting.path.rpartition(".")
        if table != section:
            section = table
            lines += ["", *_opening(table)]
        lines += [] if lines[-1].lstrip("# ").startswith("[") else [""]
        lines += _entry(setting, key, mark="# " if table.endswith("[]") else "")
    return "\n".join(lines) + "\n"


def as_markdown() -> str:
    """The table of keys in README.md."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for setting in settings():
        cells = (f"`{setting.path}`", setting.type, f"`{setting.default_text}`", setting.description)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _opening(table: str) -> list[str]:
    name = table.removesuffix("[]")
    section = section_of(Config.model_fields[name].annotation)
    about = [f"# {line}" for line in wrap((section.__doc__ or "") if section else "", 117)]
    return [*about, f"# [[{name}]]"] if table.endswith("[]") else [*about, f"[{name}]"]


def _entry(setting: Setting, key: str, mark: str) -> list[str]:
    about = wrap(f"{setting.description} ({setting.type})", 117)
    value = '"..."' if setting.default is ... else setting.default_text
    return [*(f"# {line}" for line in about), f"{mark}{key} = {value}"]


def _setting(path: str) -> Setting:
    table, _, key = path.rpartition(".")
    section = section_of(Config.model_fields[table.removesuffix("[]")].annotation) if table else Config
    field = (section or Config).model_fields[key]
    default = ... if field.is_required() else field.default
    kind = _type_text(field.annotation, tuple(field.metadata))
    return Setting(path, kind, default, field.description or "")


def _type_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(args[0], args[1:])
    if any(item in metadata for item in _SIZE_MARKS):
        return "size" if annotation is int else '"auto" or size'
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in args)
    if origin is Union:
        return " or ".join(_type_text(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type_text(args[0])}s"
    return _TYPE_NAMES[annotation]
