"""The configuration: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from kvtier.cli.keys import as_toml, settings, size_text
from kvtier.codecs.chain import chain_names
from kvtier.config import (
    Config,
    DeviceConfig,
    DiskConfig,
    HostConfig,
    PolicyConfig,
    RemoteConfig,
    _problem,
    key_paths,
    load_config,
    parse_size,
    section_of,
)
from kvtier.errors import CapacityError, ConfigError
from kvtier.policy import EVICTION_POLICIES
from kvtier.tiers.disk.geometry import segment_pages_for

CONFIGS = Path(__file__).parent.parent / "configs"


def refusal(source: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source)  # type: ignore[arg-type]
    return str(caught.value)


def refusal_or_none(table: dict[str, Any]) -> str:
    try:
        load_config(table)
    except ConfigError as error:
        return str(error)
    return ""


def choices(section: type[BaseModel], key: str) -> tuple[str, ...]:
    return get_args(section.model_fields[key].annotation)


def in_words(names: tuple[str, ...]) -> str:
    *some, last = map(repr, names)
    return f"{', '.join(some)} or {last}" if some else last


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "nbytes"),
        [
            (0, 0),
            (4096, 4096),
            ("4096", 4096),
            ("512MiB", 512 * 2**20),
            ("8 GiB", 8 * 2**30),
            ("1.5tib", 3 * 2**39),
            ("8GB", 8 * 10**9),
            ("7B", 7),
        ],
    )
    def test_a_size_is_bytes_or_a_number_with_a_unit(self, text: object, nbytes: int) -> None:
        assert parse_size(text) == nbytes

    @pytest.mark.parametrize(
        "text", ["", "GiB", "8 gigabytes", "-1", "-1GiB", "1e3", -1, True, 1.5, None, 2**63, "9EiB"]
    )
    def test_anything_else_is_refused_with_examples(self, text: object) -> None:
        message = refusal({"host": {"capacity": text}})
        assert message.startswith(f"host.capacity = {text!r}: not a size")
        assert '"8GiB"' in message

    def test_a_size_beyond_63_bits_is_refused_when_it_carries_a_unit(self) -> None:
        assert "not a size" in refusal({"disk": {"capacity": "8192PiB"}})

    @given(st.integers(0, 2**62))
    def test_every_size_reads_back_as_it_was_written(self, nbytes: int) -> None:
        assert parse_size(size_text(nbytes) if nbytes % 1024 == 0 and nbytes else str(nbytes)) == nbytes


class TestWhatIsAccepted:
    def test_nothing_set_means_every_default(self) -> None:
        assert load_config({}) == Config()

    def test_a_file_and_the_same_dict_are_equal(self, tmp_path: Path) -> None:
        table = {"block_tokens": 128, "host": {"capacity": "2GiB"}, "disk": {"directories": ["/a", "/b"]}}
        path = tmp_path / "kvtier.toml"
        path.write_text(tomli_w.dumps(table))
        assert load_config(path) == load_config(str(path)) == load_config(table)
        assert load_config(path).host.capacity == 2 * 2**30

    def test_what_a_configuration_says_is_accepted_as_one(self) -> None:
        config = load_config({"disk": {"directories": ["/a"], "segment": "64MiB"}, "read": {"deadline_s": 3}})
        assert load_config(config.model_dump()) == config

    def test_it_cannot_be_changed_and_can_be_hashed(self) -> None:
        config = load_config({})
        with pytest.raises(ValidationError, match="frozen"):
            config.host.capacity = 1
        assert hash(config) == hash(load_config({}))

    @pytest.mark.parametrize("path", ["a\0b", "/\ud800"])
    def test_what_no_file_can_be_called_is_no_configuration(self, path: str) -> None:
        with pytest.raises(ConfigError, match="no path"):
            load_config(path)

    def test_a_file_may_begin_with_a_byte_order_mark(self, tmp_path: Path) -> None:
        """Editors of Windows write one."""
        (tmp_path / "kvtier.toml").write_bytes(b"\xef\xbb\xbfblock_tokens = 32\n")
        assert load_config(tmp_path / "kvtier.toml").block_tokens == 32

    def test_directories_become_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/someone")
        config = load_config({"disk": {"directories": ["here", "~/there"]}})
        assert config.disk.directories == (str(tmp_path / "here"), "/home/someone/there")

    def test_paths_and_whole_numbers_of_numpy_are_as_good_as_text_and_int(self, tmp_path: Path) -> None:
        config = load_config(
            {"block_tokens": np.int32(32), "disk": {"directories": (tmp_path,), "capacity": np.int64(2**30)}}
        )
        assert config == load_config({"block_tokens": 32, "disk": {"directories": [str(tmp_path)], "capacity": "1GiB"}})


class TestWhatIsRefused:
    def test_a_key_that_is_no_string_is_named(self) -> None:
        assert refusal({"host": {5: 1}}) == "host[5]: a key must be a string, like every name in TOML"

    def test_an_array_is_no_number(self) -> None:
        assert refusal({"host": {"capacity": np.zeros(2, np.int64)}}).startswith(
            "host.capacity = array([0, 0]): not a size"
        )

    def test_a_file_that_nests_without_end_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
        assert "too deeply" in refusal(tmp_path / "deep.toml")

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"disk": {"io_thread": 3}}, "disk.io_thread: no such key; did you mean disk.io_threads?"),
            ({"dsik": {}}, "dsik: no such key; did you mean disk?"),
            ({"high_watermark": 0.5}, "high_watermark: no such key; did you mean host.high_watermark?"),
            ({"host": {"io_threads": 1}}, "host.io_threads: no such key; did you mean disk.io_threads?"),
            ({"zzz": 1}, "zzz: no such key; the nearest one is "),
            ({"remote": [{"kind": "x", "url": "y", "capcity": 1}]}, "remote[0].capcity: no such key; did you mean"),
        ],
    )
    def test_an_unknown_key_is_named_with_the_nearest_known_one(self, table: dict[str, object], message: str) -> None:
        assert refusal(table).startswith(message)

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"block_tokens": "64"}, "block_tokens = '64': must be an integer"),
            ({"block_tokens": 0}, "block_tokens = 0: must be greater than or equal to 1"),
            ({"disk": 3}, "disk = 3: must be a table of keys, [disk] in TOML"),
            ({"disk": {"directories": "/a"}}, "disk.directories = '/a': must be a list"),
            ({"disk": {"directories": [""]}}, "disk.directories[0] = '': not a directory; name one as a string"),
            (
                {"disk": {"directories": ["/\ud800"]}},
                r"disk.directories[0] = '/\ud800': not a directory; its name has characters that no file system takes",
            ),
            ({"disk": {"directories": ["/a", "/a/"]}}, "disk.directories = ['/a', '/a']: names one directory twice"),
            (
                {"disk": {"directories": ["/a", "/b"], "capacity": "100MiB", "segment": "16MiB"}},
                "disk.capacity = 104857600: too small for 4 segments of 16777216 bytes in each of 2 directories; set "
                "it to at least 134217728, or lower disk.segment",
            ),
            ({"disk": {"clean_segments": 65}}, 'disk.clean_segments = 65: must be "auto" or an integer between 1 and'),
            ({"disk": {"clean_segments": True}}, "disk.clean_segments = True: must be"),
            ({"disk": {"segment": 4097}}, 'disk.segment = 4097: must be "auto" or a multiple of 4096'),
            (
                {"disk": {"codec": "raw+lz"}},
                f"disk.codec = 'raw+lz': must be {in_words(choices(DiskConfig, 'codec'))}; did you mean 'raw+lz4'?",
            ),
            ({"host": {"low_watermark": 0.95}}, "host.low_watermark = 0.95 must be below high_watermark = 0.9"),
            ({"host": {"capacity": 0}}, "host.capacity = 0: must be greater than 0"),
            ({"read": {"verify_memory": 1}}, "read.verify_memory = 1: must be a boolean"),
            ({"read": {"deadline_s": float("nan")}}, "read.deadline_s = nan: must be a finite number"),
            ({"remote": [{"kind": "x"}]}, "remote[0].url: must be set"),
            ({"remote": [{"kind": 5, "url": "x"}]}, "remote[0].kind = 5: must be a string"),
            ({"host": {"pin": "maybe"}}, "host.pin = 'maybe': must be 'auto', 'on' or 'off'"),
            ({"disk": {"io_threads": 257}}, "disk.io_threads = 257: must be less than or equal to 256"),
            ({"read": {"deadline_s": 2e9}}, "read.deadline_s = 2000000000.0: must be less than or equal to 1000000000"),
            ({"host": {"capacity": {}}}, "host.capacity = {}: not a size"),
        ],
    )
    def test_a_wrong_value_is_named_with_its_path_and_the_remedy(self, table: dict[str, object], message: str) -> None:
        assert refusal(table).startswith(message)

    def test_no_message_is_in_the_words_of_pydantic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its next version may have other ones."""
        values = [None, True, "x", "\ud800", 1.5, -1, 10**30, float("nan"), float("inf"), [], {}, [5], {1: 2}, object]
        tables: list[dict[str, Any]] = [{name: value} for name in Config.model_fields for value in values]
        for path in key_paths():
            section, _, key = path.replace("[]", "").rpartition(".")
            tables += [
                {section: [{key: value}] if section == "remote" else {key: value}} if section else {key: value}
                for value in values
            ]
        with monkeypatch.context() as patch:
            patch.setattr("kvtier.config._problem", lambda detail: _problem(detail | {"msg": "in its words"}))
            said = [message for table in tables if "in its words" in (message := refusal_or_none(table))]
        assert said == []

    @pytest.mark.parametrize("segment", ["auto", 1 << 20])
    @pytest.mark.parametrize("directories", [["/a"], ["/a", "/b", "/c"]])
    def test_a_capacity_that_holds_no_store_of_any_layout_is_refused(
        self, segment: str | int, directories: list[str]
    ) -> None:
        """What is refused here no opening could take, and the remedy that is named is one for the smallest layout."""
        disk = {"directories": directories, "segment": segment}
        least = int(refusal({"disk": disk | {"capacity": 1}}).split("at least ")[1].split(",")[0])
        assert load_config({"disk": disk | {"capacity": least}}).disk.capacity == least
        assert f"disk.capacity = {least - 1}: too small" in refusal({"disk": disk | {"capacity": least - 1}})
        smallest_record, segment_bytes = 2, None if segment == "auto" else int(segment)
        assert segment_pages_for(smallest_record, least // len(directories), segment_bytes)
        with pytest.raises((CapacityError, ConfigError)):
            segment_pages_for(smallest_record, (least - 1) // len(directories), segment_bytes)

    def test_without_a_directory_no_capacity_is_too_small(self) -> None:
        assert load_config({"disk": {"capacity": 1}}).disk.capacity == 1

    def test_all_problems_are_named_at_once(self) -> None:
        message = refusal({"block_tokens": 0, "disk": {"io_threads": 0}, "hsot": {}})
        assert message.count("\n  ") == 3

    def test_a_remote_store_is_refused_because_none_is_installed(self) -> None:
        message = refusal({"remote": [{"kind": "s3", "url": "s3://bucket"}]})
        assert message == "remote[0].kind = 's3': no remote store is installed in this version; remove [[remote]]"

    def test_a_mistake_in_a_file_is_named_with_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "kvtier.toml"
        path.write_text("[disk]\nio_thread = 1\n")
        assert refusal(path).startswith(f"{path}: disk.io_thread: no such key")

    def test_a_syntax_error_is_named_with_its_line(self, tmp_path: Path) -> None:
        path = tmp_path / "kvtier.toml"
        path.write_text('[disk]\ncodec = "raw\n')
        message = refusal(path)
        assert message.startswith(f"{path}: not TOML: ")
        assert "line 2" in message

    def test_bytes_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "kvtier.toml"
        path.write_bytes(b"\xff\xfe")
        assert "not TOML" in refusal(path)

    def test_a_missing_file_or_a_directory_is_refused(self, tmp_path: Path) -> None:
        assert "No such file" in refusal(tmp_path / "none.toml")
        assert "cannot read" in refusal(tmp_path)

    def test_another_type_than_path_or_dict_is_refused(self) -> None:
        assert refusal(3) == "load_config takes a path or a dict, not int"

    @given(
        st.dictionaries(
            st.sampled_from([*Config.model_fields, "nope"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
                max_leaves=5,
            ),
            max_size=3,
        )
    )
    def test_any_dict_is_accepted_or_refused_with_config_error(self, table: dict[str, object]) -> None:
        with suppress(ConfigError):
            assert isinstance(load_config(table), Config)


class TestNames:
    def test_every_codec_that_is_offered_exists(self) -> None:
        sections = (DeviceConfig, HostConfig, DiskConfig, RemoteConfig)
        offered = {name for section in sections for name in choices(section, "codec")}
        assert offered <= set(chain_names())
        assert set(choices(DiskConfig, "codec")) == set(chain_names())

    def test_every_eviction_policy_is_offered(self) -> None:
        assert set(choices(PolicyConfig, "eviction")) == set(EVICTION_POLICIES)


class TestConfigFiles:
    def test_default_toml_is_what_the_reference_says(self) -> None:
        """Regenerate it with ``kvtier config keys --toml > configs/default.toml``."""
        assert (CONFIGS / "default.toml").read_text() == as_toml()

    def test_default_toml_sets_every_key_to_its_default(self) -> None:
        table = tomllib.loads((CONFIGS / "default.toml").read_text())
        expected = {
            name: set(section.model_fields) if (section := section_of(item.annotation)) else None
            for name, item in Config.model_fields.items()
            if name != "remote"
        }
        assert {name: set(value) if isinstance(value, dict) else None for name, value in table.items()} == expected
        assert load_config(CONFIGS / "default.toml") == Config()

    def test_every_key_says_what_it_means(self) -> None:
        assert [setting.path for setting in settings() if not setting.description] == []

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
    def test_every_shipped_configuration_loads(self, path: Path) -> None:
        assert load_config(path).host.capacity > 0


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_a_device_tier_lies_on_a_device(device: str) -> None:
    config = load_config({"device": {"capacity": "1GiB", "device": device}}).device
    assert (config.capacity, config.device) == (1 << 30, device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:1234", "CPU", ""])
def test_what_is_no_device_is_refused_by_name(device: str) -> None:
    with pytest.raises(ConfigError, match=r'device\.device = .*: not a device; want "auto", "cuda"'):
        load_config({"device": {"device": device}})


def test_what_is_too_long_for_a_configuration_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "endless.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"endless.toml: not a configuration: longer than 1048576 bytes"):
        load_config(path)
