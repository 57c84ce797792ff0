"""The actors of a run in SimPy: arrivals, prefill instances, ranks and the decode side.

    arrivals --> queue --> instance: waits for decode pages, then computes layer after layer
                                 |  each layer, as soon as it is computed, to every rank
                                 v
                             rank (exact or fast) --> last layer on all ranks --> first token --> pages come back

About a thousand events a request. Time is integer picoseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simpy

from mooncache.errors import UsageError
from sim.clock import Environment
from sim.config import Scenario
from sim.rank import FOREVER, Figures, Layer, Steps
from sim.workload import Request, Workload


class RankModel(Protocol):
    """A rank as the cluster needs it, exact or fast."""

    tasks: simpy.Store

    def figures(self) -> Figures:
        """Return the figures of the rank so far."""
        ...


IDLE, WAITING = -1, -2  # instead of a time: for the next request to arrive, for decode pages
MakeRank = Callable[[Environment, Callable[[], int]], RankModel]


class Decode:
    """The decode side's page pool: a request holds its pages from its admission until its last token."""

    def __init__(self, env: Environment, scenario: Scenario) -> None:
        self.env, self.settings = env, scenario.decode
        self.pages = None
        if scenario.decode.pages is not None:
            self.pages = simpy.Container(env, capacity=scenario.decode.pages, init=scenario.decode.pages)

    def admit(self, request: Request) -> Steps:
        """Wait until the request's pages are free, and take them. First come, first served."""
        if self.pages is not None:
            yield self.pages.get(request.pages)

    def serve(self, request: Request) -> Steps:
        """Decode the request's tokens and give its pages back."""
        if self.pages is not None:
            yield self.env.timeout(self.settings.first_token + request.output_tokens * self.settings.token_time)
            yield self.pages.put(request.pages)


@dataclass
class Outcome:
    """The times of a run, by request; int64 picoseconds."""

    response: np.ndarray  # [requests]  arrival to first token
    stall: np.ndarray  # [requests, layers]  layer computed to its last slice arrived, slowest rank


class Cluster:
    """All actors of one run.

    Args:
        ranks: how many ranks of an instance are simulated, all by default. They get the same layers at the same
            instants and share nothing, so one is enough to know what each does.
    """

    def __init__(self, scenario: Scenario, workload: Workload, make_rank: MakeRank, ranks: int | None = None) -> None:
        self.env = Environment()
        self.scenario, self.workload = scenario, workload
        self.queue = simpy.Store(self.env)
        self.decode = Decode(self.env, scenario)
        self.next_arrival = 0
        self.next_ready = [0] * scenario.prefill.instances  # no layer becomes ready before that
        self.first_layer = [0] * scenario.prefill.instances  # compute time of the first layer of a waiting request
        self.ranks = [
            [make_rank(self.env, lambda i=i: self._ready_at(i)) for _ in range(ranks or workload.ranks)]  # type: ignore[misc]
            for i in range(scenario.prefill.instances)
        ]
        requests = len(workload.requests)
        self.outcome = Outcome(np.zeros(requests, np.int64), np.zeros((requests, workload.layers), np.int64))
        self.missing = np.full(requests, workload.layers * (ranks or workload.ranks))  # layers yet to arrive
        self.left = requests

    @property
    def each(self) -> list[RankModel]:
        """The ranks that are simulated, of all instances."""
        return [rank for ranks in self.ranks for rank in ranks]

    def run(self) -> Outcome:
        """Simulate until nothing is left to do: all is sent, closed, freed and decoded.

        Raises: UsageError if the threads of a rank wait for slots that nobody will give back.
        """
        self.env.process(self._arrivals())
        for index in range(len(self.ranks)):
            self.env.process(self._instance(index))
        self.env.run()
        if self.left:
            raise UsageError(
                f"engine.pool_slices: expected more than {self.scenario.engine.pool_slices}: {self.left} requests "
                "wait for ever for slots that other threads keep in their caches"
            )
        return self.outcome

    def _ready_at(self, instance: int) -> int:
        """Return the earliest time at which any layer can become ready at this instance."""
        next_ready = self.next_ready[instance]
        if next_ready == WAITING:
            return self.env.now + self.first_layer[instance]  # pages may come back at any time
        return self.next_arrival if next_ready == IDLE else next_ready

    def _arrivals(self) -> Steps:
        for request in self.workload.requests:
            self.next_arrival = request.arrival_ps
            yield self.env.timeout(request.arrival_ps - self.env.now)
            yield self.queue.put(request)
        self.next_arrival = FOREVER

    def _instance(self, index: int) -> Steps:
        while True:
            self.next_ready[index] = IDLE
            request: Request = yield self.queue.get()
            self.next_ready[index], self.first_layer[index] = WAITING, int(request.layer_ps[0])
            yield from self.decode.admit(request)
            for layer, compute in enumerate(request.layer_ps.tolist()):
                self.next_ready[index] = self.env.now + compute
                yield self.env.timeout(compute)
                for rank in self.ranks[index]:
                    rank.tasks.put(
                        Layer(request.index, layer, request.slices, request.slice_bytes, self.env.now, self._arrived)
                    )

    def _arrived(self, task: Layer) -> None:
        """Note that all slices of one layer of one rank have arrived."""
        lag = task.done_ps - task.ready_ps
        stall = self.outcome.stall
        stall[task.request, task.layer] = max(stall[task.request, task.layer], lag)
        self.missing[task.request] -= 1
        if self.missing[task.request] == 0:
            request = self.workload.requests[task.request]
            first_token = task.done_ps + self.scenario.decode.first_token
            self.outcome.response[task.request] = first_token - request.arrival_ps
            self.env.process(self.decode.serve(request))
            self.left -= 1
