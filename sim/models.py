"""Models of transformers: the slices of their KV cache, and how long a layer of their prefill computes.

The dimensions are those of the published model configurations (`config.json` of each model).
"""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import BaseModel, Field

from mooncache.errors import UsageError

DType = Literal["bf16", "fp16", "fp8"]
DTYPE_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp8": 1}


class Transformer(BaseModel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False):
    """The dimensions that decide slice counts, slice sizes and compute time.

    Grouped-query attention (GQA): K and V are two buffers of `kv_heads * head_dim` elements a token, divided
    among the ranks. Multi-head latent attention (MLA, `latent > 0`): one buffer of `latent` elements a token,
    of which every rank holds, and sends, a whole copy.
    """

    name: str = "inline"
    layers: int = Field(gt=0, le=1024)  # eight times the deepest models published
    parameters: float = Field(gt=0, le=1e15)  # active for one token, all layers; of experts only those used
    query_heads: int = Field(gt=0, le=4096)
    kv_heads: int = Field(default=1, gt=0, le=4096)  # not used by MLA
    head_dim: int = Field(gt=0, le=1 << 16)  # elements of one head of V, and of Q and K before rope_dim
    latent: int = Field(default=0, ge=0, le=1 << 20)  # MLA: elements a token; 0 is GQA
    rope_dim: int = Field(default=0, ge=0, le=1 << 16)  # MLA: further elements of each head of Q and K

    @property
    def buffers(self) -> int:
        """The KV buffers of a layer: K and V, or the one latent."""
        return 1 if self.latent else 2


def _gqa(name: str, layers: int, parameters: float, query_heads: int, kv_heads: int) -> Transformer:
    return Transformer(
        name=name,
        layers=layers,
        parameters=parameters,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=128,
    )


def _mla(name: str, layers: int, parameters: float, query_heads: int) -> Transformer:
    return Transformer(
        name=name,
        layers=layers,
        parameters=parameters,
        query_heads=query_heads,
        head_dim=128,
        latent=512 + 64,
        rope_dim=64,
    )


PRESETS: dict[str, Transformer] = {
    model.name: model
    for model in (
        _gqa("llama3-8b", layers=32, parameters=8.0e9, query_heads=32, kv_heads=8),
        _gqa("llama3-70b", layers=80, parameters=70.6e9, query_heads=64, kv_heads=8),
        _gqa("qwen2.5-7b", layers=28, parameters=7.6e9, query_heads=28, kv_heads=4),
        _gqa("qwen2.5-72b", layers=80, parameters=72.7e9, query_heads=64, kv_heads=8),
        _gqa("qwen3-30b", layers=48, parameters=3.3e9, query_heads=32, kv_heads=4),
        _gqa("qwen3-32b", layers=64, parameters=32.8e9, query_heads=64, kv_heads=8),
        _gqa("qwen3-235b", layers=94, parameters=22.0e9, query_heads=64, kv_heads=4),
        _mla("deepseek-v3", layers=61, parameters=37.0e9, query_heads=128),
        _mla("kimi-k2", layers=61, parameters=32.0e9, query_heads=64),
    )
}


ALIASES = {
    "llama-3-8b": "llama3-8b",
    "llama-3.1-8b": "llama3-8b",
    "llama-3-70b": "llama3-70b",
    "llama-3.1-70b": "llama3-70b",
    "llama-3.3-70b": "llama3-70b",
    "qwen3-30b-a3b": "qwen3-30b",
    "qwen3-235b-a22b": "qwen3-235b",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-r1": "deepseek-v3",
}
"""Models of the same dimensions, by the names they are published under."""

_ADDED = re.compile(r"^meta-(?=llama)|-(instruct|chat|base|hf|fp8|0324|0528|2507)(?=-|$)")


def preset(name: str) -> Transformer | None:
    """Return the preset of a model, also by its name on hubs: meta-llama/Llama-3.1-70B-Instruct. None if unknown."""
    plain = _ADDED.sub("", name.rpartition("/")[2].lower())
    plain = re.sub(r"^llama3(?=[.-])", "llama-3", plain) if plain not in PRESETS else plain
    return PRESETS.get(ALIASES.get(plain, plain))


def token_bytes(model: Transformer, ranks: int, dtype: DType) -> int:
    """Return the bytes of one token in one KV buffer of one layer on one rank.

    GQA: heads/rank * head_dim * width; a rank has at least one head, so beyond `kv_heads` ranks heads are
    replicated. MLA: latent * width on each rank.
    Raises: UsageError if the KV heads cannot be dealt out evenly.
    """
    if model.latent:
        return model.latent * DTYPE_BYTES[dtype]
    if model.kv_heads % ranks and ranks % model.kv_heads:
        raise UsageError(
            f"expected ranks that divide the {model.kv_heads} KV heads of {model.name}, "
            f"or a multiple of them, came {ranks}"
        )
    return max(1, model.kv_heads // ranks) * model.head_dim * DTYPE_BYTES[dtype]


def _cut(
    model: Transformer, tokens: int, page: int, ranks: int, mean_run: float, dtype: DType, limit: int
) -> tuple[int, int]:
    """Return (slices, bytes) of one buffer: runs of `mean_run` pages, each sent whole, cut at `limit` bytes."""
    pages = math.ceil(tokens / page)
    runs = math.ceil(pages / mean_run)
    buffer_bytes = pages * page * token_bytes(model, ranks, dtype)
    return runs * math.ceil(buffer_bytes / runs / limit), buffer_bytes


def slices_per_layer(
    model: Transformer,
    tokens: int,
    page: int,
    ranks: int,
    mean_run: float = 1.0,
    dtype: DType = "bf16",
    limit: int = 65536,
) -> int:
    """Count the slices that one rank sends for a layer: `buffers * ceil(ceil(tokens / page) / mean_run)`.

    Args:
        tokens:   prompt length; whole pages are sent.
        page:     tokens in a page of the KV cache.
        ranks:    tensor parallelism.
        mean_run: pages that lie next to each other at both ends, on average, and merge into one slice.
        limit:    bytes a slice may have; longer runs are cut, all runs taken at their mean length.
    Source: the formula reproduces the 20,000 to 30,000 slices a layer of the TP4 incident (page 1, 512 B).
    """
    return model.buffers * _cut(model, tokens, page, ranks, mean_run, dtype, limit)[0]


def slice_bytes(
    model: Transformer,
    tokens: int,
    page: int,
    ranks: int,
    mean_run: float = 1.0,
    dtype: DType = "bf16",
    limit: int = 65536,
) -> int:
    """Return the mean bytes of those slices, rounded up. Exact if `mean_run` is 1 and a page fits into `limit`."""
    slices, buffer_bytes = _cut(model, tokens, page, ranks, mean_run, dtype, limit)
    return math.ceil(buffer_bytes / slices)


def layer_time_ps(model: Transformer, computed: int, context: int, ranks: int, flops: int, efficiency: float) -> int:
    """Estimate from floating point operations how long one layer of prefill computes, ps.

        matrices:  2 * parameters / layers * computed
        attention: 2 * query_heads * (width of a K head + width of a V head) * pairs
        pairs:     computed * (context - computed / 2), the causal half of a square plus the cached part

    Args:
        computed:   last tokens of the prompt, those that no prefix cache had.
        context:    tokens of the whole prompt, `computed` included.
        ranks:      tensor parallelism; the work is taken to divide evenly.
        flops:      FLOP/s of one accelerator, dense.
        efficiency: share of it that a prefill reaches (0.5 is usual).
    Source: Kaplan et al., Scaling Laws for Neural Language Models, 2020, section 2.1 (2 FLOP a parameter
    and token); attention as counted in FlashAttention-2 (Dao, 2023, section 4), halved for causality.
    """
    matrices = 2 * model.parameters / model.layers * computed
    head_width = 2 * model.head_dim + model.rope_dim
    attention = 2 * model.query_heads * head_width * computed * (context - computed / 2)
    return round((matrices + attention) / (ranks * flops * efficiency) * 1e12)
