"""Arguments of ``model.generate``: which of them a filled cache serves, and which let rows be decoded together."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from kvtier.errors import ConfigError

REFUSED_ARGUMENTS: Final = frozenset({"past_key_values", "inputs_embeds", "cache_implementation", "custom_generate"})
HARMLESS_TENSORS: Final = frozenset({"negative_prompt_ids", "negative_prompt_attention_mask"})
"""Tensor arguments that leave the KV of the prompt as it is; any other makes it depend on more than token ids."""
MODES: Final = frozenset(
    {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}
)
"""Ways to generate that start from a filled cache. Assisted ones do not: they feed it the whole prompt again."""

_OFF: Final[Mapping[str, tuple[Any, ...]]] = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
    "prefill_chunk_size": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
"""Settings that look at a whole row, which padding would be a part of, or at its length, or end it on their own; by the
values that turn them off."""


def settings_of(model: Any, arguments: Mapping[str, Any]) -> GenerationConfig:
    """What ``model.generate`` will find: arguments, else the config that is passed, else that of the model."""
    given = arguments.get("generation_config")
    settings: Any = deepcopy(given) if given else GenerationConfig()  # type: ignore[no-untyped-call]
    settings.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    settings.update(**arguments)
    resolved: GenerationConfig = settings
    return resolved


def check_arguments(arguments: Mapping[str, Any], settings: GenerationConfig) -> None:
    """Refuse what a filled cache cannot serve.

    Raises:
        ConfigError: naming the argument, and what to do.
    """
    for name, value in arguments.items():
        if name in REFUSED_ARGUMENTS and value is not None:
            raise ConfigError(f"{name}: the cache fills in past_key_values from input_ids; leave it out")
        if isinstance(value, torch.Tensor) and name not in HARMLESS_TENSORS:
            raise ConfigError(f"{name}: a tensor beside input_ids; a prefix is known by its token ids alone")
    if settings.cache_implementation is not None:
        raise ConfigError(
            f"cache_implementation = {settings.cache_implementation!r}: the cache fills in past_key_values;"
            " leave it out"
        )
    if settings.use_cache is False:
        raise ConfigError("use_cache = False: generation without KV has nothing to reuse; call model.generate")
    if settings.token_healing:
        raise ConfigError(
            "token_healing: the end of the prompt is replaced, and KV under the wrong tokens would be found again; heal"
            " the prompt first, or call model.generate"
        )
    mode = settings.get_generation_mode(arguments.get("assistant_model"))
    if mode not in MODES:
        raise ConfigError(
            f"{mode.value}: this way to generate cannot start from a filled cache; use greedy search, sampling or "
            f"beam search, or call model.generate"
        )


def decode_together(arguments: Mapping[str, Any], settings: GenerationConfig) -> bool:
    """Whether rows of different lengths mean in one batch, padded, what each means alone.

    Objects of the caller's, such as a streamer or stopping criteria, see one row at a time; so do settings that look at
    a row as a whole, or bound its length with the prompt.
    """
    known = vars(settings)
    own = {name for name, value in arguments.items() if value is not None and name not in known}
    return (
        own <= {"generation_config"}
        and settings.max_new_tokens is not None
        and all(getattr(settings, name, None) in off for name, off in _OFF.items())
    )


def pad_token(settings: GenerationConfig) -> int:
    """What fills up rows that ended early: as in ``model.generate`` the end-of-sequence token where none is set."""
    for token in (settings.pad_token_id, settings.eos_token_id):
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0


def end_tokens(settings: GenerationConfig) -> frozenset[int]:
    """Any of which ends a row."""
    found = settings.eos_token_id
    return frozenset(() if found is None else found if isinstance(found, list) else [found])
