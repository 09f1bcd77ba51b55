"""The names that others rely on. Removing or renaming one breaks their code: see CHANGELOG.md before you do."""

from __future__ import annotations

import re
import subprocess
import sys
from inspect import cleandoc, isfunction

import pytest

import kvtier
from kvtier import errors

PUBLIC = {
    "CacheManager",
    "CapacityError",
    "ClosedError",
    "Config",
    "ConfigError",
    "CorruptBlockError",
    "DenseKV",
    "Hit",
    "Job",
    "KVGroup",
    "KVLayout",
    "KVTierError",
    "Keys",
    "LoadResult",
    "PagedTensors",
    "Part",
    "PrefetchResult",
    "Reuse",
    "StoreResult",
    "TierError",
    "TieredCache",
    "load_config",
    "model_id",
}


def test_the_public_names_are_these() -> None:
    assert set(kvtier.__all__) == PUBLIC


def test_every_public_name_is_there_and_documented() -> None:
    assert [name for name in kvtier.__all__ if not getattr(kvtier, name).__doc__] == []


def test_dir_shows_the_public_names() -> None:
    assert set(dir(kvtier)) >= PUBLIC


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(kvtier, "CacheManger")


def test_every_error_is_public_and_has_one_root() -> None:
    raised = {name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, Exception)}
    assert raised <= PUBLIC
    assert all(issubclass(getattr(kvtier, name), kvtier.KVTierError) for name in raised)
    assert issubclass(kvtier.ConfigError, ValueError)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, kvtier; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("face", [kvtier.TieredCache, kvtier.CacheManager], ids=lambda face: face.__name__)
def test_every_verb_of_a_cache_says_by_itself_what_it_does_and_raises(face: type) -> None:
    """``help()`` of one does not send its reader to the other. What is left out raises nothing of its own."""
    docs = {name: item.__doc__ or "" for name, item in vars(face).items() if isfunction(item) and name[0] != "_"}
    silent = {"client", "close", "let_go", "pump", "release"}
    assert [name for name, doc in docs.items() if "Raises:" not in doc and name not in silent] == []
    assert [name for name, doc in docs.items() if not doc or "As ``TieredCache" in doc] == []


def _sentences(doc: str) -> set[str]:
    """What it says the verb does, and when it raises ``ConfigError``; other errors depend on who asks, and where."""
    does, _, errors = cleandoc(doc).replace("submit_", "").partition("Raises:")
    refused = re.search(r"ConfigError: .*?(?=\n    \w+Error: |$)", errors, re.DOTALL)
    return {" ".join(sentence.split()) for sentence in [*re.split(r"(?<=[.:])\s", does), refused[0] if refused else ""]}


def test_a_verb_says_of_itself_under_asyncio_all_that_it_says_without() -> None:
    """What one of the two learned the other one would not have told."""
    core, missing = vars(kvtier.TieredCache), {}
    for name, verb in vars(kvtier.CacheManager).items():
        if name[0] == "_" or not isfunction(verb):
            continue
        same = core.get(f"submit_{name}") or core[name]
        if left_out := _sentences(same.__doc__ or "") - _sentences(verb.__doc__ or ""):
            missing[name] = left_out
    assert missing == {}
