"""Published sizes of released models, each from a config and the dtypes that the figure names."""

import pytest

from kvtier.models import KVGroup, KVLayout, Part, Reuse
from tests.models import configs

MILLION = 1_000_000
GIB = 1 << 30
PRO, FLASH = configs.V4_PRO, configs.V4_FLASH


def bits_8_and_16(config, state_dtype="bfloat16"):
    """KV of one byte a value, index keys of two: the precision that the published table is for."""
    return KVLayout.from_hf_config(
        config, 128, "float8_e4m3fn", index_dtype="bfloat16", state_dtype=state_dtype, page_tokens=128
    )


def packed(config, index_dtype="fp8_scaled", block_tokens=256):
    return KVLayout.from_hf_config(config, block_tokens, "fp8_ds_mla", index_dtype=index_dtype)


def without_states(layout, tokens):
    sizes = zip(layout.groups, layout.sequence_group_bytes(tokens), strict=True)
    return sum(nbytes for group, nbytes in sizes if group.reuse.rule != "last")


def group_bytes(layout, name, tokens=MILLION):
    return dict(zip((group.name for group in layout.groups), layout.sequence_group_bytes(tokens), strict=True))[name]


@pytest.mark.parametrize(
    ("name", "bytes_per_token", "gib"),
    [
        ("V4_PRO", 5_888, 5.48),
        ("V4_FLASH", 4_115, 3.83),
        ("V32", 50_752, 47.27),
        ("V3", 35_136, 32.72),
        ("KIMI_K2", 35_136, 32.72),
        ("GLM_5", 64_896, 60.44),
        ("GLM_52", 50_304, 46.85),
        ("GLM_45", 188_416, 175.48),
        ("GLM_45_AIR", 94_208, 87.74),
        ("QWEN3_235B", 96_256, 89.65),
        ("QWEN3_32B", 131_072, 122.07),
        ("QWEN25_32B", 131_072, 122.07),
        ("MINIMAX_M2", 126_976, 118.26),
        ("MINIMAX_M3", 76_032, 70.81),
        ("LLAMA_70B", 163_840, 152.59),
        ("LLAMA_405B", 258_048, 240.33),
        ("GPT_OSS_120B", 18_434, 17.17),
        ("GEMMA3_27B", 41_178, 38.35),
    ],
)
def test_a_million_tokens_of_a_model_take_what_the_published_table_says(name, bytes_per_token, gib):
    """Windows count with what they hold at the end; overlaps between entries are in no table."""
    nbytes = without_states(bits_8_and_16(getattr(configs, name)), MILLION)
    assert round(nbytes / MILLION) == bytes_per_token
    assert round(nbytes / GIB, 2) == gib


@pytest.mark.parametrize(
    ("name", "state_dtype", "bytes_per_token", "gib", "state_bytes"),
    [
        ("QWEN3_NEXT", "bfloat16", 12_288, 11.52, 77_266_944),
        ("QWEN35_397B", "bfloat16", 15_360, 14.48, 192_061_440),
        ("MINIMAX_M1", "float32", 20_480, 19.35, 293_601_280),
    ],
)
def test_a_model_with_linear_attention_takes_its_full_layers_and_one_state(
    name, state_dtype, bytes_per_token, gib, state_bytes
):
    layout = bits_8_and_16(getattr(configs, name), state_dtype)
    assert layout.bytes_per_token == bytes_per_token
    assert group_bytes(layout, "state") == state_bytes
    assert round(layout.sequence_bytes(MILLION) / GIB, 2) == gib


@pytest.mark.parametrize(
    ("config", "bytes_per_token"),
    [(configs.LLAMA_8B, 65_536), (configs.GPT_OSS_120B, 18_432), (configs.GEMMA3_27B, 40_960), (configs.V3, 35_136)],
)
def test_what_one_more_token_adds_leaves_out_windows(config, bytes_per_token):
    assert bits_8_and_16(config).bytes_per_token == bytes_per_token


@pytest.mark.parametrize(
    ("config", "tokens", "nbytes"),
    [(configs.GPT_OSS_120B, 128, 2_359_296), (configs.GEMMA3_27B, 1024, 218_103_808)],
)
def test_a_window_grows_up_to_its_length(config, tokens, nbytes):
    layout = bits_8_and_16(config)
    assert group_bytes(layout, "window", MILLION) == group_bytes(layout, "window", tokens) == nbytes
    assert group_bytes(layout, "window", tokens // 2) == nbytes // 2


def test_every_kind_of_entry_of_v4_pro_is_counted_to_the_byte():
    layout = bits_8_and_16(PRO)
    assert without_states(layout, MILLION) == 5_887_989_760
    assert group_bytes(layout, "window") == 61 * 128 * 512
    entries = {4: 0, 128: 0}
    for part in layout.groups[0].parts:
        entries[part.tokens_per_entry] += MILLION // part.tokens_per_entry * part.entry_bytes
    assert entries == {4: 3_840_000_000 + 1_920_000_000, 128: 123_992_064}


@pytest.mark.parametrize(
    ("kv", "index", "tokens", "gib"),
    [
        ("float8_e4m3fn", "float8_e4m3fn", MILLION, 4.590),
        ("bfloat16", "bfloat16", MILLION, 9.179),
        ("bfloat16", "bfloat16", 1 << 20, 9.625),
        ("float8_e4m3fn", "bfloat16", 1 << 20, 5.750),
    ],
)
def test_v4_pro_in_other_precisions(kv, index, tokens, gib):
    layout = KVLayout.from_hf_config(PRO, 128, kv, index_dtype=index)
    assert round(without_states(layout, tokens) / GIB, 3) == gib


@pytest.mark.parametrize(
    ("config", "index_dtype", "bytes_per_token"),
    [
        (PRO, "mxfp4", 5_031),
        (PRO, "fp8_scaled", 5_511),
        (FLASH, "mxfp4", 3_514),
        (FLASH, "fp8_scaled", 3_850),
        (configs.V32, "fp8_scaled", 48_068),
    ],
)
def test_packed_entries_of_a_token_take_what_their_kernels_read(config, index_dtype, bytes_per_token):
    assert int(packed(config, index_dtype).bytes_per_token) == bytes_per_token


@pytest.mark.parametrize(
    ("config", "index_dtype", "entries"),
    [
        (configs.V32, "fp8_scaled", {"latent": 656, "index": 132}),
        (configs.V32, "mxfp4", {"latent": 656, "index": 68}),
        (PRO, "fp8_scaled", {"kv": 584, "index": 132}),
        (PRO, "mxfp4", {"kv": 584, "index": 68}),
    ],
)
def test_packed_entries_have_the_sizes_that_their_kernels_read(config, index_dtype, entries):
    layout = packed(config, index_dtype)
    found = {(part.kind, part.entry_bytes) for group in layout.groups for part in group.parts if not part.is_state}
    assert found == set(entries.items())


def test_a_block_of_64_tokens_of_v32_has_the_sizes_of_its_pages():
    layout = packed(configs.V32, block_tokens=64)
    assert [layout.part_bytes(0, part) for part in layout.groups[0].parts[:2]] == [41_984, 8_448]
    assert layout.block_bytes == (61 * 64 * (656 + 132),)
    assert 61 * 64 * 656 == 2_561_024


@pytest.mark.parametrize(("config", "nbytes"), [(PRO, 4_559_872), (FLASH, 3_214_336)])
def test_the_window_of_v4_is_a_checkpoint_of_128_tokens_of_every_layer(config, nbytes):
    assert group_bytes(packed(config), "window") == nbytes
    assert group_bytes(packed(config), "window", tokens=128) == nbytes


def test_pages_of_v4_are_padded_and_entries_are_counted_without():
    """37,376 bytes of 64 entries become 37,440; 1,168 bytes of two become 1,728."""
    layout = packed(PRO)
    pages = {part.tokens_per_entry: part.page_bytes for part in layout.groups[0].parts if part.kind == "kv"}
    assert pages == {4: 65 * 576, 128: 3 * 576}
    assert layout.page_bytes_per_token == (30 * (37_440 + 64 * 132) + 31 * 1_728) / 256
    assert layout.bytes_per_token == (30 * (37_376 + 64 * 132) + 31 * 1_168) / 256


def test_pages_of_other_models_are_not_padded():
    for config in (configs.V32, configs.LLAMA_8B, configs.GEMMA3_27B):
        layout = bits_8_and_16(config)
        assert layout.page_bytes_per_token == layout.bytes_per_token


def test_at_the_end_of_a_block_v4_keeps_the_overlap_of_its_fourfold_layers():
    """Half of what four tokens gave to entry and index key, values and gates."""
    layout = KVLayout.from_hf_config(PRO, 128, "fp8_ds_mla", state_dtype="float32")
    assert group_bytes(layout, "state") == 30 * 4 * (512 + 128) * 2 * 4


def test_the_unfinished_tail_of_v4_as_vllm_keeps_it_is_a_layout_too():
    """Windows of the compressors' inputs in float32: 8,192 and 2,048 bytes for 8 tokens, 4,096 bytes for 128."""

    def inputs(layers, width):
        return tuple(
            Part(layer, "state", "float32", ("token", "dim"), (8, width), name=f"inputs_{width}") for layer in layers
        )

    fourfold, others = range(2, 61, 2), [0, 1, *range(3, 61, 2)]
    short = KVGroup("short", inputs(fourfold, 2 * 2 * 512) + inputs(fourfold, 2 * 2 * 128), Reuse("trailing", 8))
    long = KVGroup("long", inputs(others, 2 * 512), Reuse("trailing", 128))
    nbytes = KVLayout(128, 8, (short, long)).sequence_bytes(MILLION)
    assert nbytes == 30 * 8 * (8_192 + 2_048) + 31 * 128 * 4_096
    assert round(nbytes / (1 << 20), 1) == 17.8
