"""KV shapes and compute estimates, against the published tables."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.errors import UsageError
from sim.models import PRESETS, Transformer, layer_time_ps, slice_bytes, slices_per_layer, token_bytes

LLAMA_70B = PRESETS["llama3-70b"]
H100 = 990 * 10**12


def test_page_1_at_tp4_is_the_shape_of_the_incident() -> None:
    assert slice_bytes(LLAMA_70B, tokens=12_500, page=1, ranks=4) == 512
    assert slices_per_layer(LLAMA_70B, tokens=12_500, page=1, ranks=4) == 25_000


@pytest.mark.parametrize(
    ("model", "kib_per_token"),
    [
        ("llama3-8b", 128),
        ("llama3-70b", 320),
        ("qwen2.5-7b", 56),
        ("qwen2.5-72b", 320),
        ("qwen3-30b", 96),
        ("qwen3-32b", 256),
        ("qwen3-235b", 188),
        ("deepseek-v3", 68.625),
        ("kimi-k2", 68.625),
    ],
)
def test_presets_have_the_kv_bytes_of_their_published_configurations(model: str, kib_per_token: float) -> None:
    shape = PRESETS[model]
    assert shape.layers * shape.buffers * token_bytes(shape, 1, "bf16") == kib_per_token * 1024


@pytest.mark.parametrize(
    ("model", "ranks", "tokens", "page", "slices", "size"),
    [
        ("llama3-8b", 1, 8_192, 1, 16_384, 2_048),
        ("llama3-70b", 4, 32_768, 64, 1_024, 32_768),
        ("llama3-70b", 8, 32_768, 1, 65_536, 256),
        ("qwen3-235b", 8, 8_192, 1, 16_384, 256),  # 8 ranks share 4 heads: each has a whole one
        ("deepseek-v3", 8, 8_192, 1, 8_192, 1_152),
        ("deepseek-v3", 8, 8_192, 64, 256, 36_864),  # 72 KiB a page: cut in two
    ],
)
def test_slices_and_their_size(model: str, ranks: int, tokens: int, page: int, slices: int, size: int) -> None:
    assert slices_per_layer(PRESETS[model], tokens, page, ranks) == slices
    assert slice_bytes(PRESETS[model], tokens, page, ranks) == size


def test_fp8_halves_the_slice_and_adjacent_pages_divide_the_count() -> None:
    assert slice_bytes(LLAMA_70B, 8_192, 1, 4, dtype="fp8") == 256
    assert slices_per_layer(LLAMA_70B, 8_192, 16, 4, mean_run=4) == 256
    assert slice_bytes(LLAMA_70B, 8_192, 16, 4, mean_run=4) == 4 * 8_192


def test_heads_that_cannot_be_dealt_out_are_refused() -> None:
    with pytest.raises(UsageError, match="expected ranks that divide the 8 KV heads of llama3-70b"):
        token_bytes(LLAMA_70B, 3, "bf16")


@given(
    tokens=st.integers(1, 200_000),
    page=st.sampled_from([1, 16, 64, 128]),
    ranks=st.sampled_from([1, 2, 4, 8, 16]),
    mean_run=st.floats(1, 100),
    model=st.sampled_from(sorted(PRESETS)),
)
def test_slices_hold_all_bytes_and_stay_within_the_limit(
    tokens: int, page: int, ranks: int, mean_run: float, model: str
) -> None:
    shape = PRESETS[model]
    slices = slices_per_layer(shape, tokens, page, ranks, mean_run)
    size = slice_bytes(shape, tokens, page, ranks, mean_run)
    total = shape.buffers * math.ceil(tokens / page) * page * token_bytes(shape, ranks, "bf16")
    assert 1 <= size <= 65_536
    assert total <= slices * size < total + slices


@pytest.mark.parametrize(
    ("model", "ranks", "tokens", "milliseconds"),
    [
        ("llama3-8b", 1, 8_192, 9.4),
        ("llama3-70b", 4, 8_192, 7.9),
        ("llama3-70b", 4, 131_072, 259),
        ("qwen3-235b", 8, 8_192, 1.2),
        ("deepseek-v3", 8, 32_768, 21),
    ],
)
def test_a_layer_takes_the_time_of_the_published_estimate(
    model: str, ranks: int, tokens: int, milliseconds: float
) -> None:
    time = layer_time_ps(PRESETS[model], tokens, tokens, ranks, H100, 0.5)
    assert time / 10**9 == pytest.approx(milliseconds, rel=0.05)


def test_the_demo_layer_of_2_ms_is_1850_tokens_computed_after_10650_cached() -> None:
    assert layer_time_ps(LLAMA_70B, 1_850, 12_500, 4, H100, 0.5) / 10**9 == pytest.approx(2.0, rel=0.01)


@given(parts=st.lists(st.integers(1, 5_000), min_size=1, max_size=5))
def test_computing_a_prompt_in_chunks_takes_as_long_as_at_once(parts: list[int]) -> None:
    ends = [sum(parts[: count + 1]) for count in range(len(parts))]
    chunks = sum(layer_time_ps(LLAMA_70B, part, end, 4, H100, 0.5) for part, end in zip(parts, ends, strict=True))
    assert chunks == pytest.approx(layer_time_ps(LLAMA_70B, sum(parts), sum(parts), 4, H100, 0.5), abs=len(parts))


def test_dimensions_are_checked() -> None:
    with pytest.raises(ValueError, match="layers"):
        Transformer(layers=0, parameters=1e9, query_heads=1, head_dim=1)
