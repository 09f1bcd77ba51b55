"""The examples run as they are."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _end_of(name, *arguments):
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _run(name, *arguments):
    done = _end_of(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_engine_of_ones_own():
    assert _run("engine_loop.py").splitlines() == [
        "503 tokens: 0 loaded, 503 computed, 448 newly stored",
        "503 tokens: 448 loaded, 55 computed, 0 newly stored",
    ]


def test_a_model_with_its_tokenizer(tmp_path, monkeypatch):
    """A tiny random model, saved and loaded as any other."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    letters = {chr(code): code - 32 for code in range(32, 127)} | {"\n": 95}
    words = Tokenizer(models.WordLevel(letters, unk_token=" "))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=96,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "document.txt").write_text("All that is said here is said once. " * 10)
    printed = _run("generate.py", tmp_path / "model", tmp_path / "document.txt", tmp_path / "blocks")
    reports = [line for line in printed.splitlines() if "GenerationReport" in line]
    assert "'host': 0" in reports[0]
    assert "'host': 320" in reports[1]


def test_without_its_arguments_it_says_what_they_are():
    done = _end_of("generate.py", "path/to/model")
    assert done.returncode == 1
    assert "python examples/generate.py path/to/model path/to/document.txt" in done.stderr
    assert "Traceback" not in done.stderr
