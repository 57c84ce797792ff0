"""Fast mode: whole batches by what a few exact ones cost, and how far that is from simulating every slice."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sim import fast
from sim.compare import fast_difference
from sim.config import PAIRS, Scenario
from sim.costs import load_calibration, prices
from sim.fast import BatchCost, BatchCosts, measure
from sim.runs import Job, Run, simulate

ROOT = Path(__file__).parents[2]
TRACE = ROOT.parent / "shared" / "data" / "traces" / "conversation_trace.jsonl"
BOUND = 0.01  # of the mean response time
NO_DECODE = {"first_token": "0s"}  # the same in both modes, so that it would only make their difference look small


def scenario(**sections: Any) -> Scenario:
    """The shape of the incident, smaller: layers of 6,000 slices, computed in about the time of their transfer."""
    shape = {
        "kind": "shape", "layers": 16, "ranks": 2, "slices": 6000, "slice_bytes": "512B", "requests": 4,
        "arrival": {"process": "poisson", "every": "10ms"},
    }  # fmt: skip
    return Scenario.model_validate(
        {"name": "test", "workload": shape, "prefill": {"layer_time": "500us"}, "decode": NO_DECODE, **sections}
    )


def both(asked: Scenario, pair: str) -> tuple[Run, Run]:
    """The same job in fast and in exact mode."""
    return tuple(simulate(Job(asked.model_copy(update={"mode": mode}), pair, 0)) for mode in ("fast", "exact"))  # type: ignore[return-value]


def apart(a: float, b: float) -> float:
    return abs(a - b) / b


# ------------------------------------------------------------------------------ against exact mode
@pytest.mark.parametrize("pair", PAIRS)
def test_mean_response_is_within_one_percent_of_exact_mode(pair: str) -> None:
    guess, truth = both(scenario(), pair)
    assert apart(guess.response.mean(), truth.response.mean()) < BOUND
    assert guess.slices == truth.slices
    assert guess.figures.closes == truth.figures.closes == 4 * 16 * 2
    assert guess.figures.leaked_slices == truth.figures.leaked_slices
    assert apart(guess.figures.close_ps, truth.figures.close_ps) < 0.05
    assert apart(guess.figures.busy_ps, truth.figures.busy_ps) < 0.05
    if truth.figures.all_freeing_ps:
        assert apart(guess.figures.all_freeing_ps, truth.figures.all_freeing_ps) < 0.05


def test_a_worker_that_falls_behind_is_seen_in_both_modes() -> None:
    """Heap + inline at a rate the worker cannot keep: the backlog, not one batch, decides the response time."""
    hurried = scenario(prefill={"layer_time": "200us", "jitter": 0.0})
    guess, truth = both(hurried, "heap/inline")
    quick = simulate(Job(hurried, "pool/bulk", 0))
    assert truth.response.mean() > 1.2 * quick.response.mean()
    assert apart(guess.response.mean(), truth.response.mean()) < BOUND
    assert apart(guess.stall.mean(), truth.stall.mean()) < 0.05


@pytest.mark.skipif(not TRACE.exists(), reason=f"the trace is not part of the project: {TRACE}")
@pytest.mark.parametrize("pair", ["pool/bulk", "heap/inline"])
def test_a_sample_of_the_conversation_trace_is_within_one_percent(pair: str) -> None:
    """Batches of many sizes, so that most are interpolated; requests that wait for each other."""
    asked = Scenario.model_validate(
        {
            "name": "trace",
            "workload": {"kind": "trace", "path": str(TRACE), "page": 1, "ranks": 4, "limit": 5},
            "prefill": {"flops": "9900T"},  # ten times the usual, so that transfers are the bottleneck
            "decode": NO_DECODE,
        }
    )
    guess, truth = both(asked, pair)
    assert apart(guess.response.mean(), truth.response.mean()) < BOUND
    assert (abs(guess.response - truth.response) < BOUND * truth.response).all()


def test_the_difference_is_measured_and_said() -> None:
    note = fast_difference(scenario(mode="fast"), "heap/inline")
    assert note.startswith("fast mode: over the first 4 requests under heap + inline, mean response time differs")
    share = float(note.partition("from the exact mode by ")[2].partition("%")[0])
    assert share < 100 * BOUND


# ------------------------------------------------------------------------------ costs of batches
def costs(pair: str) -> BatchCosts:
    asked = scenario()
    store, policy = pair.split("/")
    return BatchCosts(asked, store, policy, prices(load_calibration("shipped"), asked, policy, 6000))


def measured(pair: str, slices: int) -> BatchCost:
    asked = scenario()
    store, policy = pair.split("/")
    return measure(asked, store, policy, prices(load_calibration("shipped"), asked, policy, 6000), slices, 512)


@pytest.mark.parametrize("pair", ["heap/inline", "heap/thread_cache", "pool/bulk", "pool/epoch"])
def test_more_slices_never_cost_less(pair: str) -> None:
    of = costs(pair)
    sizes = [*range(1, 40), *range(40, 3000, 37)]
    every = [of(n, 512) for n in sizes]
    for before, after in pairwise(every):
        assert all(x <= y for x, y in zip(before, after, strict=True)), (before, after)


def test_a_measured_size_is_exact_and_others_lie_between_their_neighbours() -> None:
    of = costs("heap/inline")
    grid = sorted({fast._grid(step) for step in range(70)})
    low, high = next((a, b) for a, b in pairwise(grid) if a > 1000)
    assert of(low, 512) == measured("heap/inline", low)
    assert of(high, 512) == measured("heap/inline", high)
    middle = (low + high) // 2
    share = (middle - low) / (high - low)
    for name, a, b, value in zip(BatchCost._fields, of(low, 512), of(high, 512), of(middle, 512), strict=True):
        assert value == round(a + (b - a) * share), name


@pytest.mark.parametrize("pair", ["heap/inline", "heap/on_close", "pool/bulk"])
@pytest.mark.parametrize("slices", [3, 77, 300, 1234, 5000])
def test_interpolation_is_close_to_what_an_exact_batch_costs(pair: str, slices: int) -> None:
    """The latency of a batch of any size within 2 %: chunks and chains make steps that no line follows."""
    guess, truth = costs(pair)(slices, 512), measured(pair, slices)
    assert apart(guess.latency, truth.latency) < 0.02
    assert abs(guess.occupancy - truth.occupancy) < 0.02 * truth.latency
    assert apart(guess.submit, truth.submit) < 0.02
    assert apart(guess.close, truth.close) < 0.02


def test_a_batch_alone_takes_its_latency_and_one_behind_another_its_occupancy() -> None:
    cost = measured("pool/bulk", 2000)
    assert 0 < cost.occupancy < cost.latency
    assert cost.busy < cost.latency + cost.occupancy
    assert cost.freeing == 0 < cost.all_freeing
