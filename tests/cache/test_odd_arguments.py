"""Arguments of odd types: each is refused by name or understood, and neither a block nor a thread is lost by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvtier import CacheManager, ClosedError, ConfigError, TieredCache
from kvtier.core.memory import GroupPages, KVPages, PageTable
from kvtier.testing.contents import PseudoEngine, tiny_layout

LAYOUT = tiny_layout()
SIZE = LAYOUT.block_tokens
TOKENS = list(range(4 * SIZE + 1))
SETTINGS = {"host": {"capacity": "1MiB", "staging": "1MiB"}}
NOT_A_POSITION = [1.0, np.float32(0), float("nan"), True, np.True_, "0", [0], {}]
NOT_A_WORD = [None, 1, True, [], {}, "MEMORY"]
NOT_A_TIME = [0, -1, float("nan"), float("inf"), 10**400, 1e308, True, "1", []]
NO_PATIENCE = [float("nan"), True, np.True_, "1", b"1", [1], {}, object()]
NO_TOKENS = [[[1, 2], [3]], [1.0], ["a"], "abc", b"abc", {1, 2}, {1: 2}, 5, None, [None], [True] * SIZE, object()]


class Opened:
    """A cache that holds the blocks of ``TOKENS``, and one way to call each verb that takes arguments."""

    def __init__(self) -> None:
        self.cache = TieredCache(SETTINGS, LAYOUT, "m")
        self.engine = PseudoEngine(LAYOUT, 8)
        keys = self.cache.keys(TOKENS)
        self.engine.write(keys, range(4))
        assert self.cache.submit_store(keys, self.engine.pages).result(30).stored == 4 * SIZE

    def load(self, **arguments: Any) -> Any:
        with self.cache.lookup(TOKENS) as hit:
            return self.cache.submit_load(hit, self.engine.pages, **arguments)

    def store(self, tokens: Any = (7,) * SIZE, **arguments: Any) -> Any:
        return self.cache.submit_store(tokens, self.engine.pages, **arguments)

    def is_whole(self) -> bool:
        """Everything is there, nothing is held, and the threads go on."""
        self.engine.wipe()
        with self.cache.lookup(TOKENS) as hit:
            ok_tokens = self.cache.submit_load(hit, self.engine.pages).result(30).ok_tokens
            exact = not self.engine.wrong_blocks(hit.keys, range(4))
        stats = self.cache.stats()
        left = [stats[level] for level in ("leases", "hops", "pinned_entries", "jobs", "memories")]
        return ok_tokens == 4 * SIZE and exact and not any(left)


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    opened = Opened()
    with opened.cache:
        yield opened


def refused(opened: Opened, name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=name):
        call()
    assert opened.is_whole()


@pytest.mark.parametrize("value", NOT_A_POSITION, ids=repr)
def test_positions_are_integers(opened: Opened, value: Any) -> None:
    refused(opened, "start = ", lambda: opened.cache.lookup(TOKENS, start=value))
    refused(opened, "start = ", lambda: opened.cache.match(TOKENS, start=value))
    refused(opened, "start = ", lambda: opened.store(start=value))
    refused(opened, "start = ", lambda: opened.load(start=value))
    refused(opened, "stop = ", lambda: opened.load(stop=value))


def test_positions_may_be_numpy_integers(opened: Opened) -> None:
    with opened.cache.lookup(TOKENS, start=np.int64(SIZE)) as hit:
        assert hit.by_tier["host"] == 3 * SIZE
    assert opened.load(start=np.int32(SIZE), stop=np.int64(2 * SIZE)).result(30).ok_tokens == 2 * SIZE
    assert opened.is_whole()


@pytest.mark.parametrize("value", ["yes", "no", 1, None, []], ids=repr)
def test_exact_is_true_or_false(opened: Opened, value: Any) -> None:
    refused(opened, "exact = ", lambda: opened.cache.lookup(TOKENS, exact=value))
    refused(opened, "exact = ", lambda: opened.cache.match(TOKENS, exact=value))


@pytest.mark.parametrize("value", [[1], {}, (1, [2])], ids=repr)
def test_an_owner_can_be_found_again(opened: Opened, value: Any) -> None:
    refused(opened, "owner = ", lambda: opened.cache.lookup(TOKENS, owner=value))


@pytest.mark.parametrize("value", [1, [], {}, b"chat"], ids=repr)
def test_a_session_is_a_name(opened: Opened, value: Any) -> None:
    refused(opened, "session = ", lambda: opened.cache.lookup(TOKENS, session=value))
    refused(opened, "session = ", lambda: opened.store(session=value))
    refused(opened, "session = ", lambda: opened.cache.session(value))


@pytest.mark.parametrize(
    "value", [-1, float("nan"), float("inf"), 10**400, True, "abc", None, []], ids=lambda value: repr(value)[:8]
)
def test_hints_are_numbers_of_seconds(opened: Opened, value: Any) -> None:
    """What is refused leaves the hint that was given before."""
    session = opened.cache.session("chat")
    session.ttl(60)
    session.expect_reuse(0)
    refused(opened, "seconds = ", lambda: session.ttl(value))
    refused(opened, "after_s = ", lambda: session.expect_reuse(value))
    assert (session.hints.ttl_s, session.hints.expected_reuse_s) == (60.0, 0.0)


@pytest.mark.parametrize("value", [0, 0.5, 1e9, np.float32(2), np.int64(3)], ids=repr)
def test_hints_may_be_any_number(opened: Opened, value: Any) -> None:
    session = opened.cache.session("chat")
    session.ttl(value)
    session.expect_reuse(value)
    assert session.hints.ttl_s == session.hints.expected_reuse_s == value


@pytest.mark.parametrize("value", NOT_A_WORD, ids=repr)
def test_words_are_those_that_are_known(opened: Opened, value: Any) -> None:
    refused(opened, "durability = .*'durable'", lambda: opened.store(durability=value))
    refused(opened, "durability = .*'durable'", lambda: opened.cache.submit_flush(value))
    refused(opened, "priority = .*'prefetch'", lambda: opened.load(priority=value))
    refused(opened, "prefetch.*'host'", lambda: opened.cache.submit_prefetch(TOKENS, to=value))


@pytest.mark.parametrize("value", NOT_A_TIME, ids=lambda value: repr(value)[:8])
def test_a_deadline_is_a_number_of_seconds_that_end(opened: Opened, value: Any) -> None:
    """One that never ends would have to be planned with all the same."""
    refused(opened, "deadline_s = ", lambda: opened.load(deadline_s=value))
    refused(opened, "deadline_s = ", lambda: opened.cache.submit_prefetch(TOKENS, deadline_s=value))


@pytest.mark.parametrize("value", [1e9, np.float32(1), np.int64(2)], ids=repr)
def test_a_deadline_may_be_any_number(opened: Opened, value: Any) -> None:
    assert opened.load(deadline_s=value).result(30).ok_tokens == 4 * SIZE
    assert opened.is_whole()


@pytest.mark.parametrize("value", NO_PATIENCE, ids=lambda value: repr(value)[:8])
def test_a_timeout_is_a_number_of_seconds(opened: Opened, value: Any) -> None:
    """Whether or not there is anything left to wait for: a mistake must not show only now and then."""
    loaded = opened.load()
    loaded.result(30)
    refused(opened, "timeout = .*None", lambda: loaded.result(value))
    refused(opened, "timeout = .*None", lambda: loaded.wait_source_free(value))
    refused(opened, "timeout = .*None", lambda: loaded.wait_part(0, value))
    refused(opened, "timeout = .*None", lambda: opened.cache.flush("memory", value))
    refused(opened, "timeout_s = ", lambda: opened.cache.wait_attached(value))
    refused(opened, "timeout_s = ", lambda: opened.cache.close(value))


def test_only_what_ends_by_itself_may_be_waited_for_without_a_limit(opened: Opened) -> None:
    assert opened.load().result(None).ok_tokens == 4 * SIZE
    refused(opened, "timeout_s = None", lambda: opened.cache.wait_attached(None))  # type: ignore[arg-type]
    refused(opened, "timeout_s = None: must be a number of seconds", lambda: opened.cache.close(None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", [np.float32(30), np.int64(30), float("inf"), 10**400], ids=lambda value: repr(value)[:8]
)
def test_a_timeout_may_be_any_number(value: Any) -> None:
    cache, engine = TieredCache(SETTINGS, LAYOUT, "m"), PseudoEngine(LAYOUT, 1)
    assert cache.submit_store([1] * SIZE, engine.pages).result(value).stored == SIZE
    cache.wait_attached(value)
    assert cache.close(value)


@pytest.mark.parametrize("value", [0, -1, -0.5, float("-inf")], ids=repr)
def test_no_time_and_less_is_to_look_and_not_to_wait(value: Any) -> None:
    """What is left until a deadline that has passed: closing goes on all the same, as waiting for a job does."""
    cache, engine = TieredCache(SETTINGS, LAYOUT, "m"), PseudoEngine(LAYOUT, 1)
    job = cache.submit_store([1] * SIZE, engine.pages)
    assert job.result(30) == job.result(value)
    cache.close(value)
    with pytest.raises(ClosedError):
        cache.match(TOKENS)
    assert cache.close(30)


@pytest.mark.parametrize("value", NO_TOKENS, ids=lambda value: repr(value)[:12])
def test_tokens_are_one_dimension_of_integers(opened: Opened, value: Any) -> None:
    refused(opened, "token", lambda: opened.cache.lookup(value))
    refused(opened, "token", lambda: opened.store(value))
    refused(opened, "token", lambda: opened.cache.submit_prefetch(value))


@pytest.mark.parametrize("value", [[], (), np.zeros(0), range(0)], ids=repr)
def test_no_tokens_at_all_are_a_sequence_without_blocks(opened: Opened, value: Any) -> None:
    with opened.cache.lookup(value) as hit:
        assert hit.num_tokens == 0
    assert opened.store(value).result(30).stored == 0
    assert opened.cache.submit_prefetch(value).result(30).fetched == 0
    assert opened.is_whole()


@pytest.mark.parametrize("value", ["a\nb", "\0", "\ud800", None, 5, b"acme", ["acme"]], ids=repr)
def test_a_tenant_is_a_string_of_printable_characters(opened: Opened, value: Any) -> None:
    refused(opened, "tenant = ", lambda: opened.cache.lookup(TOKENS, tenant=value))
    refused(opened, "adapter = ", lambda: opened.store(adapter=value))


@pytest.mark.parametrize("value", [None, 5, "acme"], ids=repr)
def test_keys_say_themselves_whose_they_are(opened: Opened, value: Any) -> None:
    keys = opened.cache.keys(TOKENS)
    refused(opened, "tenant = ", lambda: opened.cache.lookup(keys, tenant=value))
    refused(opened, "adapter = ", lambda: opened.cache.match(keys, adapter=value))


@pytest.mark.parametrize("value", ["\ud800", "a\nb", "", None, 5], ids=repr)
def test_a_model_and_its_version_have_printable_names(opened: Opened, value: Any) -> None:
    with pytest.raises(ConfigError, match="model_id = "):
        TieredCache(SETTINGS, LAYOUT, value)
    if value != "":
        refused(opened, "weights_version = ", lambda: opened.cache.set_weights_version(value))


@pytest.mark.parametrize("value", [None, "llama", {}, [LAYOUT]], ids=lambda value: type(value).__name__)
def test_a_layout_is_a_layout(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"layout = .*from_hf_config"):
        TieredCache(SETTINGS, value, "m")


@pytest.mark.parametrize("value", [SIZE // 2, 2 * SIZE])
def test_a_size_of_blocks_that_was_set_is_that_of_the_layout(value: int) -> None:
    """A cache goes by its layout: what was set would have no effect, and nobody would know."""
    with pytest.raises(ConfigError, match=rf"^block_tokens = {value}: the layout has {SIZE}"):
        TieredCache({**SETTINGS, "block_tokens": value}, LAYOUT, "m")


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "block_tokens": 64}, {**SETTINGS, "block_tokens": SIZE}])
def test_the_default_size_of_blocks_goes_with_any_layout(settings: dict[str, Any]) -> None:
    """configs/default.toml writes every key down, and is where many start from."""
    with TieredCache(settings, LAYOUT, "m") as cache:
        assert cache.keys(TOKENS).block_tokens == SIZE


@pytest.mark.parametrize("value", ["acme/eu", "../..", "é", "x" * 100_000], ids=lambda value: value[:8])
def test_a_tenant_may_be_called_anything_else(opened: Opened, value: str) -> None:
    assert opened.cache.match(TOKENS, tenant=value) == 0


@pytest.mark.parametrize("value", [5, "queue", object()], ids=lambda value: type(value).__name__)
def test_a_client_is_one_of_the_caches(opened: Opened, value: Any) -> None:
    """Its jobs would end on a thread of ours."""
    refused(opened, "client = ", lambda: opened.load(client=value))
    refused(opened, "client = ", lambda: opened.store(client=value))
    refused(opened, "client = ", lambda: opened.cache.submit_prefetch(TOKENS, client=value))
    refused(opened, "client = ", lambda: opened.cache.submit_flush("memory", client=value))


@pytest.mark.parametrize(
    "groups",
    [
        None,
        (1,),
        (GroupPages(0, [0, 1]),),  # type: ignore[arg-type]
        [GroupPages(0, np.arange(5, dtype=np.int32))],
        (GroupPages(0.0, np.arange(5, dtype=np.int32)),),  # type: ignore[arg-type]
        (GroupPages(0, np.arange(5)),),  # type: ignore[arg-type]
    ],
)
def test_a_page_table_is_made_of_int32_arrays(opened: Opened, groups: Any) -> None:
    for pages in (KVPages(opened.engine.memory, PageTable(-1, groups)), KVPages(opened.engine.memory, groups)):
        refused(opened, "page", lambda pages=pages: opened.cache.submit_store([3] * SIZE, pages))  # type: ignore[misc]
    memory_id = opened.cache.register(opened.engine.memory)
    with pytest.raises(ConfigError, match="page table"):
        opened.cache.submit_store([3] * SIZE, PageTable(memory_id, groups))
    opened.cache.unregister(opened.engine.memory)
    assert opened.is_whole()


@pytest.mark.parametrize("value", [None, 5, "memory", object()], ids=lambda value: type(value).__name__)
def test_engine_memory_is_engine_memory(opened: Opened, value: Any) -> None:
    table = opened.engine.pages.table
    refused(opened, "memory = ", lambda: opened.cache.register(value))
    refused(opened, "pages: want", lambda: opened.cache.submit_store([3] * SIZE, KVPages(value, table)))
    refused(opened, "memory .* is not registered", lambda: opened.cache.submit_store([3] * SIZE, PageTable([], ())))  # type: ignore[arg-type]


async def test_a_manager_refuses_what_its_cache_refuses() -> None:
    async with CacheManager(SETTINGS, LAYOUT, "m") as cache:
        engine = PseudoEngine(LAYOUT, 4)
        for call in (
            lambda: cache.match(TOKENS, start=1.0),  # type: ignore[arg-type]
            lambda: cache.lookup(TOKENS, owner=[1]),
            lambda: cache.load(cache.lookup(TOKENS), engine.pages, priority=1),  # type: ignore[arg-type]
            lambda: cache.load(cache.lookup(TOKENS), engine.pages, deadline_s=float("inf")),
            lambda: cache.store([1] * SIZE, engine.pages, durability=None),  # type: ignore[arg-type]
            lambda: cache.prefetch([[1], [2, 3]], deadline_s=-1),
            lambda: cache.foreign_keys(["raw"], engine="e"),  # type: ignore[list-item]
            lambda: cache.flush([]),  # type: ignore[arg-type]
        ):
            with pytest.raises(ConfigError):
                call()
        with pytest.raises(ConfigError, match="timeout_s = None"):
            await cache.close(None)  # type: ignore[arg-type]
        assert (await cache.store([1] * SIZE, engine.pages)).stored == SIZE


def test_lookups_and_stores_of_a_session_are_recorded(opened: Opened) -> None:
    """For policies: what it used last, and how long it has become."""
    hints = opened.cache.session("chat").hints
    opened.cache.lookup(TOKENS, session="chat").release()
    assert (hints.last_key, hints.tokens) == (opened.cache.keys(TOKENS).digests[-1], len(TOKENS))
    longer = opened.cache.keys([7] * SIZE)
    opened.store(longer, session="chat").result(30)
    assert (hints.last_key, hints.tokens) == (longer.digests[-1], SIZE)
