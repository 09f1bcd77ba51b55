"""docs/layouts.md says what is so: its examples run, its figures and its families are those of the code."""

import re
from pathlib import Path

import pytest

from kvtier.models import KVLayout
from kvtier.models.families import FAMILIES
from tests.models import configs

DOCUMENT = (Path(__file__).parent.parent.parent / "docs/layouts.md").read_text(encoding="utf-8")


def section(title):
    return DOCUMENT.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL))
def test_its_examples_run(code):
    exec(compile(code, "docs/layouts.md", "exec"), {})


def test_it_names_every_family():
    table = section("Families").split("| `model_type` |")[1].split("\n\n")[0]
    named = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name.strip("`") for row in named for name in row.split(", ")} == set(FAMILIES)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("Llama 3.1 8B", configs.LLAMA_8B),
        ("Qwen3-235B-A22B", configs.QWEN3_235B),
        ("gpt-oss-120b", configs.GPT_OSS_120B),
        ("Gemma 3 27B", configs.GEMMA3_27B),
        ("DeepSeek V3, Kimi K2", configs.V3),
        ("DeepSeek V3.2", configs.V32),
        ("GLM-5", configs.GLM_5),
        ("DeepSeek V4-Pro", configs.V4_PRO),
        ("DeepSeek V4-Flash", configs.V4_FLASH),
        ("Qwen3-Next-80B-A3B", configs.QWEN3_NEXT),
        ("MiniMax-M1", configs.MINIMAX_M1),
    ],
)
def test_its_sizes_are_those_of_the_layouts(model, config):
    layout = KVLayout.from_hf_config(config, 128)
    sizes = dict(zip((group.name for group in layout.groups), layout.sequence_group_bytes(1_000_000), strict=True))
    want = [layout.bytes_per_token, sizes.get("window", 0), sizes.get("state", 0)]
    row = re.search(rf"^\| {re.escape(model)} \|(.*)\|$", section("Sizes"), re.MULTILINE)
    assert row
    assert [int(cell.strip().replace(",", "") or 0) for cell in row[1].split("|")] == want
