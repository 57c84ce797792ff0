"""`mooncache bench lifecycle` measures what a slice costs its submitter, the worker, and the closer.

submit ---------> complete ---------> release
Engine.write      until wait() ends   Batch.close
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from itertools import product
from time import perf_counter_ns
from typing import Any

import typer

from mooncache import Batch, Engine
from mooncache.bench.harness.measure import (
    FREE_WIRE,
    Traffic,
    expect_counts,
    median,
    no_collections,
    on_own_cores,
    quantile,
    scattered,
    slots_of,
    wait_until_quiet,
)
from mooncache.bench.harness.options import JSON, PolicyName, StoreName, names
from mooncache.bench.harness.report import answer, progress, provenance, show_table
from mooncache.bench.harness.timed import Columns, TimedEmulated
from mooncache.limits import CACHE_SLICES
from mooncache.providers.inprocess.emulated import Emulated

SLICES = (1, 256, 30_000)
MILLION = 1_000_000
SLICE_BYTES = 512  # a page of one token, one layer, two KV heads: the incident's
ROUNDS = 10
REFERENCES = 101


class Closer(str, Enum):
    """The threads that may close a batch."""

    SAME = "same"
    OTHER = "other"


@dataclass
class Case:
    """One engine under one treatment, and the times it took, ns."""

    sink: str  # name of the engine that is written to
    traffic: Traffic
    store: str
    policy: str
    thread: str
    repeats: int
    engine: Engine = field(init=False)
    lives: int = 0
    submit: list[int] = field(default_factory=list)
    complete: list[int] = field(default_factory=list)
    nic: list[int] = field(default_factory=list)  # of that, the emulated NIC's own work
    release: list[int] = field(default_factory=list)

    @property
    def slices(self) -> int:
        """Slices of its batch."""
        return int(self.traffic.source.size)

    @property
    def rounds(self) -> int:
        """In how many visits the repeats are made."""
        return max(1, min(ROUNDS, self.repeats // 5))

    @property
    def warm_up(self) -> int:
        """Uncounted lives at the start of a visit: until caches hold this engine and its worker is awake."""
        return max(1, min(20, 2000 // self.slices))

    def visit(self, count: int, closer: Executor) -> None:
        """Live `count` lives and note their times."""
        source, target, length = self.traffic.operands
        close: Callable[[Batch], int] = closed if self.thread == "same" else lambda b: closer.submit(closed, b).result()
        wire = self.engine.provider
        assert isinstance(wire, TimedEmulated)
        for life in range(-self.warm_up, count):
            spent = wire.spent_ns
            begin = perf_counter_ns()
            batch = self.engine.write(self.sink, source, target, length)
            submitted = perf_counter_ns()
            batch.wait()
            done = perf_counter_ns()
            release = close(batch)
            if life >= 0:
                self.submit.append(submitted - begin)
                self.complete.append(done - submitted)
                self.nic.append(wire.spent_ns - spent)
                self.release.append(release)
            if self.policy in ("deferred", "epoch"):
                wait_until_quiet(self.engine)
        self.lives += self.warm_up + count

    @property
    def engines(self) -> list[int]:
        """The engine's part of the time from submit to completion, ns: all but what the NIC's functions took."""
        return [complete - nic for complete, nic in zip(self.complete, self.nic, strict=True)]

    def result(self) -> dict[str, Any]:
        """Return the case's row of the report, once the engine's counts are found to be those of the work asked for."""
        expect_counts(wait_until_quiet(self.engine), self.lives * self.slices, self.lives, self.store, self.policy)
        return {
            "store": self.store,
            "policy": self.policy,
            "thread": self.thread,
            "slices": self.slices,
            "submit_ns_per_slice": round(median(self.submit) / self.slices, 2),
            "complete_ns_per_slice": round(median(self.engines) / self.slices, 2),
            "nic_ns_per_slice": round(median(self.nic) / self.slices, 2),
            "release_us_p50": round(median(self.release) / 1e3, 3),
            "release_us_p99": round(quantile(self.release, 0.99) / 1e3, 3),
            "step_ms_p50": round(max(map(median, (self.submit, self.complete, self.release))) / 1e6, 3),
            "step_ms_max": round(max(map(max, (self.submit, self.complete, self.release))) / 1e6, 3),
            "repeats": self.repeats,
        }


def closed(batch: Batch) -> int:
    """Close a batch; return how long that took, ns."""
    begin = perf_counter_ns()
    batch.close()
    return perf_counter_ns() - begin


def repeats_of(store: str, policy: str, slices: int) -> int:
    """Return as many repeats as give pool + bulk a p99; fewer where a life is slow or leaves memory lost."""
    if policy in ("leak", "deferred"):
        return max(2, min(300, MILLION // slices))
    if store == "heap":
        return max(5, min(300, 3 * MILLION // slices))
    return max(20, min(1000, 12 * MILLION // slices))


def measure(
    slices: int, pairs: Iterable[tuple[str, str]], threads: Sequence[str], repeats: int | None
) -> list[dict[str, Any]]:
    """Measure one batch size; return rows. Engines take turns, so that what disturbs the machine hits all alike."""
    traffic = scattered(slices, SLICE_BYTES)
    with ExitStack() as stack:
        apart = stack.enter_context(on_own_cores())
        closer = stack.enter_context(ThreadPoolExecutor(1, "mooncache-closer"))
        sink = stack.enter_context(Engine(provider=Emulated(FREE_WIRE), slices=1, peers=1))
        sink.register(traffic.target_buffer)
        cases = [
            opened(stack, sink.name, traffic, store, policy, thread, repeats or repeats_of(store, policy, slices))
            for (store, policy), thread in product(pairs, threads)
        ]
        for case in cases:
            apart(case.engine)
        stack.enter_context(no_collections())
        bar = stack.enter_context(progress(f"{slices:,} slices", ROUNDS * len(cases)))
        for turn, case in product(range(ROUNDS), cases):
            if turn < case.rounds:
                case.visit(case.repeats // case.rounds + (turn < case.repeats % case.rounds), closer)
            bar()
        columns, took = Columns(traffic.source, traffic.target, traffic.length), []
        for _ in range(REFERENCES):
            begin = perf_counter_ns()
            columns.fill()
            took.append(perf_counter_ns() - begin)
        reference = {"reference_ns_per_slice": round(median(took) / slices, 2)}
        return [case.result() | reference for case in cases]


def opened(stack: ExitStack, sink: str, traffic: Traffic, store: str, policy: str, thread: str, repeats: int) -> Case:
    """Open a case with its own engine, whose pool holds two batches, or all if it never frees any."""
    case = Case(sink, traffic, store, policy, thread, repeats)
    batches = repeats + case.rounds * case.warm_up if policy == "leak" else 2
    slots = batches * slots_of(case.slices) + CACHE_SLICES  # thread_cache: the closing thread keeps as many
    case.engine = stack.enter_context(
        Engine(provider=TimedEmulated(FREE_WIRE), store=store, policy=policy, slices=slots, peers=1)
    )
    case.engine.register(traffic.source_buffer)
    return case


# ------------------------------------------------------------------------------ the report
def run(
    slices: Sequence[int],
    stores: Sequence[str],
    policies: Sequence[str],
    threads: Sequence[str],
    repeats: int | None,
) -> dict[str, Any]:
    """Measure every combination; return the report that `--json` prints."""
    pairs = list(product(stores, policies))
    one = measure(1, [("pool", "bulk")], ["same"], repeats)[0]
    results = [row for n in dict.fromkeys(slices) for row in measure(n, pairs, threads, repeats)]
    report: dict[str, Any] = {
        "bench": "lifecycle",
        "results": results,
        "release_ratio_heap_on_close_to_pool_bulk": release_ratio(results),
        "submit_one_us_p50": round(one["submit_ns_per_slice"] / 1e3, 3),
    }
    if MILLION in slices:
        bulk = find(results, "pool", "bulk", MILLION)
        report["million"] = bulk and {
            key: bulk[key] for key in ("release_us_p50", "release_us_p99", "step_ms_p50", "step_ms_max")
        }
    return report | {"provenance": provenance()}


def find(results: Sequence[dict[str, Any]], store: str, policy: str, slices: int) -> dict[str, Any] | None:
    """Return the row of one pair whose batches were closed by the thread that submitted them."""
    wanted = {"store": store, "policy": policy, "slices": slices, "thread": "same"}
    return next((row for row in results if wanted.items() <= row.items()), None)


def release_ratio(results: Sequence[dict[str, Any]]) -> float | None:
    """Return how much longer heap + on_close takes to close a batch than pool + bulk, at the largest of both."""
    for slices in sorted({row["slices"] for row in results}, reverse=True):
        heap, pool = find(results, "heap", "on_close", slices), find(results, "pool", "bulk", slices)
        if heap and pool:
            return round(float(heap["release_us_p50"] / pool["release_us_p50"]), 1)
    return None


SHOWN = (
    "store", "policy", "thread", "slices", "submit_ns_per_slice", "reference_ns_per_slice", "complete_ns_per_slice",
    "nic_ns_per_slice", "release_us_p50", "release_us_p99", "step_ms_max",
)  # fmt: skip


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    columns = (
        "store", "policy", "closed\nby", "slices", "submit\nns per\nslice", "plain\nfill\nns",
        "complete\nns per\nslice",
        "NIC's\nns", "release\np50 µs", "release\np99 µs", "longest\nstep ms",
    )  # fmt: skip
    rows = [[row[key] for key in SHOWN] for row in report["results"]]
    ratio = report["release_ratio_heap_on_close_to_pool_bulk"]
    says = f"Submitting a single slice takes {report['submit_one_us_p50']:,.3g} µs with pool + bulk."
    if ratio:
        says = (
            f"Closing a batch takes its caller {ratio:,.0f} times as long with heap + on_close, which frees "
            f"slice by slice, as with pool + bulk, which gives the whole chain back at once. {says}"
        )
    show_table("Life of a slice: medians", columns, rows, says)


def command(
    slices: list[int] = typer.Option(
        list(SLICES),
        min=1,
        max=MILLION,
        help="Slices of a batch. Repeatable.",
    ),
    store: list[StoreName] = typer.Option(list(StoreName), help="Repeatable."),
    policy: list[PolicyName] = typer.Option(list(PolicyName), help="Where slices are deleted. Repeatable."),
    thread: list[Closer] = typer.Option(
        list(Closer),
        help="Who closes: the submitting thread (same), or another (other). Repeatable.",
    ),
    repeat: int | None = typer.Option(
        None, min=1, help="Lives of each batch [default: 2 to 1,000, by size and policy]."
    ),
    json: bool = JSON,
) -> None:
    """Submit, complete and release: what each costs, per slice and per batch, for every place of deletion.

    Callers run on one core and workers on another, if there are two.
    """
    answer(run(slices, names(store), names(policy), names(thread), repeat), json, show)
