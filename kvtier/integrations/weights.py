"""The model id: a digest of config and weights, so that KV of other weights is never taken for this model's."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable
from hashlib import file_digest, sha256
from pathlib import Path
from struct import pack
from typing import Any, Final, TypeAlias

from kvtier.errors import ConfigError

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin")
CODE_SUFFIX: Final = ".py"
ADAPTER_CONFIG: Final = "adapter_config.json"
"""Beside weights: what some models compute with, and how others apply an adapter."""
MAX_CACHED_DIGESTS: Final = 4096
SETTLED_NS: Final = 2_000_000_000
"""A file changed less than this ago may change again within one tick of its mtime; its digest is not cached."""

VOLATILE_SETTINGS: Final = frozenset({"_name_or_path", "name_or_path", "transformers_version", "use_cache"})
"""Settings of a config that cannot change what a model computes."""

Cached: TypeAlias = dict[str, tuple[int, int, str]]
"""Path -> (size in bytes, mtime_ns, SHA-256 in hex)."""


def model_id(path_or_model: Any) -> str:
    """An opaque id that changes whenever the KV of the model would: other weights, another config, another dtype.

    A path is a directory as ``save_pretrained`` writes it; its config.json, weight files, code of its own (*.py) and
    adapter_config.json are hashed, once for every (path, size, mtime_ns): digests are remembered in
    ``$XDG_CACHE_HOME/kvtier/digests.json``. A model is hashed in memory: its config and the names, dtypes, shapes and
    bytes of its state_dict. A path and the model that was loaded from it have different ids. What no file of a model
    says is left to whoever names it: another attention implementation rounds differently.

    Raises:
        ConfigError: there is no config or no weights at the path, the config is not one, or the weights of the model
            are not in memory.
    """
    if isinstance(path_or_model, (str, os.PathLike)):
        return _digest_of_files(Path(path_or_model))
    if hasattr(path_or_model, "state_dict") and hasattr(path_or_model, "config"):
        return _digest_of_model(path_or_model)
    raise ConfigError(
        f"path_or_model is a {type(path_or_model).__name__}: "
        f"pass a model's directory, or a model that has a config and a state_dict"
    )


def _digest_of_files(directory: Path) -> str:
    config = directory / "config.json"
    if not config.is_file():
        raise ConfigError(f"{directory}: no config.json there; pass the local directory that holds config and weights")
    files = sorted(path for path in directory.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix in WEIGHT_SUFFIXES]
    others = [path for path in files if path.suffix == CODE_SUFFIX or path.name == ADAPTER_CONFIG]
    if not weights:
        raise ConfigError(f"{directory}: no weights there ({' or '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)})")
    cache_path = _cache_path()
    cached = _load_cache(cache_path)
    known = dict(cached)
    fields = [b"kvtier-model-files-1", _config_bytes(_settings_in(config))]
    for path in weights + others:
        fields += [path.name.encode(), bytes.fromhex(_file_digest(path, cached))]
    if cached != known:
        _save_cache(cache_path, cached)
    return _digest(fields)


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}; is the model's directory complete?") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: holds a {type(settings).__name__}, want the object that save_pretrained writes")
    return settings


def _file_digest(path: Path, cached: Cached) -> str:
    """SHA-256 of a file in hex, from ``cached`` where size and mtime agree, else read and put there."""
    name = str(path.resolve())
    before = path.stat()
    found = cached.get(name)
    if found and found[:2] == (before.st_size, before.st_mtime_ns):
        return found[2]
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConfigError(f"{path}: changed while it was read; try again when the weights are complete")
    cached.pop(name, None)
    if time.time_ns() - after.st_mtime_ns > SETTLED_NS:
        cached[name] = (after.st_size, after.st_mtime_ns, digest)
    return digest


def _digest_of_model(model: Any) -> str:
    import torch

    fields = [b"kvtier-model-memory-1", _config_bytes(model.config.to_dict())]
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            raise ConfigError(f"{name}: is on the meta device; load the weights before asking for the model id")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode()
        fields += [head, sha256(data).digest()]
    return _digest(fields)


def _config_bytes(settings: dict[str, Any]) -> bytes:
    lasting = {key: value for key, value in settings.items() if key not in VOLATILE_SETTINGS}
    return json.dumps(lasting, sort_keys=True, default=str).encode()


def _digest(fields: Iterable[bytes]) -> str:
    return sha256(b"".join(pack("<Q", len(field)) + field for field in fields)).hexdigest()


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "kvtier" / "digests.json"


def _load_cache(path: Path) -> Cached:
    """What was remembered; nothing where the file is missing or is not what was written here."""
    try:
        entries = json.loads(path.read_bytes())
        return {str(name): (int(size), int(mtime), _hex32(digest)) for name, (size, mtime, digest) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _hex32(digest: str) -> str:
    if len(bytes.fromhex(digest)) != sha256().digest_size:
        raise ValueError(digest)
    return digest


def _save_cache(path: Path, cached: Cached) -> None:
    """Replace the file in one step; a cache that cannot be written costs time and nothing else."""
    newest = dict(list(cached.items())[-MAX_CACHED_DIGESTS:])
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".digests-")
        with os.fdopen(handle, "w") as file:
            json.dump(newest, file)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
