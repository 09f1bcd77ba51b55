"""``kvtier demo``: what it compares, when it fails, what it prints."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kvtier.cli import conversation, demo, main
from kvtier.cli.conversation import Talk, Turn, messages
from kvtier.errors import KVTierError

GOOD = Turn(128, {"device": 16, "host": 64, "disk": 32}, 1.0, 0.1, True)
DIRECTORY = "--directory, the one that the first process wrote to"
NOTHING = {"device": 0, "host": 0, "disk": 0}


@pytest.fixture
def small_model(monkeypatch):
    """A model that takes no time."""

    def tiny_model(family):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=256,
            max_position_embeddings=8192, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    monkeypatch.setattr(conversation, "random_model", tiny_model)


@pytest.fixture
def talk(tmp_path, small_model):
    """The conversation with it."""
    opened = Talk(str(tmp_path), "test")
    yield opened
    opened.close()


def test_a_conversation_finds_all_but_the_end_of_the_turns_before(talk):
    sequence, served = messages()[0][:, :0], Counter()
    for message in messages()[:-1]:
        before = sequence.shape[1]
        turn, sequence = talk.turn(torch.cat((sequence, message), 1))
        assert turn.identical
        served.update(turn.hit_tokens)
        assert sum(turn.hit_tokens.values()) == max(before - 1, 0) // 64 * 64
        assert turn.prompt_tokens == before + message.shape[1]
    assert min(served[tier] for tier in ("device", "host", "disk")) > 0
    assert turn.without_s > 0
    assert turn.with_s > 0


def test_the_conversation_is_real_text_that_grows_past_4000_tokens():
    said = messages()
    assert len(said) >= 5
    before_the_last_turn = sum(message.shape[1] + conversation.NEW_TOKENS for message in said[:-2])
    assert before_the_last_turn - 1 >= 4000 + 64
    assert b"the" in bytes(said[1][0].tolist())


def test_one_wrong_bit_in_one_block_makes_a_turn_differ(talk, monkeypatch):
    """The lowest bit of one number of the first key: the tokens stay the same, the logits tell."""
    first = messages()[0]
    _, sequence = talk.turn(first)
    load = talk.cache.submit_load

    def load_damaged(hit, pages):
        done = load(hit, pages).result(30)
        keys = pages.memory._groups[0][0].data
        keys[0, 0, 0] ^= 1
        return _Done(done)

    monkeypatch.setattr(talk.cache, "submit_load", load_damaged)
    turn, _ = talk.turn(torch.cat((sequence, messages()[1]), 1))
    assert sum(turn.hit_tokens.values()) > 1000
    assert not turn.identical


class _Done:
    def __init__(self, result):
        self._result = result

    def result(self, timeout_s):
        return self._result


@pytest.mark.parametrize(
    ("turns", "restart", "ok"),
    [
        ([GOOD, GOOD], GOOD, True),
        ([replace(GOOD, hit_tokens=NOTHING), GOOD], GOOD, True),
        ([GOOD, replace(GOOD, identical=False)], GOOD, False),
        ([GOOD], replace(GOOD, identical=False), False),
        ([GOOD], replace(GOOD, hit_tokens=NOTHING), False),
        ([replace(GOOD, hit_tokens=GOOD.hit_tokens | {"device": 0})], GOOD, False),
        ([replace(GOOD, hit_tokens=GOOD.hit_tokens | {"host": 0})], GOOD, False),
        ([replace(GOOD, hit_tokens=GOOD.hit_tokens | {"disk": 0})], GOOD, False),
        ([replace(GOOD, hit_tokens=NOTHING | {tier: 64}) for tier in NOTHING], GOOD, True),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_the_exit_status_says_whether_all_is_well(monkeypatch, turns, restart, ok, as_json):
    monkeypatch.setattr(demo, "_run", lambda directory, family: (turns, restart))
    done = CliRunner().invoke(demo.app, ["--json"] if as_json else [])
    assert done.exit_code == (0 if ok else 1)
    if as_json:
        assert json.loads(done.stdout)["ok"] is ok
    else:
        assert ("failed: " in done.stdout) is not ok


def test_json_has_a_turn_like_any_other_for_the_second_process(monkeypatch):
    monkeypatch.setattr(demo, "_run", lambda directory, family: ([GOOD], GOOD))
    turn = {
        "prompt_tokens": 128,
        "hit_tokens": {"device": 16, "host": 64, "disk": 32},
        "ttft_s": {"without": 1.0, "with": 0.1},
        "identical": True,
    }
    done = CliRunner().invoke(demo.app, ["--json"])
    assert json.loads(done.stdout) == {"turns": [turn], "restart": turn, "ok": True}


def test_a_directory_that_is_named_is_kept(monkeypatch, tmp_path):
    where = []
    monkeypatch.setattr(demo, "_run", lambda directory, family: (where.append(directory), ([GOOD], GOOD))[1])
    CliRunner().invoke(demo.app, ["--json", "--directory", str(tmp_path)])
    CliRunner().invoke(demo.app, ["--json"])
    assert where[0] == str(tmp_path)
    assert os.path.isdir(where[0])
    assert not os.path.exists(where[1])


def run(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main(["demo", *args])
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "said", ["", "{", "5", "{}", '{"tenant": 5, "prompt": [[1]]}', '{"tenant": "t", "prompt": [1]}']
)
def test_a_second_process_that_is_not_told_what_to_go_on_with_is_wrong_usage(monkeypatch, capsys, tmp_path, said):
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    status, out, err = run(capsys, "--second-process", "--directory", str(tmp_path))
    assert (status, out) == (2, "")
    assert err.startswith("error: --second-process: standard input = ")
    assert err.count("\n") == 1


def test_a_second_process_without_a_directory_is_wrong_usage(monkeypatch, capsys):
    """It has nothing to find blocks in, and none is made under the name of "None"."""
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"tenant": "t", "prompt": [[1]]}'))
    monkeypatch.setattr(demo, "_go_on", lambda directory, family, request: {"directory": directory})
    assert run(capsys, "--second-process") == (2, "", f"error: --second-process: also give {DIRECTORY}\n")


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize("options", [["--json"], []])
def test_an_error_is_one_line_for_people_and_one_object_for_programs(capsys, tmp_path, options):
    """Progress is shown to people, and leaves nothing behind for programs."""
    (tmp_path / "file").write_text("no directory")
    status, out, err = run(capsys, *options, "--directory", str(tmp_path / "file"))
    assert status == 1
    assert err.startswith(f"error: disk directory {tmp_path}/file")
    assert err.count("\n") == 1
    error = err.removeprefix("error: ").rstrip("\n")
    assert out == (json.dumps({"ok": False, "error": error}) + "\n" if options else "")


def test_a_second_process_that_does_not_end_is_an_error_that_says_so(talk, monkeypatch, tmp_path):
    def never_ends(command, *, timeout, **settings):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", never_ends)
    with pytest.raises(KVTierError, match=r"the second process had not ended after 240 s .*run kvtier demo again"):
        demo._restart(talk, str(tmp_path), "llama", messages()[-1])


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_the_demo_runs_from_end_to_end(tmp_path):
    """At full size: every tier serves, and the second process finds what the first one left on disk."""
    command = [sys.executable, "-m", "kvtier", "demo", "--json", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["turns"][-1]["prompt_tokens"] > 4000
    assert all(sum(turn["hit_tokens"][tier] for turn in found["turns"]) for tier in ("device", "host", "disk"))
    assert found["restart"]["hit_tokens"]["disk"] >= 4000
