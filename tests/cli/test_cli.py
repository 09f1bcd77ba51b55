"""The command line as a whole, and ``kvtier config``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from kvtier.cli import main
from kvtier.cli.app import COMMANDS
from kvtier.config import Config
from kvtier.errors import KVTierError

ROOT = Path(__file__).parent.parent.parent


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(args)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)


def test_help_imports_neither_torch_nor_a_command() -> None:
    code = (
        "import sys; sys.argv = ['kvtier', '--help']\n"
        "try:\n    import kvtier.__main__; kvtier.__main__.main()\n"
        "except SystemExit: pass\n"
        f"loaded = [m for m in ('torch', 'numpy', {', '.join(repr(module) for module, _ in COMMANDS.values())})"
        " if m in sys.modules]\n"
        "print(loaded, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("command", [("config", "keys"), ("stat", ".", "--json")])
def test_output_that_cannot_be_written_is_one_line_of_error(command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvtier", *command],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_an_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "confg")
    assert status == 2
    assert "confg" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_offers_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, name, *(["check"] if name == "config" else []), "--help")
    assert status == 0
    assert "--json" in out


@pytest.mark.parametrize(
    ("args", "status", "error"),
    [
        (("config", "check", "NOWHERE"), 2, "NOWHERE: cannot read the configuration: No such file or directory"),
        (("stat", "NOWHERE"), 2, "NOWHERE: cannot read the directory: No such file or directory"),
        (("demo",), 1, "the second process failed"),
    ],
    ids=["check", "stat", "demo"],
)
class TestErrors:
    @pytest.fixture(autouse=True)
    def _no_demo(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def fails(directory: str, family: str) -> NoReturn:
            raise KVTierError("the second process failed")

        monkeypatch.setattr("kvtier.cli.demo._run", fails)
        monkeypatch.chdir(tmp_path)

    def test_with_json_an_error_is_an_object_too(
        self, args: tuple[str, ...], status: int, error: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ended, out, err = run(capsys, *args, "--json")
        found = json.loads(out)
        assert set(found) == {"ok", "error"}
        assert found["ok"] is False
        assert error in found["error"]
        assert (ended, err) == (status, f"error: {found['error']}\n")

    def test_without_json_it_is_for_people_alone(
        self, args: tuple[str, ...], status: int, error: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ended, out, err = run(capsys, *args)
        assert (ended, out) == (status, "")
        assert error in err


WRONG_USAGE = [
    (("stat",), "Missing argument 'directory'"),
    (("config", "check"), "Missing argument 'file'"),
    (("foo",), "No such command 'foo'"),
    (("config", "keys", "--yaml"), "No such option: --yaml"),
    ((), "No such option: --json"),
]


@pytest.mark.parametrize(("args", "error"), WRONG_USAGE, ids=str)
def test_with_json_wrong_usage_is_an_object_too(
    args: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *args, "--json")
    found = json.loads(out)
    assert (status, found["ok"], set(found)) == (2, False, {"ok", "error"})
    assert error in found["error"]
    assert "Usage: " in err


@pytest.mark.parametrize("args", [("stat",), ("config", "check"), ("foo",), ("stat", "--", "--json", "more")], ids=str)
def test_without_json_wrong_usage_is_for_people_alone(
    args: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert "Usage: " in err


def test_help_is_no_error_with_json_either(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "stat", "--help", "--json")
    assert status == 0
    assert "Usage: " in out
    assert '"ok"' not in out


def test_a_file_that_is_called_like_an_option_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "config", "check", "--", "--json")
    assert (status, out) == (2, "")
    assert err.startswith("error: --json: cannot read")


class TestConfigCheck:
    def test_a_good_file_comes_out_as_a_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "config", "check", str(ROOT / "configs" / "cpu.toml"))
        assert status == 0
        assert "512MiB" in out

    def test_as_json_it_has_every_setting(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "kvtier.toml"
        path.write_text('[host]\ncapacity = "2GiB"\n')
        status, out, _ = run(capsys, "config", "check", str(path), "--json")
        assert status == 0
        assert json.loads(out)["host"]["capacity"] == 2 * 2**30
        assert set(json.loads(out)) == set(Config.model_fields)

    def test_a_wrong_file_is_status_2_and_its_message(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "kvtier.toml"
        path.write_text("[disk]\nio_thread = 1\n")
        status, out, err = run(capsys, "config", "check", str(path))
        assert (status, out) == (2, "")
        assert "disk.io_thread: no such key; did you mean disk.io_threads?" in err


class TestConfigKeys:
    @pytest.mark.parametrize("asked", [("--toml", "--markdown"), ("--toml", "--json"), ("--markdown", "--json")])
    def test_two_formats_at_once_are_wrong_usage(
        self, asked: tuple[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = run(capsys, "config", "keys", *asked)
        assert status == 2
        assert bool(out) == ("--json" in asked)
        assert err.startswith(f"error: {' '.join(asked)}: ")

    def test_the_table_names_every_section(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "config", "keys")
        assert status == 0
        assert all(f"{section}." in out for section in ("device", "host", "disk", "policy", "read"))

    def test_as_json_it_lists_keys_with_defaults(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "config", "keys", "--json")
        assert status == 0
        assert {"key": "block_tokens", "type": "integer", "default": "64"}.items() <= json.loads(out)[0].items()
