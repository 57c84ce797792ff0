"""`mooncache bench gil` measures whether a busy Python thread slows a running transfer, or the calls that feed it.

    lanes   [ batch 0 ][ batch 1 ] ... [ batch 7 ]    all in flight; the oldest is waited for and sent again

Beside a busy Python thread the feeding thread gets the GIL back after the switch interval, 5 ms. The lanes
hold more work than that, so the worker, which never needs the GIL, has to go on all the same.

Python threads run on one core and the worker on another. What other processes take of the worker's core is measured
by Linux and left out of the throughput; they disturb more beside the busy thread, which leaves them no other core.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import typer

from mooncache import Batch, Engine
from mooncache.bench.harness.measure import (
    FingerprintError,
    Traffic,
    expect_counts,
    median,
    no_collections,
    on_own_cores,
    quantile,
    scattered,
    slots_of,
    taken_ns,
    wait_until_quiet,
)
from mooncache.bench.harness.options import JSON
from mooncache.bench.harness.report import answer, progress, provenance, show_table

LANES = 8
SLICES = 2000  # a lane's
SLICE_BYTES = 4096
ROUND_S = 0.5
WORD = 8
NS_PER_S = 10**9


@contextmanager
def busy_thread(wanted: bool) -> Iterator[None]:
    """Run a thread that executes Python and nothing else, meanwhile, if wanted."""
    stop = threading.Event()

    def count() -> None:
        n = 0
        while not stop.is_set():
            for _ in range(1000):
                n += 1

    thread = threading.Thread(target=count, name="mooncache-busy", daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if wanted:
            thread.join()


class Round(NamedTuple):
    """The figures of one round."""

    sent_bytes: int
    elapsed_ns: int
    taken_ns: int  # of those, the worker was ready to run and other processes had its core
    submits_ns: list[int]

    @property
    def wall_gb_per_s(self) -> float:
        """Throughput over all the time."""
        return self.sent_bytes / self.elapsed_ns

    @property
    def gb_per_s(self) -> float:
        """Throughput while the worker had its core."""
        return self.sent_bytes / (self.elapsed_ns - self.taken_ns)


class Transfer:
    """Lanes of batches between two engines, kept in flight by the calling thread."""

    def __init__(self, engine: Engine, sink: Engine) -> None:
        self.engine, self.sink = engine, sink.name
        self.traffic: Traffic = scattered(LANES * SLICES, SLICE_BYTES)
        engine.register(self.traffic.source_buffer)
        sink.register(self.traffic.target_buffer)
        self.lanes = [slice(i * SLICES, (i + 1) * SLICES) for i in range(LANES)]
        self.batches = 0

    def stamp(self, number: int) -> None:
        """Make the source's bytes differ from those of any other round."""
        self.traffic.source_buffer.view(np.int64)[:] = np.arange(self.traffic.source_buffer.size // WORD) ^ number << 32

    def verify(self) -> None:
        """Compare every byte that was sent in this round with the bytes at the target."""
        blocks = [
            buffer.reshape(-1, SLICE_BYTES)[(addresses - buffer.ctypes.data) // SLICE_BYTES]
            for buffer, addresses in (
                (self.traffic.source_buffer, self.traffic.source),
                (self.traffic.target_buffer, self.traffic.target),
            )
        ]
        if not np.array_equal(*blocks):
            wrong = int(np.count_nonzero((blocks[0] != blocks[1]).any(axis=1)))
            raise FingerprintError(f"expected {LANES * SLICES} slices to arrive unchanged, {wrong} did not")

    def submit(self, lane: int) -> tuple[Batch, int]:
        """Send a lane; return its batch and how long the call took, ns."""
        source, target = self.traffic.source[self.lanes[lane]], self.traffic.target[self.lanes[lane]]
        begin = perf_counter_ns()
        batch = self.engine.write(self.sink, source, target, SLICE_BYTES)
        return batch, perf_counter_ns() - begin

    def round(self, seconds: float) -> Round:
        """Keep all lanes in flight for a while; return the figures."""
        submits: list[int] = []
        sent, taken = 0, taken_ns(self.engine)
        begin = perf_counter_ns()
        flying = deque((lane, self.submit(lane)[0]) for lane in range(LANES))
        while flying:
            lane, batch = flying.popleft()
            batch.wait()
            batch.close()
            sent += 1
            if perf_counter_ns() - begin < seconds * NS_PER_S:
                batch, ns = self.submit(lane)
                submits.append(ns)
                flying.append((lane, batch))
        elapsed = perf_counter_ns() - begin
        self.batches += sent
        return Round(sent * SLICES * SLICE_BYTES, elapsed, taken_ns(self.engine) - taken, submits)


def run(seconds: float) -> dict[str, Any]:
    """Measure alone and beside a busy thread in turn; return the report that `--json` prints."""
    rounds = max(1, round(seconds / ROUND_S / 2))
    seen: dict[bool, list[Round]] = {False: [], True: []}
    with (
        Engine(provider="loopback", slices=slots_of(SLICES) * LANES, slice_bytes=SLICE_BYTES, peers=1) as engine,
        Engine(provider="loopback", slices=1, peers=1) as sink,
        progress("gil", 2 * rounds) as bar,
        on_own_cores() as apart,
        no_collections(),
    ):
        apart(engine)
        transfer = Transfer(engine, sink)
        transfer.round(ROUND_S / 5)  # uncounted: pages are touched, caches and clocks warm up
        for number in range(2 * rounds):
            busy = number % 4 in (
                1,
                2,
            )  # alone, beside, beside, alone: a slow drift of the machine cancels out
            transfer.stamp(number)
            with busy_thread(busy):
                seen[busy].append(transfer.round(seconds / rounds / 2))
            transfer.verify()
            bar()
        stats = wait_until_quiet(engine)
        expect_counts(stats, transfer.batches * SLICES, transfer.batches, "pool", "bulk")
    alone, beside = figures(seen[False]), figures(seen[True])
    return {
        "bench": "gil",
        "throughput_ratio": round(beside["gb_per_s"] / alone["gb_per_s"], 3),
        "submit_p50_ratio": round(beside["submit_us_p50"] / alone["submit_us_p50"], 3),
        "throughput_ratio_wall": round(beside["wall_gb_per_s"] / alone["wall_gb_per_s"], 3),
        "alone": alone,
        "beside_busy_thread": beside,
        "batches_in_flight": LANES,
        "slices": SLICES,
        "slice_bytes": SLICE_BYTES,
        "provenance": provenance(),
    }


def figures(rounds: list[Round]) -> dict[str, Any]:
    """Summarise one way of running: medians over rounds, quantiles over submits."""
    submits = [ns for one in rounds for ns in one.submits_ns]
    return {
        "gb_per_s": round(median([one.gb_per_s for one in rounds]), 3),
        "wall_gb_per_s": round(median([one.wall_gb_per_s for one in rounds]), 3),
        "core_taken_share": round(sum(one.taken_ns for one in rounds) / sum(one.elapsed_ns for one in rounds), 3),
        "submit_us_p50": round(median(submits) / 1e3, 2),
        "submit_us_p99": round(quantile(submits, 0.99) / 1e3, 2),
        "submits": len(submits),
        "gb_per_s_of_rounds": [round(one.gb_per_s, 3) for one in rounds],
    }


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    rows: list[list[Any]] = [
        [name, *(report[key][column] for column in ("gb_per_s", "core_taken_share", "submit_us_p50", "submit_us_p99"))]
        for name, key in (("alone", "alone"), ("beside a busy Python thread", "beside_busy_thread"))
    ]
    ratio, slower = report["throughput_ratio"], report["submit_p50_ratio"]
    rows.append(["ratio", ratio, "", slower, rows[1][4] / rows[0][4]])
    columns = ("transfer", "throughput\nGB/s", "core taken\nby others", "submit\np50 µs", "submit\np99 µs")
    says = (
        f"Beside a busy Python thread the transfer has {ratio:.0%} of its throughput alone, since the worker "
        f"never takes the GIL; a submit takes {slower:.2f} times as long, since it holds the GIL to its end."
    )
    show_table(f"The engine and the GIL: batches of {SLICES:,} slices of {SLICE_BYTES:,} bytes", columns, rows, says)


def command(
    seconds: float = typer.Option(10.0, min=0.1, help="How long to measure, both ways together."),
    json: bool = JSON,
) -> None:
    """Measure a running transfer and its submits, without and with a busy Python thread beside them.

    Python threads run on one core and the worker on another, if there are two: it is the GIL that is measured.
    """
    answer(run(seconds), json, show)
