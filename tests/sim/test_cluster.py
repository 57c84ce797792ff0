"""Requests through the cluster: nothing is lost or doubled, and queues obey the laws of queues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mooncache.errors import UsageError
from mooncache.kernels.enums import Kind, Policy
from sim.clock import Environment
from sim.cluster import Cluster
from sim.config import PAIRS, Scenario
from sim.costs import Prices
from sim.rank import Rank
from sim.runs import Job, simulate
from sim.workload import build_workload

NS, US, MS = 1000, 10**6, 10**9
FIXED = {
    Kind.BATCHES_SUBMITTED: 4000.0, Kind.DOORBELLS: 50.0, Kind.POLLS: 20.0, Kind.BATCHES_FINISHED: 100.0,
    Kind.BATCHES_CLOSED: 1500.0,
}  # fmt: skip
EACH = {
    Kind.SLICES_FILLED: 20.0, Kind.WORK_REQUESTS: 8.0, Kind.COMPLETIONS: 5.0, Kind.SLICES_FREED: 4.0,
    Kind.CHUNKS_FREED: 6.0, Kind.HEAP_ALLOCATED: 60.0, Kind.HEAP_FREED: 90.0, Kind.HEAP_REUSED: 3.0,
    Kind.HEAP_CACHED: 3.0,
}  # fmt: skip
PRICES = Prices(FIXED, EACH)  # ns
WAKE_PS = 30 * US
FIRST_TOKEN_PS = 20 * MS


def scenario(workload: dict[str, Any] | None = None, **sections: Any) -> Scenario:
    """Requests of one layer of one slice, 1 ms to compute, without jitter, unless said otherwise."""
    shape = {
        "kind": "shape", "layers": 1, "ranks": 1, "slices": 1, "slice_bytes": "512B", "requests": 10,
        "arrival": {"process": "poisson", "every": "2ms"},
    }  # fmt: skip
    sections["prefill"] = {"layer_time": "1ms", "jitter": 0.0, **sections.get("prefill", {})}
    return Scenario.model_validate({"name": "test", "workload": {**shape, **(workload or {})}, **sections})


def cluster_of(
    asked: Scenario, pair: str = "pool/bulk", horizon: Callable[[int, int], int] = lambda now, ready: ready
) -> Cluster:
    """`horizon`: what ranks are told about the next layer, from now and the truth."""
    store, policy = pair.split("/")

    def make_rank(env: Environment, next_ready: Callable[[], int]) -> Rank:
        return Rank(env, asked, store, policy, PRICES, WAKE_PS, lambda: horizon(env.now, next_ready()))

    return Cluster(asked, build_workload(asked, asked.seed), make_rank)


def ranks_of(cluster: Cluster) -> list[Rank]:
    return [rank for ranks in cluster.ranks for rank in ranks if isinstance(rank, Rank)]


def arrivals_of(cluster: Cluster) -> list[int]:
    return [request.arrival_ps for request in cluster.workload.requests]


# ------------------------------------------------------------------------------ conservation
BUSY = scenario(
    {"layers": 3, "ranks": 2, "slices": 700, "requests": 6, "arrival": {"process": "poisson", "every": "300us"}},
    prefill={"layer_time": "60us", "jitter": 0.3, "instances": 2},
    reclaim={"cache_slices": 256, "lot": 300, "period": "5us"},
)


@pytest.mark.parametrize("pool_slices", [1 << 16, 3 * 256 + 4 * 256], ids=["ample", "tight"])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_slice_arrives_once_and_every_batch_is_closed(pair: str, pool_slices: int) -> None:
    asked = BUSY.model_copy(update={"engine": BUSY.engine.model_copy(update={"pool_slices": pool_slices})})
    cluster = cluster_of(asked, pair)
    outcome = cluster.run()
    assert not cluster.missing.any()
    assert (outcome.stall > 0).all()
    assert (outcome.response > FIRST_TOKEN_PS + 3 * 10 * US).all()
    total = np.zeros(len(Kind), np.int64)
    for rank in ranks_of(cluster):
        counts, state = rank.engine.counts, rank.engine.state
        total += counts
        assert (
            counts[Kind.BATCHES_SUBMITTED]
            == counts[Kind.BATCHES_FINISHED]
            == counts[Kind.BATCHES_CLOSED]
            == rank.closes
        )
        assert not rank.running
        assert not rank.starved
        leaked = int(state.shared["leaked_count"]) * 256
        in_caches = 0
        if pair == "pool/thread_cache":  # on the heap the cache holds objects, not slots
            in_caches = sum(int(block.row["cache_count"]) for block in rank.engine.callers)
        assert state.free_slices + leaked + in_caches == pool_slices
    assert sum(rank.closes for rank in ranks_of(cluster)) == 6 * 3 * 2
    assert total[Kind.SLICES_FILLED] == total[Kind.COMPLETED] == cluster.workload.total_slices == 6 * 3 * 2 * 700
    assert total[[Kind.SLICES_FREED, Kind.SLICES_DROPPED, Kind.SLICES_LEAKED]].sum() == total[Kind.SLICES_FILLED]
    assert total[Kind.STALE] == total[Kind.FAILED] == total[Kind.RETRIED] == 0
    if pair.startswith("heap"):
        freed = total[[Kind.HEAP_FREED, Kind.HEAP_CACHED, Kind.SLICES_LEAKED]].sum()
        assert total[Kind.HEAP_ALLOCATED] + total[Kind.HEAP_REUSED] == total[Kind.SLICES_FILLED] == freed


def test_slots_that_idle_threads_keep_for_ever_are_an_error_that_names_the_key() -> None:
    asked = BUSY.model_copy(update={"engine": BUSY.engine.model_copy(update={"pool_slices": 3 * 256})})
    with pytest.raises(UsageError, match=r"engine.pool_slices: expected more than 768"):
        cluster_of(asked, "pool/thread_cache").run()


def test_figures_include_what_happens_after_the_last_first_token() -> None:
    """The last batches are closed, and the reaper frees, when all requests have been answered."""
    cluster = cluster_of(BUSY, "pool/leak")
    cluster.run()
    assert sum(rank.figures().leaked_slices for rank in ranks_of(cluster)) == cluster.workload.total_slices


# ------------------------------------------------------------------------------ response times
def lag_ps() -> int:
    """From a layer of one slice computed to its end, on an idle rank: submit, post, wire, poll, complete."""
    submit = FIXED[Kind.BATCHES_SUBMITTED] + EACH[Kind.SLICES_FILLED]
    post = EACH[Kind.WORK_REQUESTS] + FIXED[Kind.DOORBELLS]
    wire = 5 + 10.24 + 2000  # a message at 200 M/s, 512 B at 400 Gb/s, latency
    poll = FIXED[Kind.POLLS] + EACH[Kind.COMPLETIONS] + FIXED[Kind.BATCHES_FINISHED]
    return round((submit + post + wire + poll) * NS)


@pytest.mark.parametrize("pair", ["pool/bulk", "pool/leak", "pool/deferred", "pool/epoch", "pool/on_close"])
def test_an_idle_system_answers_after_compute_lag_and_first_token(pair: str) -> None:
    cluster = cluster_of(scenario({"layers": 4, "ranks": 3, "arrival": {"process": "fixed", "every": "1s"}}), pair)
    outcome = cluster.run()
    np.testing.assert_array_equal(outcome.stall, lag_ps())
    np.testing.assert_array_equal(outcome.response, 4 * MS + lag_ps() + FIRST_TOKEN_PS)


def waits_of(cluster: Cluster) -> np.ndarray:
    """ps that each request of one layer of one slice waited for its instance; the system must be idle enough."""
    return cluster.run().response - MS - lag_ps() - FIRST_TOKEN_PS


def test_waits_follow_lindleys_recursion() -> None:
    cluster = cluster_of(scenario({"requests": 500}))
    waits = waits_of(cluster)
    free = 0
    for arrival, wait in zip(arrivals_of(cluster), waits.tolist(), strict=True):
        assert wait == max(0, free - arrival)
        free = max(free, arrival) + MS


def test_two_instances_serve_one_queue() -> None:
    cluster = cluster_of(scenario({"requests": 500, "arrival": {"every": "600us"}}, prefill={"instances": 2}))
    waits = waits_of(cluster)
    free = [0, 0]
    for arrival, wait in zip(arrivals_of(cluster), waits.tolist(), strict=True):
        free.sort()
        assert wait == max(0, free[0] - arrival)
        free[0] = max(free[0], arrival) + MS


def test_mean_wait_is_that_of_an_md1_queue() -> None:
    """Pollaczek and Khinchine: load / (2 (1 - load)) service times. Bound: 4 standard errors of 20 batch means."""
    load, requests = 0.5, 6000
    cluster = cluster_of(scenario({"requests": requests}))
    waits = waits_of(cluster)
    means = waits.reshape(20, -1).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(means))
    assert error < 0.05 * MS
    assert abs(waits.mean() - load / (2 * (1 - load)) * MS) < 4 * error


# ------------------------------------------------------------------------------ decode pages
def test_decode_pages_bound_admissions_first_come_first_served() -> None:
    """A small request behind one that waits for pages waits too. Against a model of five lines."""
    tokens, token_time, pages = 40, 2 * MS, 1000
    asked = scenario(
        {"requests": 60, "slices": 600, "output_tokens": tokens, "arrival": {"every": "20ms"}},
        decode={"pages": pages, "first_token": "20ms", "token_time": "2ms"},
    )
    sizes = np.random.Generator(np.random.Philox(key=[7, 7])).integers(1, 400, 60).tolist()
    workload = build_workload(asked, asked.seed)
    workload.requests[:] = [replace(r, pages=n) for r, n in zip(workload.requests, sizes, strict=True)]
    cluster = Cluster(asked, workload, lambda env, ready: Rank(env, asked, "pool", "bulk", PRICES, WAKE_PS, ready))
    assert cluster.decode.pages is not None
    outcome = cluster.run()
    assert cluster.decode.pages.level == pages
    held: list[tuple[int, int]] = []  # (when they come back, how many)
    free = waited = 0
    for request, size, response, stall in zip(
        workload.requests, sizes, outcome.response.tolist(), outcome.stall[:, 0].tolist(), strict=True
    ):
        at = started = max(request.arrival_ps, free)
        while sum(n for back, n in held if back > at) + size > pages:
            at = min(back for back, _ in held if back > at)
        waited += at > started
        free = at + MS
        assert response == free + stall + FIRST_TOKEN_PS - request.arrival_ps
        held.append((free + stall + FIRST_TOKEN_PS + tokens * token_time, size))
    assert waited > 10


def test_a_layer_that_pages_held_up_is_not_overlooked_by_a_worker_that_ran_ahead() -> None:
    """While a request waits for pages its first layer may come at any time: no rank may simulate beyond that.

    Request 3 gets its pages from 0 when 1 is still on the wire of the same instance; it must not wait for 1 to arrive.
    """
    asked = scenario(
        {"requests": 4, "output_tokens": 0, "arrival": {"process": "fixed", "every": "0s"}},
        prefill={"instances": 2},
        nic={"latency": "5ms"},
        decode={"pages": 100, "first_token": "1us"},
    )
    workload = build_workload(asked, asked.seed)
    needs = ((50, US), (40, 500 * US), (5, 10 * MS), (50, 10 * US))
    workload.requests[:] = [
        replace(request, pages=pages, layer_ps=np.array([compute]))
        for request, (pages, compute) in zip(workload.requests, needs, strict=True)
    ]
    cluster = Cluster(asked, workload, lambda env, ready: Rank(env, asked, "pool", "bulk", PRICES, WAKE_PS, ready))
    outcome = cluster.run()
    lag = lag_ps() + 4998 * US
    assert outcome.stall[:, 0].tolist() == [lag, lag, lag, lag]
    first = US + lag + US
    assert outcome.response.tolist() == [
        first, 500 * US + lag + US, US + 10 * MS + lag + US, first + 10 * US + lag + US
    ]  # fmt: skip


# ------------------------------------------------------------------------------ common random numbers
def test_policies_move_neither_arrivals_nor_layers() -> None:
    """When the last layer was computed does not depend on who frees slices: response minus its stall is the same."""
    asked = scenario(
        {"layers": 5, "ranks": 2, "slices": 900, "requests": 8, "arrival": {"every": "400us"}},
        prefill={"layer_time": "70us", "jitter": 0.2},
    )
    runs = {pair: simulate(Job(asked, pair, replication=3)) for pair in PAIRS}
    computed = {pair: (run.response - run.stall[:, -1]).tolist() for pair, run in runs.items()}
    assert len({tuple(times) for times in computed.values()}) == 1
    assert len({tuple(run.response.tolist()) for run in runs.values()}) > 7  # and yet the policies differ
    other = simulate(Job(asked, "pool/bulk", replication=4))
    assert other.response.tolist() != runs["pool/bulk"].response.tolist()


@pytest.mark.parametrize("policy", list(Policy))
def test_a_run_does_not_depend_on_how_far_workers_run_ahead(policy: Policy) -> None:
    for store in ("pool", "heap"):
        pair = f"{store}/{policy.name.lower()}"
        ahead, stepwise = cluster_of(BUSY, pair), cluster_of(BUSY, pair, horizon=lambda now, ready: now)
        np.testing.assert_array_equal(ahead.run().response, stepwise.run().response)
        for a, b in zip(ranks_of(ahead), ranks_of(stepwise), strict=True):
            np.testing.assert_array_equal(a.engine.counts, b.engine.counts)
            assert a.figures() == b.figures()
