"""Workloads: deterministic, the same for every policy, and never impossible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.errors import UsageError
from sim.config import Scenario, load_scenario
from sim.errors import TraceError
from sim.streams import stream
from sim.workload import Workload, build_workload
from tests.helpers import environment

ROOT = Path(__file__).parents[2]

SHAPE = {
    "kind": "shape",
    "layers": 4,
    "ranks": 2,
    "slices": 11,
    "slice_bytes": "512B",
    "requests": 5,
    "arrival": {"every": "1ms"},
}
MODEL = {"kind": "model", "tokens": 1000, "cached": 0.25, "requests": 3, "arrival": {"every": "1s"}}


def scenario(workload: dict[str, object], **sections: object) -> Scenario:
    sections.setdefault("prefill", {"layer_time": "3ms"} if workload["kind"] == "shape" else {})
    return Scenario.model_validate({"name": "test", "workload": workload, **sections})


def fingerprint(workload: Workload) -> list[object]:
    return [
        (request.arrival_ps, request.tokens, request.slices, request.slice_bytes, request.layer_ps.tolist())
        for request in workload.requests
    ]


@pytest.fixture
def trace(tmp_path: Path) -> dict[str, object]:
    """60 requests, four on each stamp, 3 s apart; the same 1,024 tokens first in each."""
    rows = [
        {
            "timestamp": 9 + 3000 * (i // 4),
            "input_length": 1500,
            "output_length": i,
            "hash_ids": [0, 1, 2 + i],
        }
        for i in range(60)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"kind": "trace", "path": str(path)}


# Shapes


def test_a_shape_is_taken_as_stated() -> None:
    workload = build_workload(scenario(SHAPE), seed=1)
    assert (workload.layers, workload.ranks, len(workload.requests)) == (4, 2, 5)
    assert workload.total_slices == 4 * 2 * 5 * 11
    request = workload.requests[2]
    assert (request.index, request.slices, request.slice_bytes) == (2, 11, 512)
    assert (request.tokens, request.pages) == (6, 6)  # two slices a token, K and V
    assert request.layer_ps.shape == (4,)
    assert request.layer_ps.dtype == np.int64
    assert "440 slices" in repr(workload)


def test_fixed_arrivals_are_evenly_spaced_and_poisson_ones_are_not() -> None:
    fixed = build_workload(scenario({**SHAPE, "arrival": {"process": "fixed", "every": "1ms"}}), seed=1)
    assert [request.arrival_ps for request in fixed.requests] == [i * 10**9 for i in range(5)]
    many = build_workload(scenario({**SHAPE, "requests": 4000}), seed=1)
    gaps = np.diff([request.arrival_ps for request in many.requests])
    assert gaps.mean() == pytest.approx(10**9, rel=0.05)
    assert gaps.std() == pytest.approx(10**9, rel=0.05)


def test_jitter_keeps_the_mean_and_has_the_stated_variation() -> None:
    workload = build_workload(
        scenario({**SHAPE, "layers": 1000, "requests": 20}, prefill={"layer_time": "3ms", "jitter": 0.5}),
        seed=1,
    )
    layers = np.concatenate([request.layer_ps for request in workload.requests])
    assert layers.mean() == pytest.approx(3 * 10**9, rel=0.02)
    assert layers.std() / layers.mean() == pytest.approx(0.5, rel=0.05)
    still = build_workload(scenario(SHAPE, prefill={"layer_time": "3ms", "jitter": 0.0}), seed=1)
    assert set(still.requests[0].layer_ps.tolist()) == {3 * 10**9}


# Chance


def test_one_seed_gives_one_workload_and_another_seed_another() -> None:
    asked = scenario(SHAPE)
    assert fingerprint(build_workload(asked, 7)) == fingerprint(build_workload(asked, 7))
    assert fingerprint(build_workload(asked, 7)) != fingerprint(build_workload(asked, 8))


def test_neither_policy_nor_engine_moves_the_requests() -> None:
    one = build_workload(scenario(SHAPE, pairs=["heap/inline"]), 1)
    other = build_workload(scenario(SHAPE, pairs=["pool/bulk"], engine={"queue_depth": 8}), 1)
    assert fingerprint(one) == fingerprint(other)


def test_more_requests_leave_the_first_ones_where_they_are() -> None:
    few = fingerprint(build_workload(scenario(SHAPE), 1))
    more = fingerprint(build_workload(scenario({**SHAPE, "requests": 9}), 1))
    assert more[:5] == few


def test_the_workload_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "from sim.config import load_scenario; from sim.workload import build_workload;"
        "w = build_workload(load_scenario('configs/tp4_layerwise.yaml'), 3);"
        "print([(r.arrival_ps, r.layer_ps.tolist()) for r in w.requests])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment(PYTHONHASHSEED=seed),
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@given(names=st.lists(st.tuples(st.integers(0, 3), st.text(max_size=3), st.text(max_size=3)), unique=True))
def test_streams_of_different_names_differ(names: list[tuple[int, str, str]]) -> None:
    assert len({int(stream(*name).integers(2**62)) for name in names}) == len(names)


def test_a_stream_is_pinned_so_that_old_results_can_be_replayed() -> None:
    draws = stream(1, "request/0", "jitter").integers(10**9, size=3)
    assert draws.tolist() == [245965025, 562662533, 382273226]


# Models and traces


def test_prompts_become_slices_pages_and_compute_time() -> None:
    workload = build_workload(scenario({**MODEL, "page": 16}, prefill={"jitter": 0.0}), 1)
    request = workload.requests[0]
    assert (workload.layers, workload.ranks) == (80, 4)
    assert (request.tokens, request.slices, request.slice_bytes, request.pages) == (1000, 126, 8192, 63)
    cold = build_workload(scenario({**MODEL, "cached": 0.0}, prefill={"jitter": 0.0}), 1).requests[0]
    warm = build_workload(scenario({**MODEL, "cached": 1.0}, prefill={"jitter": 0.0}), 1).requests[0]
    assert warm.layer_ps[0] < request.layer_ps[0] < cold.layer_ps[0]
    assert warm.slices == cold.slices


def test_a_stated_layer_time_replaces_the_estimate() -> None:
    workload = build_workload(scenario(MODEL, prefill={"layer_time": "5ms", "jitter": 0.0}), 1)
    assert workload.requests[0].layer_ps.tolist() == [5 * 10**9] * 80


def test_bucketed_stamps_are_spread_and_reported(trace: dict[str, object]) -> None:
    workload = build_workload(scenario(trace), 1)
    arrivals = [request.arrival_ps for request in workload.requests]
    assert workload.notes == ("time stamps come in buckets of 3000 ms; spread uniformly inside them by seed",)
    assert arrivals == sorted(set(arrivals))
    assert arrivals[0] == 0
    assert [request.output_tokens for request in workload.requests] == list(range(60))


def test_bucketed_stamps_stay_when_asked_to_and_are_reported_as_well(trace: dict[str, object]) -> None:
    workload = build_workload(scenario({**trace, "spread": "never"}), 1)
    assert [request.arrival_ps for request in workload.requests[:5]] == [0, 0, 0, 0, 3 * 10**12]
    assert "replayed as they are" in workload.notes[0]


def test_start_and_limit_take_a_part_that_begins_at_time_zero(trace: dict[str, object]) -> None:
    whole = build_workload(scenario(trace), 1).requests
    part = build_workload(scenario({**trace, "start": 10, "limit": 5}), 1).requests
    assert [request.output_tokens for request in part] == [10, 11, 12, 13, 14]
    assert [request.arrival_ps for request in part] == [
        request.arrival_ps - whole[10].arrival_ps for request in whole[10:15]
    ]
    assert [request.index for request in part] == [0, 1, 2, 3, 4]


def test_an_infinite_prefix_cache_saves_compute_but_not_slices(trace: dict[str, object]) -> None:
    cold = build_workload(scenario(trace, prefill={"jitter": 0.0}), 1)
    warm = build_workload(scenario({**trace, "prefix_cache": "infinite"}, prefill={"jitter": 0.0}), 1)
    assert warm.total_slices == cold.total_slices
    assert warm.requests[0].layer_ps[0] == cold.requests[0].layer_ps[0]
    assert warm.requests[1].layer_ps[0] < cold.requests[1].layer_ps[0] / 2
    assert warm.notes[1] == "an infinite prefix cache has 67.1% of the input tokens: they are sent, not computed"


def test_the_whole_conversation_trace_has_its_published_slice_count() -> None:
    path = ROOT.parent / "shared" / "data" / "traces" / "conversation_trace.jsonl"
    if not path.exists():
        pytest.skip("the published conversation trace is not at hand")
    asked = load_scenario(ROOT / "configs" / "conversation_trace.yaml", [f"workload.path={path}"])
    workload = build_workload(asked, 1)
    assert workload.total_slices == pytest.approx(92.7e9, rel=0.001)
    busy_ps = sum(int(request.layer_ps.sum()) for request in workload.requests)
    assert busy_ps / asked.prefill.instances / workload.requests[-1].arrival_ps < 0.9


# Refusals


def test_a_layer_that_no_pool_could_hold_is_refused() -> None:
    with pytest.raises(UsageError, match=r"engine\.pool_slices: expected at least 11, .* request 0, came 10"):
        build_workload(scenario(SHAPE, engine={"pool_slices": 10}), 1)


def test_a_prompt_that_the_decode_side_could_never_take_is_refused() -> None:
    with pytest.raises(UsageError, match=r"decode\.pages: expected at least 1000, the pages of request 0, came 9"):
        build_workload(scenario(MODEL, decode={"pages": 9}), 1)


def test_a_start_beyond_the_trace_is_refused(trace: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"workload\.start: expected less than 60, .* came 60"):
        build_workload(scenario({**trace, "start": 60}), 1)


def test_arrivals_beyond_int64_are_refused() -> None:
    with pytest.raises(UsageError, match=r"workload\.arrival\.every: expected requests x every up to .*, came"):
        build_workload(scenario({**SHAPE, "requests": 1_000_000, "arrival": {"every": "1s"}}), 1)


def test_a_missing_trace_is_refused() -> None:
    with pytest.raises(TraceError, match="expected a readable file"):
        build_workload(scenario({"kind": "trace", "path": "no/such/trace.jsonl"}), 1)
