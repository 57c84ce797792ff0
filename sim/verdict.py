"""The verdict of a comparison: which placement to choose, why the worst is the worst, and what is about to run out.

A layer passes four stages, and each is a mechanism of its own. Those that take longer than the next layer is computed
in fall behind; what comes before the last layer's arrival delays a response even where nothing does.

    caller: allocate and fill --> worker: post, poll, free --> wire --> caller: close, which may free
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mooncache.kernels.reclaim.policies import traits_of
from sim.config import Scenario
from sim.figures import interval
from sim.rank import nics_of
from sim.workload import Workload

if TYPE_CHECKING:
    from sim.compare import PolicyResult

PS_PER_MS = 10**9
TIE = 0.001  # response times this close are equal; the least CPU time for freeing decides, then the simplest policy
NOTHING_MS = 1  # what nobody notices in a response
IN_SECONDS_MS = 10_000  # from here on times are told in seconds
FULL = 0.9  # of a stage's time, or of the pool


@dataclass(frozen=True)
class Stages:
    """The time of each stage for one layer of one rank under a pair, ms, beside that until the next layer."""

    compute: float  # of the next layer
    submit: float  # caller: allocate and fill
    worker: float  # busy
    freeing: float  # of that, on freeing
    wire: float
    close: float  # caller
    caller: float  # all that a caller is taken for, divided by the number of callers

    @property
    def shares(self) -> dict[str, float]:
        """The share of each stage in a layer's compute time; the callers' only where they do not wait for others."""
        found = {"worker": self.worker / self.compute, "wire": self.wire / self.compute}
        if max(found.values()) < FULL:
            found["callers"] = self.caller / self.compute
        return found


def stages(scenario: Scenario, workload: Workload, policy: PolicyResult) -> Stages:
    """Return the stages of a mean layer, from the pair's figures."""
    requests = workload.requests
    slices = float(np.mean([request.slices for request in requests]))
    nic = nics_of(scenario)[0]
    wire = [max(nic.message_ps, r.slice_bytes * 8 * 10**12 / nic.bits_per_s) * r.slices for r in requests]
    worker = policy.worker_ns_per_slice * slices / 1e6
    held_us = policy.submit_us_mean + policy.transfer_us_mean + policy.close_us_mean
    return Stages(
        compute=max(1e-9, float(np.mean([request.layer_ps.mean() for request in requests])) / PS_PER_MS),
        submit=policy.submit_us_mean / 1000,
        worker=worker,
        freeing=worker * policy.worker_free_share,
        wire=float(np.mean(wire)) / PS_PER_MS / scenario.nic.rails,
        close=policy.close_us_mean / 1000,
        caller=held_us / 1000 / scenario.engine.submit_threads,
    )


def verdict(scenario: Scenario, workload: Workload, policies: Sequence[PolicyResult]) -> str:
    """Say which placement to choose, which hurts most, and by which mechanism."""
    freeing = [p for p in policies if traits_of(p.policy).frees]
    if not freeing:
        return "Only leaking engines were compared: each runs out of memory in the end."
    fastest = min(p.response_ms_mean for p in freeing)
    ties = [p for p in freeing if p.response_ms_mean <= fastest * (1 + TIE)]
    best = min(reversed(ties), key=lambda p: round(p.freeing_ns_per_slice, 1))
    worst = max(freeing, key=lambda p: p.added_ms_mean)
    choose = f"Choose {best.name}: it adds {_interval(best)} to a response of {best.response_ms_mean:,.0f} ms"
    if worst is best or worst.added_ms_mean - best.added_ms_mean < NOTHING_MS:
        return f"{choose}, and no other placement that was compared adds {NOTHING_MS} ms more."
    why = mechanism(scenario, stages(scenario, workload, worst), stages(scenario, workload, best))
    return f"{choose}. {worst.name} adds {_interval(worst)}: {why}."


def _interval(policy: PolicyResult) -> str:
    mean, half_width = policy.added_ms_mean, policy.added_ms_ci95
    if abs(mean) < IN_SECONDS_MS:
        return f"{interval(mean, half_width)} ms"
    return f"{interval(mean / 1000, None if half_width is None else half_width / 1000)} s"


def mechanism(scenario: Scenario, worst: Stages, best: Stages) -> str:
    """Explain by a placement's own figures what it adds. The wire's time is no reason: all have the same."""
    if worst.worker > max(worst.compute, worst.wire):
        share = worst.freeing / worst.worker
        return (
            f"freeing slices takes {share:.0%} of the worker's time, a layer keeps it busy for {worst.worker:,.1f} ms, "
            f"and the next layer is computed in {worst.compute:,.1f} ms: transfers fall behind"
        )
    if worst.caller > max(worst.compute, worst.wire):
        threads = scenario.engine.submit_threads
        return (
            f"a layer takes {worst.caller * threads:,.1f} ms of a submitting thread, {worst.submit:,.1f} ms of it to "
            f"make its slices and {worst.close:,.1f} ms to free them at close, and layers wait for "
            + ("the one thread" if threads == 1 else f"one of the {threads} threads")
        )
    making, freeing = worst.submit - best.submit, worst.freeing - best.freeing
    if making > freeing:
        cause = f"making the slices of a layer takes the caller {worst.submit:,.1f} ms before they are sent"
    else:
        cause = f"the worker frees slices for {worst.freeing:,.1f} ms of each layer"
    return f"{cause}, and the last layer arrives later for it"


def warnings(scenario: Scenario, workload: Workload, policies: Sequence[PolicyResult]) -> list[str]:
    """Yield what is saturated, or about to run out, and under which pairs."""
    pool, found = scenario.engine.pool_slices, []
    leaking = [p.name for p in policies if not traits_of(p.policy).frees and p.leaked_slices // workload.ranks >= pool]
    if leaking:
        found.append(
            f"{' and '.join(leaking)} used up the {pool:,} slices of engine.pool_slices; the simulation went on as a "
            "new process would"
        )
    full = [p for p in policies if traits_of(p.policy).frees and p.pool_high_water_slices >= FULL * pool]
    if full:
        names = ", ".join(f"{p.name} ({p.pool_high_water_slices / pool:.0%})" for p in full)
        found.append(f"engine.pool_slices, {pool:,}, is about to run out, or has, under {names}")
    shares = {p.name: stages(scenario, workload, p).shares for p in policies}
    threads = f"the {scenario.engine.submit_threads} submitting threads are"
    for stage, what in (("worker", "the worker is"), ("wire", "the wire is"), ("callers", threads)):
        busy = {name: each[stage] for name, each in shares.items() if each.get(stage, 0) >= FULL}
        if busy:
            takes = ", ".join(f"{name} takes {share:.0%}" for name, share in busy.items())
            if len({f"{share:.0%}" for share in busy.values()}) == 1 and len(busy) == len(shares):
                takes = f"each pair takes {busy.popitem()[1]:.0%}"
            found.append(f"{what} at the limit: of the time that compute leaves, {takes}")
    return found
