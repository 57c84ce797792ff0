"""Ranks without slices: whole batches, at the costs of a few that were simulated exactly.

For long traces. Two batches of n slices, back to back on an exact rank, give four times: what a submit costs its
thread, from publication to the last slice (`latency`), how much later the second ends than the first (`occupancy`),
and what a close costs. Between measured n they are interpolated linearly, which they nearly are. Then

    done = max(published + latency(n), done of the batch before + occupancy(n))

The difference from the exact mode is measured on a sample of every run that uses it, and printed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import simpy

from mooncache.kernels.reclaim.policies import traits_of
from sim.clock import Environment
from sim.config import Scenario
from sim.costs import Prices
from sim.rank import FOREVER, Figures, Layer, Rank, Steps

GRID = 1.15  # ratio of neighbouring numbers of slices that are simulated exactly


class BatchCost(NamedTuple):
    """The times of one batch, ps, and the worker's time spent on it."""

    submit: int
    latency: int
    occupancy: int
    close: int
    busy: int
    freeing: int
    all_freeing: int  # of all threads


def measure(scenario: Scenario, store: str, policy: str, prices: Prices, slices: int, slice_bytes: int) -> BatchCost:
    """Simulate two batches back to back, exactly."""
    env = Environment()
    two = scenario.model_copy(
        update={
            "engine": scenario.engine.model_copy(update={"submit_threads": 2, "pool_slices": 2 * slices + 512}),
        }
    )
    rank = Rank(env, two, store, policy, prices, 0, lambda: FOREVER)
    done: list[Layer] = []
    for index in range(2):
        rank.tasks.put(Layer(0, index, slices, slice_bytes, 0, done.append))
    env.run()
    first, second = done
    figures = rank.figures()
    return BatchCost(
        submit=first.published_ps,
        latency=first.done_ps - first.published_ps,
        occupancy=second.done_ps - first.done_ps,
        close=(first.close_ps + second.close_ps) // 2,
        busy=figures.busy_ps // 2,
        freeing=figures.freeing_ps // 2,
        all_freeing=figures.all_freeing_ps // 2,
    )


class BatchCosts:
    """`BatchCost` for any number of slices, from a grid of exact ones that grows as it is asked for."""

    def __init__(self, scenario: Scenario, store: str, policy: str, prices: Prices) -> None:
        self._what = scenario, store, policy, prices
        self._exact = lru_cache(maxsize=None)(self._measure)
        self._between = lru_cache(maxsize=None)(self._interpolate)
        self.simulated = 0  # slices, one by one

    def __call__(self, slices: int, slice_bytes: int) -> BatchCost:
        """Cost of one batch of `slices` slices of `slice_bytes` each."""
        return self._between(slices, slice_bytes)

    def _measure(self, slices: int, slice_bytes: int) -> BatchCost:
        self.simulated += 2 * slices
        return measure(*self._what, slices, slice_bytes)

    def _interpolate(self, slices: int, slice_bytes: int) -> BatchCost:
        step = int(np.floor(np.log(slices) / np.log(GRID)))
        low, high = _grid(step), _grid(step + 1)
        if low == high or slices <= low:
            return self._exact(low, slice_bytes)
        a, b = self._exact(low, slice_bytes), self._exact(high, slice_bytes)
        share = (slices - low) / (high - low)
        return BatchCost(*(round(x + (y - x) * share) for x, y in zip(a, b, strict=True)))


def _grid(step: int) -> int:
    return int(np.ceil(GRID**step))


class FastRank:
    """A `Rank` by batch: threads as SimPy processes, the worker as one equation."""

    def __init__(self, env: Environment, scenario: Scenario, policy: str, costs: BatchCosts, wake_ps: int) -> None:
        self.env, self.costs, self.wake_ps, self.leaks = env, costs, wake_ps, not traits_of(policy).frees
        self.tasks = simpy.Store(env)
        self.free_at = 0  # when the worker is done with the last batch published
        self.busy_ps = self.freeing_ps = self.all_freeing_ps = 0
        self.submit_ps = self.transfer_ps = self.close_ps = self.closes = 0
        self.in_use = self.high_water = self.closed_slices = 0
        for _ in range(scenario.engine.submit_threads):
            env.process(self._thread())

    def figures(self) -> Figures:
        """Return the figures of this rank so far."""
        leaked = self.closed_slices if self.leaks else 0
        return Figures(
            busy_ps=self.busy_ps,
            freeing_ps=self.freeing_ps,
            all_freeing_ps=self.all_freeing_ps,
            submit_ps=self.submit_ps,
            transfer_ps=self.transfer_ps,
            close_ps=self.close_ps,
            closes=self.closes,
            high_water_slices=self.high_water,
            leaked_slices=leaked,
        )

    def _thread(self) -> Steps:
        env = self.env
        while True:
            task: Layer = yield self.tasks.get()
            cost = self.costs(task.slices, task.slice_bytes)
            self.in_use += task.slices
            self.high_water = max(self.high_water, self.in_use)
            yield env.timeout(cost.submit)
            self.free_at = max(env.now + cost.latency, self.free_at + cost.occupancy)
            self.transfer_ps += self.free_at - env.now
            yield env.timeout(self.free_at - env.now)
            task.done_ps = env.now
            task.done(task)
            yield env.timeout(self.wake_ps + cost.close)
            task.close_ps = cost.close
            self._count(task, cost)

    def _count(self, task: Layer, cost: BatchCost) -> None:
        self.busy_ps += cost.busy
        self.freeing_ps += cost.freeing
        self.all_freeing_ps += cost.all_freeing
        self.submit_ps += cost.submit
        self.close_ps += cost.close
        self.closes += 1
        self.closed_slices += task.slices
        if not self.leaks:
            self.in_use -= task.slices
