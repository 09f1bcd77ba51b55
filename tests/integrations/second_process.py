"""The second turn of every family's conversation, in a process that knows nothing but a directory for each."""

import sys
from pathlib import Path

import torch

from kvtier.cache import TieredCache
from kvtier.integrations.transformers import CachedGenerator
from tests.integrations.families import case_of
from tests.integrations.places import LOGITS

CONFIG = {"host": {"capacity": "8MiB", "staging": "1MiB"}, "policy": {"checkpoint_tokens": 0}}


def answers(root, questions):
    """By case, the tokens that came from disk, and the logits; ``questions`` are prompts by (name, dtype)."""
    found = {}
    for (name, dtype), prompt in questions.items():
        case = case_of(name, dtype)
        config = {**CONFIG, "disk": {"directories": [f"{root}/{name}-{dtype}"], "capacity": "32MiB"}}
        with TieredCache(config, case.layout, "tiny") as cache:
            done = CachedGenerator(case.model, cache).generate(prompt, **LOGITS)
        found[name, dtype] = done.report.hit_tokens["disk"], torch.cat(done.outputs[0].logits), done.sequences
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    torch.save(answers(where, torch.load(where / "questions")), where / "answers")
