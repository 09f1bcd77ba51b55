"""The layouts that are measured."""

from __future__ import annotations

from benchmarks.kinds import deepseek_v4_flash, deepseek_v32, llama_8b, small_blocks


def test_the_layout_is_that_of_llama_8b() -> None:
    layout = llama_8b(64)
    assert layout.bytes_per_token == 128 << 10
    assert layout.groups[0].parts[0].shape == (16, 8, 128)
    assert len(layout.groups[0].parts) == 64


def test_blocks_have_the_sizes_that_they_are_named_after() -> None:
    assert small_blocks().block_bytes == (64 << 10,)
    sizes = {part.page_bytes for part in deepseek_v32().groups[0].parts}
    assert sizes == {41_984, 8_448}
    assert deepseek_v32().block_bytes == (61 * (41_984 + 8_448),)


def test_a_block_of_v4_flash_has_an_entry_for_4_or_for_128_tokens_and_a_window_beside_it() -> None:
    for tokens in (128, 256):
        attention, window, state = deepseek_v4_flash(tokens).groups
        assert {part.tokens_per_entry for part in attention.parts} == {4, 128}
        assert (len(attention.parts), len(window.parts), len(state.parts)) == (62, 43, 84)
        assert (window.reuse.rule, state.reuse.rule) == ("trailing", "last")
