"""What callers pass in words and numbers, checked before anything is planned."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, TypeVar

from kvtier.codecs.chain import chain_of
from kvtier.config import MOST_SECONDS, Config
from kvtier.core.checks import at_least, is_number, whole
from kvtier.core.keys import Keys
from kvtier.core.plan import Priority
from kvtier.errors import ConfigError
from kvtier.models.layout import KVLayout
from kvtier.planner import Durability

T = TypeVar("T")
_PRIORITIES: Final = {"demand": Priority.DEMAND, "prefetch": Priority.PREFETCH}
_DURABILITIES: Final = {level.name.lower(): level for level in Durability}


def checked_model_id(model_id: str) -> str:
    """``model_id``.

    Raises:
        ConfigError: it is no string of printable characters, or empty.
    """
    if not isinstance(model_id, str) or not model_id or not model_id.isprintable():
        raise ConfigError(
            f"model_id = {model_id!r}: must be a string of printable characters that changes whenever the model's KV"
            " would; kvtier.model_id(model) makes one"
        )
    return model_id


def check_codecs(config: Config) -> None:
    """Refuse chains that nobody would apply: records would say of themselves what is not so.

    Raises:
        ConfigError: a tensor codec other than ``raw``, or a byte codec in host memory.
    """
    for name, chain, allowed in (
        ("host.codec", config.host.codec, "'raw'"),
        ("disk.codec", config.disk.codec, "'raw' or 'raw+' and a byte codec"),
    ):
        own = chain_of(chain)
        if own.tensor.name != "raw" or (own.byte and name == "host.codec"):
            raise ConfigError(f"{name} = {chain!r}: this version applies no such codec there; use {allowed}")


def checked_deadline_s(deadline_s: float | None, default_s: float) -> float:
    """Seconds from now.

    Raises:
        ConfigError: not a number above zero, or more than thirty years.
    """
    if deadline_s is None:
        return default_s
    if not is_number(deadline_s) or not 0 < deadline_s <= MOST_SECONDS:
        raise ConfigError(
            f"deadline_s = {deadline_s!r}: must be a number of seconds above 0 and up to {MOST_SECONDS:g}, or None"
        )
    return float(deadline_s)


def check_block_tokens(config: Config, layout: KVLayout) -> None:
    """Refuse a size of blocks that was chosen and would have no effect, as ``layout`` has another.

    The default goes with any layout: configs/default.toml writes it down for all.

    Raises:
        ConfigError: naming both.
    """
    if config.block_tokens not in (layout.block_tokens, Config.model_fields["block_tokens"].default):
        raise ConfigError(
            f"block_tokens = {config.block_tokens}: the layout has {layout.block_tokens}, and a cache goes by that:"
            " pass block_tokens=config.block_tokens to KVLayout.from_hf_config, or leave the key out"
        )


def checked_start(keys: Keys, start: int) -> int:
    """``start``.

    Raises:
        ConfigError: it is no integer in [0, num_tokens].
    """
    start, stop = whole("start", start), keys.num_tokens
    if not 0 <= start <= stop:
        raise ConfigError(f"start = {start}: must lie in [0, {stop}], the length of the sequence")
    return start


def checked_checkpoints(checkpoints: Any) -> tuple[int, ...]:
    """``checkpoints``.

    Raises:
        ConfigError: they are no list of integers from 0 on.
    """
    try:
        given = list(checkpoints)
    except TypeError:
        raise ConfigError(
            f"checkpoints = {checkpoints!r}: want numbers of tokens, such as (len(prompt), len(tokens))"
        ) from None
    return tuple(at_least(f"checkpoints[{at}]", value, 0) for at, value in enumerate(given))


def checked_name(name: str, value: str) -> str:
    """``value``, called ``name``: a tenant, an adapter, a version of the weights.

    Raises:
        ConfigError: it is no string of printable characters.
    """
    if not isinstance(value, str) or not value.isprintable():
        raise ConfigError(f"{name} = {value!r}: must be a string of printable characters")
    return value


def checked_string(name: str, value: str) -> str:
    """``value``, called ``name``: the name of a conversation.

    Raises:
        ConfigError: it is no string.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{name} = {value!r}: must be a string")
    return value


def check_owner(owner: Hashable) -> None:
    """Refuse an ``owner`` that could not be found again.

    Raises:
        ConfigError: it cannot be hashed.
    """
    try:
        hash(owner)
    except TypeError:
        raise ConfigError(f"owner = {owner!r}: must be hashable, such as a request's id") from None


def check_root(keys: Keys, model_id: str, tenant: str, adapter: str) -> None:
    """Refuse keys of another model, and words that ``keys`` contradict: whose they are was settled when they were made.

    Raises:
        ConfigError: they are of another model, tenant or adapter.
    """
    if keys.root.model_id != model_id:
        raise ConfigError(
            f"these keys were made for model {keys.root.model_id!r}, the cache is of {model_id!r}: make keys with this"
            " cache's keys()"
        )
    for name, value, own in (("tenant", tenant, keys.root.tenant), ("adapter", adapter, keys.root.adapter)):
        if value not in ("", own):
            raise ConfigError(
                f"{name} = {value!r}: these keys were made for {name} {own!r}; leave it out, or make others"
            )


def priority_of(word: str) -> Priority:
    """The class of service called ``word``; ConfigError for any other."""
    return _found("priority", _PRIORITIES, word)


def durability_of(word: str) -> Durability:
    """The level of acknowledgement called ``word``; ConfigError for any other."""
    return _found("durability", _DURABILITIES, word)


def _found(name: str, words: dict[str, T], word: Any) -> T:
    try:
        return words[word]
    except (KeyError, TypeError):
        raise ConfigError(f"{name} = {word!r}: one of {', '.join(map(repr, words))}") from None
