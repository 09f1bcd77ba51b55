"""What can be set, with every default: TOML, or the same as a dict.

The classes below are the reference. ``configs/default.toml``, the table in README.md and ``kvtier config keys`` say
the same, and a test holds them to it. Capacities are bytes per process: two ranks on one machine take twice as much.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from fractions import Fraction
from operator import index
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from kvtier.errors import ConfigError

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_FACTORS: Final = {unit.lower(): 1024**power for power, unit in enumerate(_UNITS)} | {
    unit: 1000**power for power, unit in enumerate(("kb", "mb", "gb", "tb", "pb"), 1)
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
LEAST_SEGMENTS: Final = 4
"""How many segment files every disk directory must have room for."""
LEAST_SEGMENT_BYTES: Final = 20 * 4096
"""A segment file with eight of the smallest records: no layout can do with less."""
MOST_SECONDS: Final = 1e9
"""No time limit is longer than thirty years: sums of times stay numbers."""
_WRONG_KEY: Final = {"missing": "must be set", "invalid_key": "a key must be a string, like every name in TOML"}
_WRONG_VALUE: Final = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be a boolean",
    "string_type": "must be a string",
    "string_unicode": "must be a string that UTF-8 can write",
    "tuple_type": "must be a list",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be greater than or equal to {ge}",
    "less_than_equal": "must be less than or equal to {le}",
}
"""What is said of a value, by the type of pydantic's error and with its context: not in pydantic's words."""
_SIZE_EXAMPLES: Final = 'write it as "8GiB", "512MiB", "1.5TiB", or a number of bytes'


def parse_size(value: object) -> int:
    """Bytes of ``"8GiB"`` (powers of 1024), ``"8GB"`` (powers of 1000) or an int.

    Raises:
        ValueError: it is no size; the message shows how to write one.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    factor = _FACTORS.get(match[2].lower() or "b") if match else None
    if match is None or factor is None or (nbytes := Fraction(match[1]) * factor) >= 2**63:
        raise ValueError(f"not a size; {_SIZE_EXAMPLES}")
    return int(nbytes)


def _segment(value: object) -> object:
    if value == "auto":
        return value
    nbytes = parse_size(value)
    if nbytes % 4096 or not 1 << 20 <= nbytes <= 1 << 36:
        raise ValueError('must be "auto" or a multiple of 4096 between "1MiB" and "64GiB"')
    return nbytes


def _clean_segments(value: object) -> object:
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
        raise ValueError('must be "auto" or an integer between 1 and 64')
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise ValueError('not a device; want "auto", "cuda", "cuda:0" or another number, or "cpu"')
    return value


def _directory(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError("not a directory; name one as a string")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError("not a directory; its name has characters that no file system takes") from None
    return os.path.abspath(os.path.expanduser(value))


Size: TypeAlias = Annotated[int, BeforeValidator(parse_size)]
"""Bytes. Written as ``"8GiB"`` or as an int; read as an int."""

SegmentSize: TypeAlias = Annotated[Literal["auto"] | int, BeforeValidator(_segment)]
"""Bytes of a segment file, or ``"auto"``: chosen so that whole blocks fill it."""

CleanSegments: TypeAlias = Annotated[Literal["auto"] | int, BeforeValidator(_clean_segments)]
"""How many, or ``"auto"``: 512 MiB of them, at most an eighth of the capacity, and one at least."""

DeviceName: TypeAlias = Annotated[str, AfterValidator(_device)]
"""``auto``, ``cpu``, ``cuda`` or ``cuda:<number>``."""

Directory: TypeAlias = Annotated[str, AfterValidator(_directory)]
"""An absolute path; ``~`` and paths relative to the working directory are resolved when the configuration is read."""

Fraction1: TypeAlias = Annotated[float, Field(gt=0, le=1)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, le=MOST_SECONDS, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DeviceConfig(_Section):
    """kvtier's own slab of encoded blocks in GPU memory."""

    capacity: Size = Field(0, description="bytes per process, allocated at opening; 0 turns the tier off")
    codec: Literal["raw"] = Field("raw", description="how blocks are encoded in it")
    device: DeviceName = Field(
        "auto",
        description="where it lies: cuda, cuda:1 or the like, or cpu, which stands in for a GPU; auto: the current GPU,"
        " or the cpu where there is none",
    )
    promote: bool = Field(True, description="keep a copy in it of what was loaded from host memory")
    verify: bool = Field(
        False, description="for debugging: compare a digest of every block, worked out on the device, when it is read"
    )


class HostConfig(_Section):
    """Blocks in host memory, and the memory and threads that move them."""

    capacity: Size = Field(1 << 30, gt=0, description="bytes per process, allocated and touched at opening")
    codec: Literal["raw"] = Field("raw", description="how blocks are encoded in it")
    high_watermark: Fraction1 = Field(0.9, description="fraction of capacity above which blocks are freed")
    low_watermark: Fraction1 = Field(0.8, description="fraction of capacity down to which they are freed")
    staging: Size = Field(128 << 20, ge=1 << 20, description="bytes of buffers between host memory and disk")
    copy_threads: int = Field(2, ge=1, le=256, description="threads that copy, hash and decode")
    pin: Literal["auto", "on", "off"] = Field("auto", description="page-lock the memory; auto: where there is a GPU")
    store_queue: Size = Field(
        4 << 30, gt=0, description="bytes of stores under way to host memory; over it stores are refused"
    )
    load_queue: Size = Field(16 << 30, gt=0, description="bytes of loads under way; over it loads are refused")

    @model_validator(mode="after")
    def _ordered(self) -> HostConfig:
        if self.low_watermark >= self.high_watermark:
            raise ValueError(
                f"low_watermark = {self.low_watermark} must be below high_watermark = {self.high_watermark}"
            )
        return self


class DiskConfig(_Section):
    """Blocks in preallocated segment files on local NVMe."""

    directories: tuple[Directory, ...] = Field(
        (), strict=False, description="one directory per device, read and written at once; none turns the tier off"
    )
    capacity: Size = Field(16 << 30, gt=0, description="bytes per process over all directories, in equal shares")
    codec: Literal["raw", "raw+lz4"] = Field("raw", description="how blocks are encoded in it")
    io_engine: Literal["threads", "aiofiles"] = Field(
        "threads",
        description="what makes the system calls: plain threads, or aiofiles on an event loop; both with direct I/O"
        " where the file system has it",
    )
    io_threads: int = Field(4, ge=1, le=256, description="operations in flight per directory")
    segment: SegmentSize = Field("auto", description="bytes of one segment file, a multiple of 4096")
    clean_segments: CleanSegments = Field(
        "auto",
        description="segments kept ready for writing per directory; auto: 512MiB of them, at most 1/8 of the capacity",
    )

    @model_validator(mode="after")
    def _usable(self) -> DiskConfig:
        if len(set(self.directories)) < len(self.directories):
            raise ValueError(f"directories = {list(self.directories)}: names one directory twice")
        self._check_capacity()
        return self

    def _check_capacity(self) -> None:
        """What no layout at all would fit into; the rest needs the layout and is checked at opening."""
        segment = LEAST_SEGMENT_BYTES if self.segment == "auto" else self.segment
        least = len(self.directories) * LEAST_SEGMENTS * segment
        if self.capacity < least:
            lower = "" if self.segment == "auto" else ", or lower disk.segment"
            raise ValueError(
                f"capacity = {self.capacity}: too small for {LEAST_SEGMENTS} segments of {segment} bytes in each of "
                f"{len(self.directories)} directories; set it to at least {least}{lower}"
            )


class RemoteConfig(_Section):
    """A distributed store behind the local tiers."""

    kind: str = Field(description="which store; none is installed in this version")
    url: str = Field(description="where it is")
    capacity: Size = Field(0, description="bytes that may be kept in it; 0: the store decides")
    codec: Literal["raw", "raw+lz4"] = Field("raw", description="how blocks are encoded in it")


class PolicyConfig(_Section):
    """Which block goes, which comes, and when it is written down."""

    eviction: Literal["lru"] = Field("lru", description="which block a full tier frees; lru: leaf-first LRU")
    write: Literal["write_through", "write_through_selective", "write_back"] = Field(
        "write_through",
        description="write_through: blocks go to disk when stored; write_through_selective: when used again; "
        "write_back: when host memory frees them",
    )
    admission: Literal["every"] = Field("every", description="which stored blocks a tier takes")
    windows: Literal["full", "checkpoint", "zero", "replay"] = Field(
        "checkpoint",
        description="what is kept of sliding windows and states, which only the end of a hit needs; full: every block; "
        "checkpoint: what the ends of stores need, and every checkpoint_tokens; zero: nothing that can be computed "
        "again, a hit says how many tokens that takes; replay: as checkpoint, but where one is missing a hit asks for "
        "one window to be computed again, which is approximate",
    )
    checkpoint_tokens: int = Field(
        2048, ge=0, le=1 << 30, description="tokens from one checkpoint inside a store to the next; 0: its ends only"
    )
    checkpoint_ttl_s: Seconds = Field(
        0.0, description="seconds after their last use for which checkpoints stay as other blocks do; 0: for good"
    )
    spill_windows: bool = Field(True, description="write sliding windows and states to disk, too")


class PrefetchConfig(_Section):
    """How long a prefetch without deadline_s= may hold up the request that asked for it."""

    policy: Literal["best_effort", "wait_complete", "timeout"] = Field(
        "timeout",
        description="best_effort: nobody waits, blocks come in the background; wait_complete: wait for all; "
        "timeout: wait as long as below, what has not come by then stays on disk",
    )
    timeout_base_s: Seconds = Field(1.0, description="seconds that every prefetch may take")
    timeout_per_1k_tokens_s: Seconds = Field(0.25, description="seconds more per 1024 tokens")


class ReadConfig(_Section):
    """How blocks are read back."""

    verify_memory: bool = Field(True, description="check the checksum of blocks read from host memory too")
    promote: bool = Field(True, description="keep a copy in host memory of what was loaded from a slower tier")
    deadline_s: float = Field(
        10.0,
        gt=0,
        le=MOST_SECONDS,
        allow_inf_nan=False,
        description="seconds after which a load without deadline_s= gives up",
    )


class MetricsConfig(_Section):
    """What is counted."""

    max_series: int = Field(
        1024, ge=1, le=1 << 20, description="name and label combinations; further ones are counted together as 'other'"
    )


class Config(_Section):
    """Every setting; frozen. ``load_config`` makes it."""

    block_tokens: int = Field(
        64,
        ge=1,
        le=1 << 16,
        description="tokens per block, for KVLayout.from_hf_config; a cache goes by its layout: the default fits any, "
        "another number must be the layout's",
    )
    device: DeviceConfig = DeviceConfig()
    host: HostConfig = HostConfig()
    disk: DiskConfig = DiskConfig()
    remote: tuple[RemoteConfig, ...] = Field((), strict=False)
    policy: PolicyConfig = PolicyConfig()
    prefetch: PrefetchConfig = PrefetchConfig()
    read: ReadConfig = ReadConfig()
    metrics: MetricsConfig = MetricsConfig()


_MOST_CONFIG_BYTES: Final = 1 << 20


def load_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> Config:
    """The configuration in a TOML file, or in a dict of the same shape. What is not set keeps its default.

    Raises:
        ConfigError: the file cannot be read or parsed, or a key or value is wrong: every one of them is named with
            its full path, its value and the remedy.
    """
    if isinstance(source, Mapping):
        return _validated(_plain(source), where="")
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"load_config takes a path or a dict, not {type(source).__name__}")
    path = Path(source)
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: no path: {error}") from error
    if len(text) > _MOST_CONFIG_BYTES:
        raise ConfigError(f"{path}: not a configuration: longer than {_MOST_CONFIG_BYTES} bytes")
    try:
        table = tomllib.loads(text.decode("utf-8-sig"))
    except ValueError as error:  # of TOML, of UTF-8, or of an integer that is too long
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not a configuration: its lists or tables lie in each other too deeply") from None
    return _validated(table, where=f"{path}: ")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The class behind a key of ``Config`` that is a table or a list of tables; None for a plain value."""
    kind = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def key_paths() -> list[str]:
    """``section.key`` of every key there is; keys of ``[[remote]]`` tables are ``remote[].key``."""
    paths = []
    for name, item in Config.model_fields.items():
        section = section_of(item.annotation)
        prefix = f"{name}[]." if get_origin(item.annotation) is tuple else f"{name}."
        paths += [name] if section is None else [prefix + key for key in section.model_fields]
    return paths


def _plain(value: Any) -> Any:
    """``value`` as TOML would have it: paths as text, whole numbers of any kind as int."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return value
    try:
        return index(value)
    except TypeError:  # an array has the method, too
        return value


def _validated(table: Any, *, where: str) -> Config:
    try:
        config = Config.model_validate(table)
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors(include_url=False)]
        lines = list(dict.fromkeys(problems))
        raise ConfigError(where + (lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines))) from None
    if config.remote:
        raise ConfigError(
            f"{where}remote[0].kind = {config.remote[0].kind!r}: no remote store is installed in this version; "
            "remove [[remote]]"
        )
    return config


def _problem(detail: ErrorDetails) -> str:
    path, kind, context = _path(detail["loc"]), detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{path}: no such key; {_nearest_key(detail['loc'])}"
    if kind in _WRONG_KEY:
        return f"{path}: {_WRONG_KEY[kind]}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{path} = {detail['input']!r}: must be a table of keys, [{path}] in TOML"
    if kind == "value_error":  # raised above, in words of ours
        of_section = len(detail["loc"]) == 1
        return f"{path}.{context['error']}" if of_section else f"{path} = {detail['input']!r}: {context['error']}"
    values = {name: _shown(value) for name, value in context.items()}
    wanted = _WRONG_VALUE[kind].format_map(values) if kind in _WRONG_VALUE else detail["msg"]
    return f"{path} = {detail['input']!r}: {wanted}{_nearest_choice(detail)}"


def _shown(value: object) -> object:
    """A limit as people write it: 1, not 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(loc: tuple[int | str, ...]) -> str:
    text = ""
    for item in loc:
        text += f"[{item}]" if isinstance(item, int) else f".{item}" if text else item
    return text


def _nearest_key(loc: tuple[int | str, ...]) -> str:
    """Keys of that name elsewhere, else a similar one here, else a similar one elsewhere, else the nearest one here."""
    key, where = str(loc[-1]), _path(loc[:-1])
    prefix = where + "." if where else ""
    known = key_paths()
    inside = re.sub(r"\[\d+\]", "[]", prefix)
    here = sorted({name[len(inside) :].split(".")[0].removesuffix("[]") for name in known if name.startswith(inside)})
    names = [name.rpartition(".")[2] for name in known]
    similar_here = [prefix + name for name in get_close_matches(key, here, n=1)]
    similar = get_close_matches(key, names, n=1, cutoff=0.8)
    found = (
        [name for name in known if name.rpartition(".")[2] == key]
        or similar_here
        or [name for name in known if name.rpartition(".")[2] in similar]
    )
    if found:
        return f"did you mean {' or '.join(found)}?"
    return f"the nearest one is {prefix}{get_close_matches(key, here, n=1, cutoff=0.0)[0]}"


def _nearest_choice(detail: ErrorDetails) -> str:
    if detail["type"] != "literal_error" or not isinstance(detail["input"], str):
        return ""
    choices = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
    near = get_close_matches(detail["input"], choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
