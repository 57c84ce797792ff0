"""Layers that all start from the same rest are simulated once, and moved in time.

A rank is at rest when its worker has nothing outstanding, its NIC is idle and nothing is left to free. Whatever a layer
then does depends on its size and on what its thread keeps in its cache, and on nothing else: so one exact trajectory,
shifted by the time of its start, is every other such layer's, to the picosecond.

    acquire ......... publish ......... done .. wake .. close ......... end
                         |  the worker is at it: no other layer may be published before it rests
                         |  inline, epoch, deferred: nobody may acquire or close either, until all of it is freed

That is not known beforehand, so it is tried: the first layer that comes in between raises `Disturbed`, and the run is
simulated exactly instead. A run that ends is equal in every field to the exact one (a test).
"""

from __future__ import annotations

from typing import NamedTuple

import simpy

from mooncache.kernels.reclaim.policies import traits_of
from mooncache.kernels.reclaim.traits import FreesIn
from mooncache.limits import CHUNK_SLICES
from sim.clock import Environment
from sim.config import Scenario
from sim.costs import Prices
from sim.rank import FOREVER, Figures, Layer, Rank, Steps


class Disturbed(Exception):
    """A layer did not start from rest: the run has to be simulated exactly."""


class Size(NamedTuple):
    """The numbers that tell one layer from another."""

    slices: int
    slice_bytes: int


class Trajectory(NamedTuple):
    """The course of one layer from rest. Times are ps, counted from its publication but for the first."""

    submit: int  # the thread's time before publication
    done: int  # last slice arrived
    close: int  # what closing costs the thread
    worker_rest: int  # the worker has nothing left to do
    rest: int  # nobody has
    acquired: int  # chunks taken from the pool
    released: int  # chunks given back
    leaked: int  # chunks forgotten
    cached: int  # what its thread's cache holds afterwards
    figures: Figures


class Trajectories:
    """The courses of one store and policy, by size and by the thread's cache; each simulated when asked for.

    Attributes:
        simulated: slices that were simulated for it, one by one.
    """

    def __init__(self, scenario: Scenario, store: str, policy: str, prices: Prices, wake_ps: int) -> None:
        one_thread = scenario.engine.model_copy(update={"submit_threads": 1})
        self.simulated = 0
        self._rank = scenario.model_copy(update={"engine": one_thread}), store, policy, prices, wake_ps
        self._known: dict[tuple[Size, int], Trajectory] = {}
        self._history: dict[int, tuple[Size, ...]] = {0: ()}  # what a cache holds -> layers that lead there

    def __call__(self, size: Size, cached: int) -> Trajectory:
        """The trajectory of a layer of this size, of a thread whose cache holds `cached`."""
        if (size, cached) not in self._known:
            found = self._known[size, cached] = self._simulate(size, self._history[cached])
            self._history.setdefault(found.cached, (*self._history[cached], size))
        return self._known[size, cached]

    def _simulate(self, size: Size, history: tuple[Size, ...]) -> Trajectory:
        """Simulate one layer exactly, on a rank of its own whose one thread has had these layers before."""
        env = Environment()
        rank = Rank(env, *self._rank, lambda: FOREVER)
        state, (caller, *_) = rank.engine.state, rank.engine.callers
        for each in history:
            self._run(rank, each)
        before, free = rank.figures(), state.free_slices
        state.shared["low"] = free // CHUNK_SLICES
        layer = self._run(rank, size)
        after, low = rank.figures(), state.shared["low"]
        worker_rest = rank.engine.worker.row["now"]
        self.simulated += size.slices + sum(each.slices for each in history)
        return Trajectory(
            submit=layer.published_ps - layer.ready_ps,
            done=layer.done_ps - layer.published_ps,
            close=layer.close_ps,
            worker_rest=worker_rest - layer.published_ps,
            rest=max(worker_rest, env.now) - layer.published_ps,
            acquired=free // CHUNK_SLICES - low,
            released=state.free_slices // CHUNK_SLICES - low,
            leaked=(after.leaked_slices > before.leaked_slices) * (free // CHUNK_SLICES - low),
            cached=caller.row["cache_count"],
            figures=Figures(*(a - b for a, b in zip(after, before, strict=True))),
        )

    def _run(self, rank: Rank, size: Size) -> Layer:
        """Run one layer on the rank, until it is at rest."""
        start = max(rank.env.now, rank.engine.worker.row["now"])
        layer = Layer(0, 0, *size, start, lambda _: None)
        rank.env.process(self._ready(rank, layer))
        rank.env.run()
        return layer

    def _ready(self, rank: Rank, layer: Layer) -> Steps:
        yield rank.env.timeout(layer.ready_ps - rank.env.now)
        rank.tasks.put(layer)


class MovedRank:
    """A `Rank` as long as every layer starts from rest; the first layer that does not raises `Disturbed`."""

    def __init__(
        self, env: Environment, scenario: Scenario, policy: str, trajectories: Trajectories, wake_ps: int
    ) -> None:
        self.env, self.wake_ps, self.trajectories = env, wake_ps, trajectories
        self.late = traits_of(policy).frees_in in (FreesIn.WORKER, FreesIn.REAPER)  # at moments of their own
        self.tasks = simpy.Store(env)
        self.free = self.low = -(-scenario.engine.pool_slices // CHUNK_SLICES)  # chunks
        self.leaked = 0  # chunks that a restart would bring back
        self.chunks = self.free
        self.worker_rest = self.rest = self.last_release = -1  # before that, the worker, or anybody, is at something
        self.total = Figures(*[0] * len(Figures._fields))
        for _ in range(scenario.engine.submit_threads):
            env.process(self._thread())

    def figures(self) -> Figures:
        """Return the figures of this rank so far."""
        in_use = (self.chunks - self.low) * CHUNK_SLICES
        return self.total._replace(high_water_slices=max(self.total.leaked_slices, in_use))

    def _thread(self) -> Steps:
        env, cached = self.env, 0
        while True:
            task: Layer = yield self.tasks.get()
            does = self.trajectories(Size(task.slices, task.slice_bytes), cached)
            self._acquire(does)
            yield env.timeout(does.submit)
            self._publish(does)
            yield env.timeout(does.done)
            task.done_ps = env.now
            task.done(task)
            yield env.timeout(self.wake_ps)
            task.close_ps, cached = does.close, does.cached
            self._release(does)
            yield env.timeout(does.close)

    def _acquire(self, does: Trajectory) -> None:
        if (self.late and self.env.now <= self.rest) or self.env.now == self.last_release:
            raise Disturbed
        if does.acquired > self.free:  # the pool is empty: a leaking engine starts anew, others would wait
            self.free, self.leaked = self.free + self.leaked, 0
        if does.acquired > self.free:
            raise Disturbed
        self.free -= does.acquired
        self.low = min(self.low, self.free)

    def _publish(self, does: Trajectory) -> None:
        now = self.env.now
        if now <= (self.rest if self.late else self.worker_rest):
            raise Disturbed
        self.worker_rest, self.rest = now + does.worker_rest, now + does.rest

    def _release(self, does: Trajectory) -> None:
        self.free += does.released
        self.leaked += does.leaked
        self.last_release = self.env.now
        self.total = Figures(*(a + b for a, b in zip(self.total, does.figures, strict=True)))
