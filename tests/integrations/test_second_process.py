"""What one process stored is found by another one on the same directory, of every family, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations import second_process
from tests.integrations.families import FAMILIES, VARIANTS, Reference, case_of, prompt_of
from tests.integrations.places import wanted_of

CASES = [
    *((name, torch.float32) for name in sorted([*FAMILIES, *VARIANTS])),
    *((name, torch.bfloat16) for name in ("deepseek_v32", "deepseek_v4_released", "gpt_oss", "minimax", "qwen3_next")),
]
"""Every family once, and in bfloat16 one for each kind of layer."""


class _Asked:
    """What ``wanted_of`` goes by."""

    policy = "checkpoint"

    def __init__(self, case):
        self.case = case


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_process_answers_as_the_first_would_have_from_memory(tmp_path):
    cases = {key: case_of(*key) for key in CASES}
    asked = {key: prompt_of(3 * case.block - 7) for key, case in cases.items()}
    first = second_process.answers(tmp_path, asked)
    questions = {key: torch.cat((sequences, prompt_of(5, seed=1)), 1) for key, (_, _, sequences) in first.items()}
    torch.save(questions, tmp_path / "questions")
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "tests.integrations.second_process", str(tmp_path)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=True,
    )  # fmt: skip
    found = torch.load(tmp_path / "answers")
    for key, case in cases.items():
        kept = Reference(case.model, whole=case.whole)
        wanted_of(_Asked(case), kept, asked[key])
        wanted = wanted_of(_Asked(case), kept.cut(2 * case.block), questions[key])
        hit, logits, sequences = found[key]
        assert (key, hit) == (key, 2 * case.block)
        assert torch.equal(logits, torch.cat(wanted.logits)), key
        assert torch.equal(sequences, wanted.sequences), key
