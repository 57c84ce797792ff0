"""The main job: the same requests under every pair of slice store and reclaim policy.

Replications share their random streams across pairs, so each request is compared with itself: `added_ms` is its
response time minus that of the same request, in the same replication, under pool + leak. What `leak` on the pair's own
store adds is `leak_ms_mean`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sim import units
from sim.config import Scenario, Shape, Trace
from sim.costs import PS_PER_NS, Calibration, digest, load_calibration
from sim.rank import Figures
from sim.runs import BASE, REFERENCE, Job, Run, added_ms, leak_of, simulate
from sim.statistics import holm, mean_interval, paired_p_value, paired_ratio, percentile
from sim.verdict import verdict, warnings
from sim.workload import SAMPLE_REQUESTS, Workload, build_workload

PS_PER_US, PS_PER_MS = 10**6, 10**9


# ------------------------------------------------------------------------------ findings
@dataclass(frozen=True)
class PolicyResult:
    """One line of the comparison; see the README for what each figure means."""

    store: str
    policy: str
    added_ms_mean: float
    added_ms_ci95: float | None  # half width; None with one replication
    leak_ms_mean: float  # what `leak` on the same store adds
    stall_us_p50: float
    stall_us_p99: float
    worker_free_share: float  # of the worker's busy time
    worker_ns_per_slice: float
    freeing_ns_per_slice: float  # of all threads
    submit_us_mean: float
    transfer_us_mean: float  # from a submit's end to the batch's
    close_us_mean: float
    pool_high_water_slices: int  # of one rank
    leaked_slices: int  # of all ranks, in one replication
    response_ms_mean: float
    response_ratio: float | None  # to pool/bulk, geometric mean over replications
    response_ratio_ci95: tuple[float, float] | None
    response_p_value: float | None  # Holm-corrected over all pairs
    replications: int

    @property
    def name(self) -> str:
        """The pair as people write it, "pool + bulk"."""
        return f"{self.store} + {self.policy}"

    @property
    def pair(self) -> str:
        """The pair as jobs name it, "pool/bulk"."""
        return f"{self.store}/{self.policy}"


@dataclass(frozen=True)
class Comparison:
    """The findings of a comparison; `result` is written as result.json."""

    scenario: Scenario
    calibration: Calibration
    title: str
    policies: list[PolicyResult]
    verdict: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    budget_ns_per_slice: float  # worker's time that a layer's compute leaves for each slice
    stall_ms_by_layer: dict[str, np.ndarray]  # by pair: float64[layers], mean of all requests
    slices: int
    simulated: int  # of these, one by one; the others are known from them

    @property
    def run_name(self) -> str:
        """The name of the results folder: the same question has the same name."""
        asked = self.scenario.model_dump_json(exclude={"calibration"}) + digest(self.calibration)
        return f"{self.scenario.name}-{hashlib.blake2b(asked.encode(), digest_size=4).hexdigest()}"

    @property
    def result(self) -> dict[str, Any]:
        """Plain data, a function of the question alone: no time of day, no speed."""
        return {
            "scenario": self.scenario.name,
            "seed": self.scenario.seed,
            "replications": max(policy.replications for policy in self.policies),
            "mode": self.scenario.mode,
            "calibration": {
                "name": self.calibration.name,
                "digest": digest(self.calibration),
                "measured": self.calibration.measured,
                "machine": self.calibration.machine.model_dump(),
            },
            "slices": self.slices,
            "budget_ns_per_slice": self.budget_ns_per_slice,
            "policies": [asdict(policy) for policy in self.policies],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "verdict": self.verdict,
        }


def conclude(scenario: Scenario, runs: Sequence[Run]) -> Comparison:
    """Turn the runs of all jobs into the comparison."""
    by_pair: dict[str, list[Run]] = {}
    for run in runs:
        by_pair.setdefault(run.job.pair, []).append(run)
    policies = [_policy_result(pair, by_pair) for pair in scenario.pairs]
    calibration = load_calibration(scenario.calibration)
    workload = build_workload(scenario, scenario.seed)
    notes = (*workload.notes, *_notes(scenario, calibration))
    if scenario.mode == "fast":
        slowest = max(policies, key=lambda p: p.response_ms_mean)
        notes = (*notes, fast_difference(scenario, slowest.pair))
    return Comparison(
        scenario=scenario,
        calibration=calibration,
        title=title_of(scenario, workload),
        policies=_with_p_values(policies, by_pair),
        verdict=verdict(scenario, workload, policies),
        warnings=tuple(warnings(scenario, workload, policies)),
        notes=notes,
        budget_ns_per_slice=workload.compute_ps / workload.total_slices * workload.ranks / PS_PER_NS,
        stall_ms_by_layer={pair: _by_layer(by_pair[pair]) for pair in scenario.pairs},
        slices=sum(run.slices for run in runs),
        simulated=sum(run.simulated for run in runs),
    )


def _means(runs: Sequence[Run]) -> list[float]:
    """Return the mean response time of each replication, ms."""
    return [run.response_ms for run in runs]


def _response_ms(runs: Sequence[Run], base: Sequence[Run]) -> float:
    """Return the mean response time over all replications; a missing one is its base's, and what the pair adds."""
    if len(runs) == len(base):
        return float(np.mean(_means(runs)))
    return float(np.mean(_means(base)) + np.mean(added_ms(runs, base)))


def _policy_result(pair: str, by_pair: dict[str, list[Run]]) -> PolicyResult:
    runs, (store, policy) = by_pair[pair], pair.split("/")
    base = by_pair[BASE]
    added = mean_interval(added_ms(runs, base))
    stall = np.concatenate([run.stall.ravel() for run in runs])
    total = Figures(*(sum(column) for column in zip(*(run.figures for run in runs), strict=True)))
    reference = by_pair.get(REFERENCE)
    ratio = paired_ratio(_means(runs), _means(reference[: len(runs)])) if reference else None
    return PolicyResult(
        store=store,
        policy=policy,
        added_ms_mean=added.mean,
        added_ms_ci95=added.half_width,
        leak_ms_mean=float(np.mean(added_ms(by_pair[leak_of(pair)], base))),
        stall_us_p50=percentile(stall, 50) / PS_PER_US,
        stall_us_p99=percentile(stall, 99) / PS_PER_US,
        worker_free_share=total.freeing_ps / max(1, total.busy_ps),
        worker_ns_per_slice=total.busy_ps / PS_PER_NS / sum(run.slices for run in runs),
        freeing_ns_per_slice=total.all_freeing_ps / PS_PER_NS / sum(run.slices for run in runs),
        submit_us_mean=total.submit_ps / max(1, total.closes) / PS_PER_US,
        transfer_us_mean=total.transfer_ps / max(1, total.closes) / PS_PER_US,
        close_us_mean=total.close_ps / max(1, total.closes) / PS_PER_US,
        pool_high_water_slices=max(run.figures.high_water_slices for run in runs),
        leaked_slices=total.leaked_slices // len(runs),
        response_ms_mean=_response_ms(runs, base),
        response_ratio=ratio.ratio if ratio else None,
        response_ratio_ci95=(ratio.low, ratio.high) if ratio and ratio.low is not None and ratio.high else None,
        response_p_value=None,
        replications=len(runs),
    )


def _with_p_values(policies: list[PolicyResult], by_pair: dict[str, list[Run]]) -> list[PolicyResult]:
    """Add the chance that a pair only seems to differ from pool/bulk, corrected for so many comparisons."""
    reference = by_pair.get(REFERENCE)
    if reference is None or len(reference) < 2:
        return policies
    others = [pair for pair in by_pair if pair != REFERENCE and pair in {p.pair for p in policies}]
    values = holm([paired_p_value(_means(by_pair[pair]), _means(reference[: len(by_pair[pair])])) for pair in others])
    corrected = dict(zip(others, values, strict=True))
    return [replace(p, response_p_value=corrected.get(p.pair)) for p in policies]


def _by_layer(runs: Sequence[Run]) -> np.ndarray:
    found: np.ndarray = np.concatenate([run.stall for run in runs]).mean(axis=0) / PS_PER_MS
    return found


def title_of(scenario: Scenario, workload: Workload) -> str:
    """Describe the scenario in one line by its present values, which `--set` may have changed."""
    requests, nic = workload.requests, scenario.nic
    compute = scenario.prefill.layer_time or workload.compute_ps / len(requests) / workload.layers
    every = units.format_duration(compute)
    wire = f"{nic.rails} x " if nic.rails > 1 else ""
    wire += units.BIT_RATE.spell(nic.rate)
    model = "" if isinstance(scenario.workload, Shape) else f"{scenario.workload.model.name}, "
    return (
        f"{scenario.description or scenario.name}: {model}{len(requests):,} requests x {workload.layers} layers x "
        f"{workload.ranks} ranks, {_span([r.slices for r in requests])} slices of "
        f"{_span([r.slice_bytes for r in requests])} B a layer and rank, computed in {every}, {wire}"
    )


def _span(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def _notes(scenario: Scenario, calibration: Calibration) -> list[str]:
    """Return what a reader must know to trust the figures."""
    machine = calibration.machine
    return [
        f"CPU costs: calibration {calibration.name!r}, measured {calibration.measured} on {machine.cpu} "
        f"({machine.cores} cores, {machine.libc}); the wire is the scenario's",
    ]


def fast_difference(scenario: Scenario, pair: str) -> str:
    """Simulate a sample in both modes, under the pair that is most in arrears, and say how far they are apart."""
    asked = scenario.workload
    sample = asked.model_copy(
        update={"limit": SAMPLE_REQUESTS} if isinstance(asked, Trace) else {"requests": SAMPLE_REQUESTS}
    )
    both = {
        mode: simulate(Job(scenario.model_copy(update={"mode": mode, "workload": sample}), pair, 0))
        for mode in ("fast", "exact")
    }
    response = _apart(both["fast"].response, both["exact"].response)
    stall = _apart(both["fast"].stall, both["exact"].stall)
    name = pair.replace("/", " + ")
    return (
        f"fast mode: over the first {len(both['exact'].response)} requests under {name}, mean response time differs"
        f" from the exact mode by {response:.4%}, mean stall by {stall:.3%}; slices alive are counted from "
        "submit to close, without what a reaper or a cache still holds"
    )


def _apart(fast: np.ndarray, exact: np.ndarray) -> float:
    return abs(float(fast.mean()) - float(exact.mean())) / float(exact.mean())
