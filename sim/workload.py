"""The workload of a scenario in numbers: when requests arrive, what they send, how long their layers compute.

All chance is drawn here, from streams of (seed, entity, purpose), before any policy is simulated. So every
policy of a replication gets the same requests at the same picosecond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncache.errors import UsageError
from sim import config
from sim.models import layer_time_ps, slice_bytes, slices_per_layer
from sim.streams import stream
from sim.trace import Int64Array, bucket_width_ms, read_trace, spread, uncached_tokens
from sim.units import format_duration

_ARRIVALS_PS_MAX = 2**58  # 80 hours; int64 then holds even sums of gaps 32 times as long as expected

_VIRTUAL_PS_MAX = 2**62  # 53 days: half of what int64 holds, so that no sum of two instants overflows
PS_PER_S = 10**12

SLICES_MAX = 10**10
"""Simulated one by one: some minutes. Fast mode simulates so many of its sample."""

SAMPLE_REQUESTS = 4
"""The requests of a fast run that are simulated exactly as well."""


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt whose KV cache goes from prefill to decode."""

    index: int  # 0 .. requests - 1, in the order of arrival
    arrival_ps: int
    tokens: int  # of the prompt, all of which are sent
    output_tokens: int  # decode steps, for which the decode side keeps the pages
    slices: int  # for each layer and rank
    slice_bytes: int  # of each slice; the mean, rounded up, where slices differ
    pages: int  # of the decode side's page pool; one page spans all layers
    layer_ps: Int64Array  # int64[layers]  compute time of each layer, jitter applied


@dataclass(frozen=True, eq=False)
class Workload:
    """All requests of one replication."""

    layers: int
    ranks: int
    requests: list[Request]
    notes: tuple[str, ...] = ()  # sentences for the report: what was assumed or changed on the way

    @property
    def total_slices(self) -> int:
        """The slices of all requests, layers and ranks."""
        return self.layers * self.ranks * sum(request.slices for request in self.requests)

    @property
    def compute_ps(self) -> int:
        """The time that all layers of all requests compute, one after the other."""
        return sum(int(request.layer_ps.sum()) for request in self.requests)

    def __repr__(self) -> str:
        shape = f"{len(self.requests)} requests x {self.layers} layers x {self.ranks} ranks"
        return f"<Workload {shape}, {self.total_slices:,} slices>"


def build_workload(scenario: config.Scenario, seed: int) -> Workload:
    """Build the requests of one replication: the same for the same scenario and seed, whatever the policy.

    Raises: TraceError for a malformed trace; UsageError for a request that could never be served, because a
    layer of it has more slices than the engine's pool or its prompt more pages than the decode side.
    """
    asked = scenario.workload
    if isinstance(asked, config.Shape):
        workload = _of_shape(scenario, asked, seed)
    elif isinstance(asked, config.Model):
        workload = _of_prompts(scenario, asked, _model_prompts(asked, seed), seed)
    else:
        workload = _of_prompts(scenario, asked, _trace_prompts(asked, seed), seed)
    _check_ends(scenario, workload)
    for request in workload.requests:
        _check_fits("engine.pool_slices", scenario.engine.pool_slices, request.slices, "slices of a layer", request)
        _check_fits("decode.pages", scenario.decode.pages, request.pages, "pages", request)
    return workload


class _Prompts(NamedTuple):
    """The requests of a workload as columns; row i is request i."""

    arrival_ps: Int64Array  # int64[n]  ascending
    tokens: Int64Array  # int64[n]
    computed: Int64Array  # int64[n]  tokens not found in a prefix cache, at least 1
    output_tokens: Int64Array  # int64[n]
    notes: tuple[str, ...]


def _of_shape(scenario: config.Scenario, shape: config.Shape, seed: int) -> Workload:
    """Make requests that are all alike. Tokens and pages are those of page 1 with K and V apart: two slices a token."""
    tokens = math.ceil(shape.slices / 2)
    layer_time = scenario.prefill.layer_time or 0
    requests = [
        Request(
            index=index,
            arrival_ps=arrival,
            tokens=tokens,
            output_tokens=shape.output_tokens,
            slices=shape.slices,
            slice_bytes=shape.slice_bytes,
            pages=tokens,
            layer_ps=_jittered(layer_time, shape.layers, scenario.prefill.jitter, seed, index),
        )
        for index, arrival in enumerate(_arrivals(shape.arrival, shape.requests, seed).tolist())
    ]
    return Workload(shape.layers, shape.ranks, requests)


def _of_prompts(
    scenario: config.Scenario, cache: config.Model | config.Trace, prompts: _Prompts, seed: int
) -> Workload:
    """Make requests of prompts on a model: token counts become slices, pages and compute time."""
    model, prefill = cache.model, scenario.prefill
    layout = (cache.page, cache.ranks, cache.mean_run, cache.dtype, scenario.engine.slice_bytes)
    requests = []
    rows = zip(*(column.tolist() for column in prompts[:4]), strict=True)
    for index, (arrival, tokens, computed, output_tokens) in enumerate(rows):
        layer_time = prefill.layer_time
        if layer_time is None:
            layer_time = layer_time_ps(model, computed, tokens, cache.ranks, prefill.flops, prefill.efficiency)
        requests.append(
            Request(
                index=index,
                arrival_ps=arrival,
                tokens=tokens,
                output_tokens=output_tokens,
                slices=slices_per_layer(model, tokens, *layout),
                slice_bytes=slice_bytes(model, tokens, *layout),
                pages=math.ceil(tokens / cache.page),
                layer_ps=_jittered(layer_time, model.layers, prefill.jitter, seed, index),
            )
        )
    return Workload(model.layers, cache.ranks, requests, prompts.notes)


def _model_prompts(asked: config.Model, seed: int) -> _Prompts:
    """Make prompts of one length."""
    computed = max(1, asked.tokens - round(asked.cached * asked.tokens))
    arrival = _arrivals(asked.arrival, asked.requests, seed)
    same = np.full_like
    return _Prompts(
        arrival, same(arrival, asked.tokens), same(arrival, computed), same(arrival, asked.output_tokens), ()
    )


def _trace_prompts(asked: config.Trace, seed: int) -> _Prompts:
    """Take requests `start` to `start + limit` of the trace; time zero is when the first of them arrives.

    Buckets are detected, and prefixes remembered, over the whole trace: what came before `start` has filled
    the cache.
    """
    trace = read_trace(asked.path)
    taken = slice(asked.start, None if asked.limit is None else asked.start + asked.limit)
    if asked.start >= trace.requests:
        raise UsageError(
            f"workload.start: expected less than {trace.requests}, the requests of {asked.path}, came {asked.start}"
        )
    notes = []
    width = bucket_width_ms(trace)
    if width and asked.spread == "auto":
        notes.append(f"time stamps come in buckets of {width} ms; spread uniformly inside them by seed")
    elif width:
        notes.append(f"time stamps come in buckets of {width} ms and are replayed as they are: expect bursts")
    arrival = spread(trace.timestamp_ms, width if asked.spread == "auto" else 0, stream(seed, "trace", "spread"))
    computed = trace.input_length
    if asked.prefix_cache == "infinite":
        computed = uncached_tokens(trace)
        share = 1 - computed[taken].sum() / trace.input_length[taken].sum()
        notes.append(f"an infinite prefix cache has {share:.1%} of the input tokens: they are sent, not computed")
    return _Prompts(
        arrival[taken] - arrival[asked.start],
        trace.input_length[taken],
        np.maximum(1, computed[taken]),
        trace.output_length[taken],
        tuple(notes),
    )


def _arrivals(arrival: config.Arrival, requests: int, seed: int) -> Int64Array:
    """Return arrival times in picoseconds, ascending; int64[requests]. One more request moves none of the others."""
    if requests * arrival.every > _ARRIVALS_PS_MAX:
        longest = format_duration(_ARRIVALS_PS_MAX)
        raise UsageError(
            f"workload.arrival.every: expected requests x every up to {longest}, "
            f"came {requests} x {format_duration(arrival.every)}"
        )
    if arrival.process == "fixed":
        return np.arange(requests, dtype=np.int64) * arrival.every
    gaps = stream(seed, "workload", "arrivals").standard_exponential(requests) * arrival.every
    return np.rint(np.cumsum(gaps)).astype(np.int64)


def _jittered(layer_time: int, layers: int, variation: float, seed: int, index: int) -> Int64Array:
    """Draw the picoseconds each layer computes, int64[layers]: lognormal of that mean and coefficient of variation."""
    variance = math.log1p(variation**2)
    draws = stream(seed, f"request/{index}", "jitter").standard_normal(layers)
    factors: npt.NDArray[np.float64] = np.exp(math.sqrt(variance) * draws - variance / 2)
    times = layer_time * factors
    if times.sum() > _VIRTUAL_PS_MAX:
        raise UsageError(
            f"prefill: expected layers that compute for {format_duration(_VIRTUAL_PS_MAX)} at most, all together, "
            f"came {times.sum() / PS_PER_S:.3g} s; see layer_time, or flops and efficiency"
        )
    return np.rint(times).astype(np.int64)


def _check_ends(scenario: config.Scenario, workload: Workload) -> None:
    """Refuse what takes too long to simulate, or longer than virtual time can count, each thing after the other."""
    nic, requests = scenario.nic, workload.requests
    slices = sum(request.slices for request in requests) * workload.layers
    nbytes = sum(request.slices * request.slice_bytes for request in requests) * workload.layers
    exactly = sum(request.slices for request in (requests if scenario.mode == "exact" else requests[:SAMPLE_REQUESTS]))
    exactly *= workload.layers * workload.ranks
    if exactly > SLICES_MAX:
        what = "all requests; mode: fast takes more" if scenario.mode == "exact" else f"the first {SAMPLE_REQUESTS}"
        raise UsageError(
            f"workload: expected up to {SLICES_MAX:,} slices to simulate one by one, came {exactly:,} of {what}"
        )
    spans = {
        "workload.arrival": max(request.arrival_ps for request in requests),
        "prefill.layer_time": sum(int(request.layer_ps.sum(dtype=np.float64)) for request in requests),
        "nic.rate": nbytes * 8 * PS_PER_S // nic.rate,
        "nic.message_rate": slices * PS_PER_S // nic.message_rate,
        "nic.latency": slices * nic.latency,
        "decode.first_token": len(requests) * scenario.decode.first_token,
        "decode.token_time": sum(request.output_tokens for request in requests) * scenario.decode.token_time,
        "reclaim.period": len(requests) * workload.layers * scenario.reclaim.period,
    }
    key, longest = max(spans.items(), key=lambda item: item[1])
    if sum(spans.values()) > _VIRTUAL_PS_MAX:
        raise UsageError(
            f"{key}: expected a scenario of at most {format_duration(_VIRTUAL_PS_MAX)} of virtual time, "
            f"came one of which this alone takes {longest / PS_PER_S:.3g} s"
        )


def _check_fits(key: str, capacity: int | None, needed: int, noun: str, request: Request) -> None:
    if capacity is not None and needed > capacity:
        raise UsageError(f"{key}: expected at least {needed}, the {noun} of request {request.index}, came {capacity}")
