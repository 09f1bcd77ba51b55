import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtier.errors import ConfigError
from kvtier.integrations.weights import model_id

OLD_NS = 1_700_000_000_000_000_000


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvtier"


@pytest.fixture
def directory(tmp_path):
    """A model's directory with two weight files, last changed long ago."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 10000.0, "dtype": "float32"}))
    _write(path / "model-1.safetensors", b"weights one")
    _write(path / "model-2.safetensors", b"weights two")
    return path


def _write(path, data, mtime_ns=OLD_NS):
    path.write_bytes(data)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def _change_setting(directory, key, value):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def test_the_id_of_a_path_is_the_same_every_time_and_everywhere(directory, tmp_path):
    first = model_id(directory)
    assert model_id(str(directory)) == first
    moved = tmp_path / "moved"
    directory.rename(moved)
    assert model_id(moved) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda path: _write(path / "model-1.safetensors", b"weights 0ne", OLD_NS + 1),
        lambda path: _write(path / "model-1.safetensors", b"weights one and more"),
        lambda path: _write(path / "model-3.safetensors", b""),
        lambda path: (path / "model-2.safetensors").unlink(),
        lambda path: (path / "model-2.safetensors").rename(path / "model-3.safetensors"),
        lambda path: _write(path / "pytorch_model.bin", b"more"),
        lambda path: _write(path / "modeling_own.py", b"code that the model brings along"),
        lambda path: _write(path / "adapter_config.json", b"{}"),
        lambda path: _change_setting(path, "rope_theta", 500000.0),
        lambda path: _change_setting(path, "dtype", "bfloat16"),
    ],
)
def test_the_id_of_a_path_changes_with_any_weight_or_setting(directory, change):
    first = model_id(directory)
    change(directory)
    assert model_id(directory) != first


def test_where_a_model_came_from_does_not_matter(directory):
    first = model_id(directory)
    _change_setting(directory, "_name_or_path", "/somewhere/else")
    _change_setting(directory, "transformers_version", "5.99")
    assert model_id(directory) == first


def test_a_file_is_hashed_once_for_its_size_and_mtime(directory):
    """Other bytes under the same size and mtime are not noticed: that is how we see that they were not read."""
    first = model_id(directory)
    _write(directory / "model-1.safetensors", b"WEIGHTS ONE")
    assert model_id(directory) == first


def test_the_digest_of_a_file_that_was_just_written_is_not_remembered(directory):
    """Within one tick of mtime a file may change without a trace."""
    path = directory / "model-1.safetensors"
    path.write_bytes(b"weights 0ne")
    written = path.stat().st_mtime_ns
    first = model_id(directory)
    _write(path, b"WEIGHTS ONE", written)
    assert model_id(directory) != first


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'{"a": 1}',
        b'{"a": [1, 2]}',
        b'{"a": [1, 2, "zz"]}',
        b'{"a": [1, 2, "00"]}',
        b'{"a": [1, 2, 3]}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_digest_cache_is_ignored_and_replaced(directory, cache_home, damage):
    first = model_id(directory)
    (cache_home / "digests.json").write_bytes(damage)
    assert model_id(directory) == first
    assert len(json.loads((cache_home / "digests.json").read_text())) == 2


def test_the_digest_cache_is_replaced_in_one_step(directory, cache_home):
    model_id(directory)
    before = os.stat(cache_home / "digests.json").st_ino
    _write(directory / "model-1.safetensors", b"other")
    model_id(directory)
    assert os.stat(cache_home / "digests.json").st_ino != before
    assert os.listdir(cache_home) == ["digests.json"]


def test_a_digest_cache_that_cannot_be_written_is_done_without(directory, tmp_path, monkeypatch):
    first = model_id(directory)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert model_id(directory) == first


def test_a_file_that_changes_while_it_is_read_is_an_error(directory, monkeypatch):
    from kvtier.integrations import weights

    def read_slowly(file, name):
        _write(directory / "model-1.safetensors", b"changed under way")
        return original(file, name)

    original = weights.file_digest
    monkeypatch.setattr(weights, "file_digest", read_slowly)
    with pytest.raises(ConfigError, match="changed while it was read"):
        model_id(directory)


def test_what_is_missing_at_a_path_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: no config.json"):
        model_id(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weights there"):
        model_id(tmp_path)
    with pytest.raises(ConfigError, match="is a int"):
        model_id(7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"model_type": "llama"', "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[1, 2]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'"llama"', "holds a str"),
    ],
)
def test_a_config_that_is_none_is_refused_with_its_path(directory, content, message):
    """As a download that was cut short leaves it."""
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"model/config\.json: {message}"):
        model_id(directory)


def test_the_id_of_a_path_needs_no_torch(directory):
    code = (
        f"import sys, kvtier.integrations.weights as w; w.model_id({str(directory)!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    return LlamaForCausalLM(config)


def test_the_id_of_a_model_in_memory_is_the_same_for_equal_models(model):
    assert model_id(copy.deepcopy(model)) == model_id(model)


def _nudge_one_weight(model):
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-6


@pytest.mark.parametrize(
    "change",
    [
        _nudge_one_weight,
        lambda model: model.bfloat16(),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-4),
        lambda model: model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(()))),
    ],
)
def test_the_id_of_a_model_in_memory_changes_with_any_weight_dtype_or_setting(model, change):
    other = copy.deepcopy(model)
    change(other)
    assert model_id(other) != model_id(model)


def test_a_model_without_weights_in_memory_is_refused(model):
    with pytest.raises(ConfigError, match="is on the meta device"):
        model_id(copy.deepcopy(model).to("meta"))
