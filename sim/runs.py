"""Simulations: one pair of slice store and reclaim policy under one replication, and how many of them it takes.

What is known already is not simulated: ranks of an instance are alike, so one of them stands for all; layers that start
from rest are one trajectory moved in time (`moved.py`); and replications end when the interval is as narrow as asked.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mooncache.errors import CapacityError
from sim.clock import Environment
from sim.cluster import Cluster, Outcome, RankModel
from sim.config import PAIRS, Scenario
from sim.costs import PS_PER_NS, load_calibration, prices
from sim.fast import BatchCosts, FastRank
from sim.moved import Disturbed, MovedRank, Trajectories
from sim.rank import Figures, Rank
from sim.statistics import mean_interval, samples_needed
from sim.workload import Workload, build_workload

PS_PER_MS = 10**9
BASE = "pool/leak"  # never frees, and pays for nothing fresh: what a pair adds is counted from there
REFERENCE = "pool/bulk"  # what response times are compared with
AGREE = 0.001  # of the response time: two replications whose interval is narrower than this are enough
FEW, MOST = 5, 40  # replications of a pair that varies; with five Student's t is 2.8, with forty 2.0


class Job(NamedTuple):
    """One simulation: a pair under one replication."""

    scenario: Scenario
    pair: str
    replication: int


@dataclass(frozen=True)
class Run:
    """The findings of one simulation. Times are ps."""

    job: Job
    response: np.ndarray  # int64[requests]
    stall: np.ndarray  # int64[requests, layers]
    figures: Figures  # sums over ranks; high water: the highest rank's
    slices: int
    simulated: int  # slices that went through the kernels one by one

    @property
    def response_ms(self) -> float:
        """The mean response time, ms."""
        return float(self.response.mean()) / PS_PER_MS


class _Simulation:
    """One job, with the parts that its ranks are made of."""

    def __init__(self, job: Job) -> None:
        self.scenario = job.scenario
        self.store, self.policy = job.pair.split("/")
        self.calibration = load_calibration(self.scenario.calibration)
        self.workload: Workload = build_workload(self.scenario, self.scenario.seed + job.replication)
        mean = round(np.mean([request.slices for request in self.workload.requests]))
        self.price = prices(self.calibration, self.scenario, self.policy, mean)
        self.wake_ps = round(self.calibration.ns("wake", mean) * PS_PER_NS)
        self.simulated = 0

    def exact(self, ranks: int | None) -> tuple[Cluster, Outcome]:
        """Simulate slice by slice."""
        what = self.scenario, self.store, self.policy, self.price, self.wake_ps
        done = self._run(lambda env, next_ready: Rank(env, *what, next_ready), ranks)
        self.simulated += sum(rank.filled for rank in done[0].each if isinstance(rank, Rank))
        return done

    def fast(self) -> tuple[Cluster, Outcome]:
        """Simulate batch by batch, see `fast.py`."""
        costs = BatchCosts(self.scenario, self.store, self.policy, self.price)
        done = self._run(lambda env, _: FastRank(env, self.scenario, self.policy, costs, self.wake_ps), 1)
        self.simulated += costs.simulated
        return done

    def moved(self) -> tuple[Cluster, Outcome]:
        """Simulate layer by layer, see `moved.py`. Raises Disturbed."""
        known = Trajectories(self.scenario, self.store, self.policy, self.price, self.wake_ps)
        try:
            return self._run(lambda env, _: MovedRank(env, self.scenario, self.policy, known, self.wake_ps), 1)
        finally:
            self.simulated += known.simulated

    def quickest(self) -> tuple[Cluster, Outcome]:
        """Simulate in the quickest way that applies."""
        if self.scenario.mode == "fast":
            return self.fast()
        try:
            return self.moved()
        except Disturbed:
            return self.exact(1)

    def _run(
        self, make_rank: Callable[[Environment, Callable[[], int]], RankModel], ranks: int | None
    ) -> tuple[Cluster, Outcome]:
        cluster = Cluster(self.scenario, self.workload, make_rank, ranks)
        return cluster, cluster.run()


def simulate(job: Job, *, in_full: bool = False) -> Run:
    """Run one job. Deterministic: the same job gives the same run in any process.

    Args:
        in_full: every slice of every rank, whatever is known already; only `simulated` is another then.
    """
    one = _Simulation(job)
    cluster, outcome = one.exact(None) if in_full else one.quickest()
    each = [rank.figures() for rank in cluster.each]
    alike = one.workload.ranks * len(cluster.ranks) // len(each)
    total = Figures(*(sum(column) * alike for column in zip(*each, strict=True)))
    figures = total._replace(high_water_slices=max(f.high_water_slices for f in each))
    return Run(job, outcome.response, outcome.stall, figures, one.workload.total_slices, one.simulated)


# ------------------------------------------------------------------------------ how many
class Plan:
    """The simulations that a comparison takes.

    `leak` on the pool, and on each store, is among them, asked for or not, and has as many replications as any pair,
    since the others are compared with it. Where the scenario leaves the number open, each pair gets as many as it takes
    until the interval of what it adds is within `precision` of its response time: two if they agree, else 5 to 40, at
    most twice as many each time. That depends on what was found alone, not on how many processes found it.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.runs: dict[str, list[Run]] = {pair: [] for pair in self._needed()}
        self.known = 0  # jobs given out so far

    def _needed(self) -> list[str]:
        needed = {*self.scenario.pairs, BASE, *(leak_of(pair) for pair in self.scenario.pairs)}
        return [pair for pair in PAIRS if pair in needed]

    def add(self, run: Run) -> None:
        """Add the findings of a simulation; those of one pair in order."""
        self.runs[run.job.pair].append(run)

    def jobs(self) -> list[Job]:
        """Return the simulations to run next, when all before have been added; none when they are enough."""
        counts = {pair: self._count(pair) for pair in self.runs}
        most = max(counts.values())
        for pair in self.runs:
            if pair.endswith("/leak") or pair == REFERENCE:
                counts[pair] = most
        found = [
            Job(self.scenario, pair, replication)
            for replication in range(most)
            for pair, runs in self.runs.items()
            if len(runs) <= replication < counts[pair]
        ]
        self.known += len(found)
        return found

    def _count(self, pair: str) -> int:
        """Return the replications that a pair needs, as far as can be told by now."""
        runs, asked = self.runs[pair], self.scenario.replications
        if asked is not None:
            return asked
        if len(runs) < 2:
            return 2
        response = float(np.mean([run.response_ms for run in runs]))
        added = added_ms(runs, self.runs[BASE])
        half_width = mean_interval(added).half_width or 0.0
        if half_width <= AGREE * response or len(runs) >= MOST:
            return len(runs)
        needed = samples_needed(added, self.scenario.precision * response)
        return max(len(runs), min(max(FEW, needed), 2 * max(len(runs), FEW), MOST))


def leak_of(pair: str) -> str:
    """Return the pair of `leak` on the same store."""
    return f"{pair.split('/')[0]}/leak"


def added_ms(runs: Sequence[Run], base: Sequence[Run]) -> list[float]:
    """Return what each replication adds to the response time of the same requests in `base`, which has as many."""
    return [
        float((run.response - other.response).mean()) / PS_PER_MS
        for run, other in zip(runs, base[: len(runs)], strict=True)
    ]


@contextmanager
def side_by_side(processes: int | None = None) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a `map` that works in so many processes, by default one a core. An interrupt ends them at once."""
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the parent's kernels mid-flight
    interrupts = signal.SIGINT, signal.SIG_DFL
    with ProcessPoolExecutor(processes, mp_context=context, initializer=signal.signal, initargs=interrupts) as pool:
        yield lambda function, items: _results([pool.submit(function, item) for item in items])


def _results(futures: list[Future[Any]]) -> Iterator[Any]:
    """Yield the results of what was submitted to a pool, in order."""
    try:
        for future in futures:
            yield future.result()
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    except BrokenProcessPool:
        raise CapacityError(
            "a process that simulates was killed, perhaps because memory ran out: try --processes 1, or fewer "
            "engine.pool_slices"
        ) from None
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def run_all(plan: Plan, mapped: Callable[..., Iterator[Any]] = map) -> Iterator[Run]:
    """Simulate a plan, and yield the runs in order. `mapped`: such as `side_by_side` gives."""
    while jobs := plan.jobs():
        for run in mapped(simulate, jobs):
            plan.add(run)
            yield run
