"""What users get wrong: each has a clear error, and nothing that was stored is lost by it."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier import (
    CacheManager,
    CapacityError,
    ClosedError,
    ConfigError,
    PagedTensors,
    TieredCache,
    TierError,
    load_config,
)
from kvtier.codecs.chain import TENSOR_CODECS, chain_of
from kvtier.codecs.raw import Raw
from kvtier.core.memory import GroupPages, KVPages, PageTable
from kvtier.core.plan import ROW, Completion, Plan, PlanKind, Priority, Reason
from kvtier.runtime import system_machine
from kvtier.testing.contents import PseudoEngine, tiny_layout
from kvtier.transfer import DataPlane
from tests.cache.raising_memory import RaisingMemory

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
TOKENS = list(range(4 * SIZE + 1))


def settings(directory: Path | None = None, **host: Any) -> dict[str, Any]:
    disk = {"directories": [str(directory)], "capacity": "8MiB", "segment": "1MiB"} if directory else {}
    return {"host": {"capacity": "1MiB", "staging": "1MiB"} | host, "disk": disk}


def stored(cache: TieredCache) -> PseudoEngine:
    engine = PseudoEngine(LAYOUT, 8)
    keys = cache.keys(TOKENS)
    engine.write(keys, range(4))
    durability = "process" if cache.config.disk.directories else "memory"
    assert cache.submit_store(keys, engine.pages, durability=durability).result(30).stored == 4 * SIZE
    return engine


def still_there(cache: TieredCache) -> bool:
    engine = PseudoEngine(LAYOUT, 8)
    with cache.lookup(TOKENS) as hit:
        ok_tokens = cache.submit_load(hit, engine.pages).result(30).ok_tokens
        return ok_tokens == 4 * SIZE and not engine.wrong_blocks(hit.keys, range(4))


@pytest.fixture
def memory_cache() -> Iterator[TieredCache]:
    with TieredCache(settings(), LAYOUT, "m") as cache:
        yield cache


def test_a_block_larger_than_the_host_tier_is_refused_with_the_size_it_takes() -> None:
    with pytest.raises(CapacityError, match=r"host\.capacity = 4096: one block of this model takes 8192 bytes"):
        TieredCache(settings(capacity=4096), LAYOUT, "m")


@pytest.mark.parametrize("high", [0.9, 0.58])
def test_a_host_tier_of_the_least_size_that_is_asked_for_keeps_a_block(high: float) -> None:
    layout = tiny_layout(dim=1 << 14)  # blocks of 1 MiB
    marks = {"high_watermark": high, "low_watermark": 0.5}
    with pytest.raises(CapacityError) as refused:
        TieredCache(settings(capacity="1MiB", **marks), layout, "m")
    least = re.search(r"set it to at least (\d+)", str(refused.value))
    assert least is not None
    with pytest.raises(CapacityError):
        TieredCache(settings(capacity=int(least[1]) - 4096, **marks), layout, "m")
    with TieredCache(settings(capacity=int(least[1]), staging="16MiB", **marks), layout, "m") as cache:
        engine = PseudoEngine(layout, 1)
        assert cache.submit_store(TOKENS[: layout.block_tokens], engine.pages).result(60).stored == layout.block_tokens
        cache.submit_prefetch(TOKENS).result(60)  # by then room has been made ahead, if any was wanted
        assert cache.match(TOKENS) == layout.block_tokens


@pytest.mark.parametrize("capacity", ["512KiB", "16MiB"], ids=["of less than a block", "of less than a few segments"])
def test_a_disk_tier_too_small_for_blocks_of_this_size_is_refused_with_the_remedy(
    tmp_path: Path, capacity: str
) -> None:
    config = settings(tmp_path, capacity="4MiB")
    config["disk"] |= {"capacity": capacity, "segment": "auto"}
    with pytest.raises(CapacityError, match=r"disk\.capacity = .* set it to at least \d+"):
        TieredCache(config, tiny_layout(dim=1 << 14), "m")  # of blocks of 1 MiB
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [[1, 2, -1], [1, 2**31], np.array([1, -5]), np.array([[1, 2]]), [1.5], ["a"]])
def test_token_ids_out_of_range_or_of_another_type_are_refused(memory_cache: TieredCache, tokens: Any) -> None:
    stored(memory_cache)
    with pytest.raises(ConfigError, match="token"):
        memory_cache.lookup(tokens)
    assert still_there(memory_cache)


def test_pages_that_are_too_few_are_refused_with_the_number_it_takes(memory_cache: TieredCache) -> None:
    engine = stored(memory_cache)
    with memory_cache.lookup(TOKENS) as hit, pytest.raises(ConfigError, match="4 pages"):
        memory_cache.submit_load(hit, engine.memory.pages([0, 1]))
    assert still_there(memory_cache)
    assert memory_cache.stats()["memories"] == 0


def test_pages_of_another_layout_are_refused(memory_cache: TieredCache) -> None:
    stored(memory_cache)
    other = tiny_layout(dim=16)
    with memory_cache.lookup(TOKENS) as hit, pytest.raises(ConfigError, match="layout"):
        memory_cache.submit_load(hit, PseudoEngine(other, 8).pages)
    assert still_there(memory_cache)


def test_tensors_of_another_shape_are_refused_with_the_part_they_are_for() -> None:
    with pytest.raises(ConfigError, match="layer 0 k"):
        PagedTensors(LAYOUT, [np.zeros((4, 16, 2, 8), np.float16)] * 2)


def test_something_else_than_pages_is_refused(memory_cache: TieredCache) -> None:
    with memory_cache.lookup(TOKENS) as hit, pytest.raises(ConfigError, match="KVPages"):
        memory_cache.submit_load(hit, [1, 2, 3])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tokens", [{"stop": 65}, {"start": 65}, {"start": 2**70}, {"start": -1}, {"start": 9, "stop": 8}]
)
def test_a_range_outside_the_hit_is_refused(memory_cache: TieredCache, tokens: dict[str, int]) -> None:
    engine = stored(memory_cache)
    with memory_cache.lookup(TOKENS) as hit, pytest.raises(ConfigError, match=r"the hit holds tokens \[0, 64\)"):
        memory_cache.submit_load(hit, engine.pages, **tokens)


@pytest.mark.parametrize("tokens", [(70, 90), (64, 100), (99, 100)])
def test_a_range_behind_a_hit_that_ends_before_its_start_is_refused(
    memory_cache: TieredCache, tokens: tuple[int, int]
) -> None:
    """Nothing would be read, and all of it reported as loaded."""
    engine = stored(memory_cache)
    with memory_cache.lookup([*TOKENS, *range(100)], start=100) as hit:
        assert hit.num_tokens <= 100
        with pytest.raises(ConfigError, match="the hit holds tokens"):
            memory_cache.submit_load(hit, engine.pages, start=tokens[0], stop=tokens[1])
        assert memory_cache.submit_load(hit, engine.pages).result(60).ok_tokens == 100


@pytest.mark.parametrize("groups", [None, (), (GroupPages(0, [0, 1]),), (GroupPages(0, np.zeros(2, np.int64)),)])  # type: ignore[arg-type]
def test_a_table_that_is_none_is_refused_also_where_no_block_is_full(memory_cache: TieredCache, groups: Any) -> None:
    memory = PseudoEngine(LAYOUT, 8).memory
    with pytest.raises(ConfigError, match="page table"):
        memory_cache.submit_store([1, 2, 3], KVPages(memory, PageTable(-1, groups)))
    assert memory_cache.stats()["memories"] == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda cache, pages: cache.submit_store(TOKENS, pages, durability="forever"),
        lambda cache, pages: cache.submit_load(cache.lookup(TOKENS), pages, priority="urgent"),
        lambda cache, pages: cache.submit_prefetch(TOKENS, to="device"),
        lambda cache, pages: cache.submit_store(TOKENS, pages, start=-1),
        lambda cache, pages: cache.lookup(TOKENS, start=1000),
    ],
)
def test_unknown_words_and_positions_are_refused(memory_cache: TieredCache, call: Any) -> None:
    engine = stored(memory_cache)
    with pytest.raises(ConfigError):
        call(memory_cache, engine.pages)


@pytest.mark.parametrize("model_id", ["", None, 7])
def test_a_model_id_that_says_nothing_is_refused(model_id: Any) -> None:
    with pytest.raises(ConfigError, match="model_id"):
        TieredCache(settings(), LAYOUT, model_id)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(TierError, match="file"):
        TieredCache(settings(tmp_path / "file" / "kv"), LAYOUT, "m")
    assert (tmp_path / "file").read_text() == "not a directory"


OTHER_PROCESS = """
import sys
from kvtier import TieredCache, TierError
from kvtier.testing.contents import tiny_layout
try:
    TieredCache(eval(sys.argv[1]), tiny_layout(), "m")
except TierError as error:
    print(error)
"""


def test_a_directory_that_another_process_uses_is_refused_there(tmp_path: Path) -> None:
    """The second process gets the error; the first goes on with everything it has."""
    with TieredCache(settings(tmp_path), LAYOUT, "m") as cache:
        stored(cache)
        command = [sys.executable, "-c", OTHER_PROCESS, repr(settings(tmp_path))]
        output = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
        assert "in use" in output
        assert still_there(cache)
    with TieredCache(settings(tmp_path), LAYOUT, "m") as cache:
        assert still_there(cache)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_file_system_that_is_full_costs_no_block_that_fits(small_tmpfs: Path) -> None:
    """The tier shrinks to what there is room for, or says that there is too little; memory goes on."""
    config = settings(small_tmpfs)
    config["disk"]["capacity"] = "64MiB"
    with TieredCache(config, LAYOUT, "m") as cache:
        engine = PseudoEngine(LAYOUT, 8)
        for number in range(200):
            keys = cache.keys([number] * (8 * SIZE))
            engine.write(keys, range(8))
            result = cache.submit_store(keys, engine.pages).result(30)
            assert result.stored + result.refused == 8 * SIZE
        cache.flush("process", 30)  # until then host memory may be full of blocks that the disk is to get
        stored(cache)
        assert still_there(cache)


def test_a_directory_that_is_too_small_to_begin_with_is_refused(small_tmpfs: Path) -> None:
    (small_tmpfs / "filler").write_bytes(b"x" * (2900 << 10))
    with pytest.raises((TierError, CapacityError), match=r"small"):
        TieredCache(settings(small_tmpfs), LAYOUT, "m")


def test_a_directory_that_is_removed_while_in_use_degrades_to_misses(tmp_path: Path) -> None:
    """Loads end with what is in memory, stores go on, nothing raises and nothing hangs."""
    directory = tmp_path / "kv"
    with TieredCache(settings(directory, capacity="128KiB"), LAYOUT, "m") as cache:
        engine = PseudoEngine(LAYOUT, 8)
        documents = [cache.keys([number] * (8 * SIZE)) for number in range(8)]
        for keys in documents:
            engine.write(keys, range(8))
            cache.submit_store(keys, engine.pages, durability="process").result(30)
        shutil.rmtree(directory)
        for _ in range(3):
            for keys in documents:
                with cache.lookup(keys) as hit:
                    engine.wipe()
                    ok_tokens = cache.submit_load(hit, engine.pages).result(30).ok_tokens
                    assert engine.wrong_blocks(keys, range(ok_tokens // SIZE)) == []
                engine.write(keys, range(8))
                assert cache.submit_store(keys, engine.pages).result(30) is not None


def test_a_closed_cache_says_so_and_a_second_close_is_harmless() -> None:
    cache = TieredCache(settings(), LAYOUT, "m")
    engine = stored(cache)
    hit = cache.lookup(TOKENS)
    assert cache.close() is True
    assert cache.close() is True
    for call in (
        lambda: cache.match(TOKENS),
        lambda: cache.lookup(TOKENS),
        lambda: cache.submit_load(hit, engine.pages),
        lambda: cache.submit_store(TOKENS, engine.pages),
        lambda: cache.submit_prefetch(TOKENS),
        lambda: cache.set_weights_version("v"),
    ):
        with pytest.raises(ClosedError):
            call()
    hit.release()


async def test_a_closed_manager_says_so() -> None:
    async with CacheManager(settings(), LAYOUT, "m") as cache:
        pass
    with pytest.raises(ClosedError):
        cache.lookup(TOKENS)


def test_a_model_whose_placement_changed_gets_a_new_directory_and_the_old_one_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Same name, other layout: nothing of the old one is read, nothing is deleted, and a warning names it."""
    with TieredCache(settings(tmp_path), LAYOUT, "m") as cache:
        stored(cache)
    changed = tiny_layout(dim=16)
    with caplog.at_level(logging.WARNING), TieredCache(settings(tmp_path), changed, "m") as cache:
        assert cache.match(TOKENS) == 0
    assert LAYOUT.placement[:12] in caplog.text
    with TieredCache(settings(tmp_path), LAYOUT, "m") as cache:
        assert still_there(cache)


def test_a_hit_of_another_cache_is_refused(memory_cache: TieredCache) -> None:
    """Entry numbers mean nothing in another cache: loading by them would bring other tokens' KV."""
    engine = stored(memory_cache)
    with TieredCache(settings(), LAYOUT, "m") as other, other.lookup(TOKENS) as hit:
        with pytest.raises(ConfigError, match="this very cache"):
            memory_cache.submit_load(hit, engine.pages)
        with pytest.raises(ConfigError, match="this very cache"):
            memory_cache.submit_store(TOKENS, engine.pages, derived_from=hit)
    assert memory_cache.stats()["memories"] == 0


@pytest.mark.parametrize("names", [{"tenant": 5}, {"adapter": None}, {"tenant": "\ud800"}])
def test_names_that_are_not_text_are_refused(memory_cache: TieredCache, names: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(names))):
        memory_cache.lookup(TOKENS, **names)


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), "soon"])
def test_a_deadline_that_is_no_time_is_refused(memory_cache: TieredCache, deadline_s: Any) -> None:
    engine = stored(memory_cache)
    with memory_cache.lookup(TOKENS) as hit, pytest.raises(ConfigError, match="deadline_s"):
        memory_cache.submit_load(hit, engine.pages, deadline_s=deadline_s)


@pytest.mark.parametrize("start", [-16, 10**9, 1.5])
def test_match_refuses_what_lookup_refuses(memory_cache: TieredCache, start: Any) -> None:
    for verb in (memory_cache.match, memory_cache.lookup):
        with pytest.raises(ConfigError, match="start"):
            verb(TOKENS, start=start)


# --- page tables of registered memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[0, -1, 2, 3, 4], [3, 3, 1, 2, 4], [0, 1, 2, 10**6, 4], [0, 1]])
def test_a_page_table_of_registered_memory_is_checked_like_any_other(memory_cache: TieredCache, ids: list[int]) -> None:
    engine = stored(memory_cache)
    table = PageTable(memory_cache.register(engine.memory), (GroupPages(0, np.array(ids, np.int32)),))
    before = [tensor.tobytes() for tensor in engine.tensors]
    with pytest.raises(ConfigError, match="page"):
        memory_cache.submit_store([7] * (4 * SIZE), table)
    with memory_cache.lookup(TOKENS) as hit, pytest.raises(ConfigError, match="page"):
        memory_cache.submit_load(hit, table)
    assert before == [tensor.tobytes() for tensor in engine.tensors]
    assert still_there(memory_cache)


def test_a_page_table_of_memory_that_nobody_registered_is_refused(memory_cache: TieredCache) -> None:
    table = PageTable(17, (GroupPages(0, np.arange(5, dtype=np.int32)),))
    with pytest.raises(ConfigError, match="memory 17 is not registered"):
        memory_cache.submit_store(TOKENS, table)


def test_a_data_plane_that_gets_plans_from_elsewhere_checks_their_tables() -> None:
    machine, engine = system_machine("threads"), PseudoEngine(LAYOUT, 4)
    plane = DataPlane(load_config(settings()), LAYOUT, machine)
    rows = np.zeros(2, ROW)
    rows["block"], rows["target_page"], rows["target_pages"] = [0, 1], [0, 2], 2
    for number, ids in enumerate(([0, -1], [0, 9], [1, 1], [0])):
        table = PageTable(plane.register(engine.memory), (GroupPages(0, np.array(ids, np.int32)),))
        plane.submit([Plan(number, 0, PlanKind.STORE, Priority.DEMAND, rows, pages=table, stop=2 * SIZE)])
        ended = [message for message in plane.poll() if isinstance(message, Completion)]
        assert [set(message.rows["reason"].tolist()) for message in ended] == [{Reason.REFUSED}]
    assert plane.close(30)


# --- what callers do in the middle of things --------------------------------------------------------------------------


def test_a_store_from_beyond_the_last_full_block_has_nothing_to_do(memory_cache: TieredCache) -> None:
    engine = PseudoEngine(LAYOUT, 2)
    pages = engine.memory.pages([0, 1])
    result = memory_cache.submit_store([1] * (SIZE + 3), pages, start=SIZE + 1).result(30)
    assert (result.stored, result.refused, result.failed) == (0, 0, {})


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_engine_memory_that_throws_anything_fails_its_blocks_and_costs_no_thread(
    memory_cache: TieredCache, error: type[BaseException]
) -> None:
    engine = PseudoEngine(LAYOUT, 4)
    keys = memory_cache.keys(TOKENS)
    engine.write(keys, range(4))
    for number in range(4):
        memory = RaisingMemory(engine.memory, "gather", error(), times=1)
        result = memory_cache.submit_store([number] * SIZE, KVPages(memory, engine.pages.table)).result(30)
        assert (result.stored, result.refused) == (0, SIZE)
    assert memory_cache.submit_store(keys, engine.pages).result(30).refused == 0
    assert still_there(memory_cache)
    assert memory_cache.stats()[f"failed_pieces{{error={error.__name__}}}"] == 4


def test_a_callback_that_raises_costs_no_thread(memory_cache: TieredCache) -> None:
    engine = PseudoEngine(LAYOUT, 64)
    for number in range(4):
        job = memory_cache.submit_store([number] * (64 * SIZE), engine.pages)
        job.call_on_news(lambda _: 1 / 0, unless=lambda: False)
        assert job.result(30).stored == 64 * SIZE
    stored(memory_cache)
    assert still_there(memory_cache)


def test_a_weights_version_that_is_no_string_is_refused(memory_cache: TieredCache) -> None:
    with pytest.raises(ConfigError, match="weights_version = None"):
        memory_cache.set_weights_version(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["tenant", "adapter"])
def test_keys_of_one_tenant_or_adapter_are_not_taken_for_those_of_another(word: str) -> None:
    tokens = [1] * (2 * LAYOUT.block_tokens)
    with TieredCache(settings(), LAYOUT, "m") as cache:
        keys = cache.keys(tokens, **{word: "one"})
        assert cache.match(keys) == cache.match(keys, **{word: "one"}) == 0
        with pytest.raises(ConfigError, match=f"{word} = 'other': these keys were made for {word} 'one'"):
            cache.match(keys, **{word: "other"})
        with pytest.raises(ConfigError, match=f"these keys were made for {word} ''"):
            cache.lookup(cache.keys(tokens), **{word: "other"})


@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_keys_of_another_model_are_refused_by_every_verb(memory_cache: TieredCache, kind: str) -> None:
    """What is stored under them would be an answer for that model, if both use one directory."""
    with TieredCache(settings(), LAYOUT, "another") as other:
        keys = other.keys(TOKENS) if kind == "own" else other.foreign_keys([b"a", b"b"], engine="e")
    engine = PseudoEngine(LAYOUT, 8)
    for verb in (
        memory_cache.match,
        memory_cache.lookup,
        memory_cache.submit_prefetch,
        lambda keys: memory_cache.submit_store(keys, engine.pages),
    ):
        with pytest.raises(ConfigError, match="made for model 'another', the cache is of 'm'"):
            verb(keys)
    assert memory_cache.stats()["entries"] == memory_cache.stats()["memories"] == 0


@pytest.mark.parametrize(("section", "codec"), [("host", "half"), ("disk", "half+lz4"), ("host", "raw+lz4")])
def test_a_codec_that_nobody_would_apply_is_refused(monkeypatch: pytest.MonkeyPatch, section: str, codec: str) -> None:
    """One that was added to the registry and to the choices: records would say that they hold what they do not."""
    monkeypatch.setitem(TENSOR_CODECS, "half", Raw("half", exact=False))
    config = load_config({})
    named = getattr(config, section).model_copy(update={"codec": codec})
    with pytest.raises(ConfigError, match=rf"{section}\.codec = '{re.escape(codec)}': .* use 'raw'"):
        TieredCache(config.model_copy(update={section: named}), tiny_layout(), "m")
    chain_of.cache_clear()
