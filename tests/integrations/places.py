"""Caches whose blocks are read from one tier, and turns of a conversation with them and with a plain reference."""

import torch

from kvtier.cache import TieredCache
from kvtier.integrations.transformers import CachedGenerator
from tests.integrations.families import has_states

NEW = 4
LOGITS = {
    "do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


class Place:
    """A cache, and what is left of it when it is opened again."""

    def __init__(self, case, tier, policy, directory, *, promotes=False):
        """``promotes``: it has a device tier besides, which nothing lies in until ``promote``."""
        self.case = case
        self.tier = tier
        self.policy = policy
        self._config = {
            "host": {"capacity": "8MiB", "staging": "1MiB"},
            "policy": {"windows": policy, "checkpoint_tokens": 0},
        }
        if tier == "device" or promotes:
            self._config["device"] = {"capacity": "8MiB", "device": "cpu", "verify": True}
        if tier == "disk":
            self._config["disk"] = {"directories": [str(directory)], "capacity": "32MiB"}
        self.cache = self._open()

    def _open(self):
        return TieredCache(self._config, self.case.layout, "tiny")

    def generator(self):
        """For the next turn; nothing of an earlier one is left in memory where blocks are to come from disk."""
        if self.tier == "disk":
            assert self.cache.close()
            self.cache = self._open()
        return CachedGenerator(self.case.model, self.cache)

    def promote(self, prompt):
        """Bring what is stored of it to the device."""
        self.cache.submit_prefetch(prompt[0], to="device", deadline_s=60.0).result(60.0)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        assert self.cache.close()


def splits(place, start, prompt):
    """Where forwards have to end, so that states are there: at checkpoints inside the prompt."""
    if not has_states(place.case.model):
        return []
    size = place.case.block
    ends = range((start // size + 1) * size, prompt.shape[1], size)
    return [end for end in ends if place.policy == "full" or end == prompt.shape[1] // size * size]


def wanted_of(place, kept, prompt):
    """What the model answers from what ``kept`` has of the prompt."""
    kept.prefill(prompt, splits(place, kept.past.get_seq_length(), prompt))
    return kept.generate(prompt, **LOGITS)


def turn_of(place, kept, prompt):
    """One turn with the cache and with the reference; how many tokens were found, and the reference after it."""
    done = place.generator().generate(prompt, **LOGITS)
    hit = sum(done.report.hit_tokens.values())
    assert done.report.hit_tokens[place.tier] == hit
    kept = kept.cut(hit)
    wanted = wanted_of(place, kept, prompt)
    assert torch.equal(torch.cat(done.outputs[0].logits), torch.cat(wanted.logits))
    assert torch.equal(done.sequences, wanted.sequences)
    return hit, done.sequences, kept
