"""What is known already is not simulated, and the answer is that of simulating all of it, byte for byte."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mooncache.errors import UsageError
from sim import runs
from sim.compare import conclude
from sim.config import PAIRS, Scenario
from sim.moved import Disturbed
from sim.runs import Job, Plan, Run, run_all, simulate

CASES = 40


def scenario(workload: dict[str, Any] | None = None, **sections: Any) -> Scenario:
    """Layers far enough apart for a rank to come to rest in between, under most policies."""
    shape = {
        "kind": "shape", "layers": 6, "ranks": 3, "slices": 900, "slice_bytes": "512B", "requests": 4,
        "arrival": {"process": "poisson", "every": "3ms"},
    }  # fmt: skip
    sections = {"prefill": {"layer_time": "400us"}, "replications": 2, **sections}
    return Scenario.model_validate({"name": "moved", "workload": {**shape, **(workload or {})}, **sections})


def random_scenario(number: int) -> Scenario:
    """Layers that come closer or further apart, caches and pools that hold less or more than a layer."""
    draw = np.random.Generator(np.random.Philox(key=[11, number]))

    def one_of(*values: Any) -> Any:
        return values[int(draw.integers(len(values)))]

    return scenario(
        {"slices": one_of(1, 300, 700, 1500), "layers": one_of(1, 5), "ranks": one_of(1, 2, 4),
         "requests": one_of(1, 3), "arrival": {"every": one_of("0s", "50us", "2ms")}},
        prefill={"layer_time": one_of("4us", "40us", "400us"), "jitter": one_of(0.0, 0.3), "instances": one_of(1, 2)},
        engine={"submit_threads": one_of(1, 2, 4), "queue_depth": one_of(16, 512), "pool_slices": one_of(9000, 1 << 20),
                "arenas": one_of("own", "shared")},
        nic={"rate": one_of("400Gbps", "5Gbps"), "rails": one_of(1, 2), "signal": one_of(1, 16),
             "gathers": one_of(1, 4), "latency": one_of("0s", "9us")},
        reclaim={"cache_slices": one_of(1, 256, 1000, 4096), "lot": one_of(100, 16384), "period": one_of("5us", "1ms")},
        decode={"pages": one_of(None, 1000), "token_time": "10us", "first_token": "50us"},
    )  # fmt: skip


def same(quick: Run, full: Run) -> None:
    np.testing.assert_array_equal(quick.response, full.response)
    np.testing.assert_array_equal(quick.stall, full.stall)
    assert quick.figures == full.figures
    assert quick.slices == full.slices == full.simulated


@pytest.mark.parametrize("pair", PAIRS)
def test_layers_that_start_from_rest_are_moved_in_time_exactly(pair: str) -> None:
    asked = scenario({"layers": 30}, prefill={"layer_time": "5ms"})
    quick = simulate(Job(asked, pair, 0))
    same(quick, simulate(Job(asked, pair, 0), in_full=True))
    assert quick.simulated <= 3 * 900  # of 4 x 30 layers on 3 ranks; a thread's cache is empty, or full


def test_a_leaking_engine_that_runs_out_starts_anew_in_both() -> None:
    asked = scenario(engine={"pool_slices": 5000})
    for pair in ("heap/leak", "pool/leak"):
        quick = simulate(Job(asked, pair, 0))
        assert quick.simulated == 900
        same(quick, simulate(Job(asked, pair, 0), in_full=True))


@pytest.mark.parametrize("pair", PAIRS)
def test_layers_that_disturb_each_other_are_simulated_exactly(pair: str) -> None:
    asked = scenario(prefill={"layer_time": "2us"}, reclaim={"lot": 300, "period": "5us"})
    with pytest.raises(Disturbed):
        runs._Simulation(Job(asked, pair, 0)).moved()
    same(simulate(Job(asked, pair, 0)), simulate(Job(asked, pair, 0), in_full=True))


@pytest.mark.parametrize("number", range(CASES))
def test_random_scenarios_have_the_answer_of_the_full_run(number: int) -> None:
    asked = random_scenario(number)
    for pair in PAIRS[number % 2 :: 2]:
        try:
            full = simulate(Job(asked, pair, 0), in_full=True)
        except UsageError:  # threads that wait for ever for slots of other threads' caches
            with pytest.raises(UsageError, match=r"engine.pool_slices.* slots that other threads keep"):
                simulate(Job(asked, pair, 0))
            continue
        same(simulate(Job(asked, pair, 0)), full)


def test_random_scenarios_are_moved_and_disturbed() -> None:
    """The test above would prove little if they all were of one kind."""
    moved = dict.fromkeys(PAIRS, 0)
    for number in range(CASES):
        for pair in PAIRS[number % 2 :: 2]:
            try:
                runs._Simulation(Job(random_scenario(number), pair, 0)).moved()
                moved[pair] += 1
            except Disturbed:
                pass
    assert all(0 < n < CASES / 2 for n in moved.values()), moved


# ------------------------------------------------------------------------------ replications
def test_the_result_is_that_of_all_ranks_and_slices_byte_for_byte() -> None:
    """The same replications of a comparison whose number was left open, each in full."""
    asked = scenario({"slices": 1500}, prefill={"layer_time": "260us"}, replications=None)
    quick = list(run_all(Plan(asked)))
    full = [simulate(run.job, in_full=True) for run in quick]
    one, other = conclude(asked, quick), conclude(asked, full)
    assert json.dumps(one.result) == json.dumps(other.result)
    assert one.simulated < one.slices / 5
    assert other.simulated == other.slices


def counts(asked: Scenario) -> dict[str, int]:
    plan = Plan(asked)
    for _ in run_all(plan):
        pass
    return {pair: len(found) for pair, found in plan.runs.items()}


VARYING = {"arrival": {"process": "poisson", "every": "500us"}, "slices": 1500, "ranks": 1}


def test_pairs_that_do_not_vary_have_two_replications_and_others_as_many_as_the_precision_asks() -> None:
    asked = scenario(VARYING, prefill={"layer_time": "80us"}, decode={"first_token": "0s"}, replications=None)
    found = counts(asked)
    assert found["pool/on_close"] == 2
    most = max(found.values())
    assert 5 <= found["heap/inline"] <= most <= runs.MOST
    assert found["pool/bulk"] == found["heap/leak"] == most  # the others are compared with them
    finer = counts(asked.model_copy(update={"precision": 0.02}))
    assert finer["heap/inline"] > found["heap/inline"]


def test_replications_that_are_stated_are_neither_more_nor_less() -> None:
    assert set(counts(scenario(VARYING, replications=3)).values()) == {3}


def test_no_pair_has_more_replications_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST", 7)
    asked = scenario(VARYING, prefill={"layer_time": "80us"}, decode={"first_token": "0s"}, replications=None,
                     precision=0.0001)  # fmt: skip
    assert max(counts(asked).values()) == 7
