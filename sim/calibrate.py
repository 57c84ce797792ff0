"""Calibration measures a file of costs on this machine: the real kernels, the real malloc, no model.

Three parts. Calls from Python are timed around the API. A worker's stages are timed by a worker that reads the clock
between them, on a thread of its own, so that it finds its data in another core's cache as a real one does. The
allocator is measured in fresh processes (`sim.malloc_bench`), because its state is the process's.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mooncache import Batch, Engine
from mooncache.bench.harness.measure import FREE_WIRE, scattered
from mooncache.bench.harness.report import provenance
from mooncache.kernels import calls
from mooncache.kernels.account import clock
from mooncache.kernels.atomics import i64
from mooncache.kernels.complete import poll
from mooncache.kernels.enums import Kind
from mooncache.kernels.jit import kernel
from mooncache.kernels.pump import post, take
from mooncache.kernels.records.control import control_at
from mooncache.kernels.worker import worker_row
from mooncache.providers.inprocess.emulated import Emulated, Nic
from sim.costs import TABLES, Calibration, Machine, Point

SIZES = (256, 4096, 30_000, 120_000)  # slices of a batch
LAYER = 30_000  # where only one size is measured; must be in SIZES
SLICE_BYTES = 512
PAIRS = (1, 2, 4)
PROCESSES = 5  # for each case of the allocator: how a heap lies in memory differs from process to process
TAKE, POST, POLL = 0, 1, 2


# ------------------------------------------------------------------------------ kernels
@kernel("int64(int64, int64, int64)", nogil=True)
def staged_worker(ctl, slices, stages):
    """Work until `slices` have completed, and add the time of each stage, ns, to int64[3] at `stages`."""
    ctl = control_at(ctl)
    index = ctl.actor
    worker = worker_row(ctl, index)
    counters, times = i64(ctl.counters), i64(stages)
    until = counters[np.int64(Kind.COMPLETED)] + slices
    while counters[np.int64(Kind.COMPLETED)] < until:
        start = clock(ctl)
        take(ctl, worker, index)
        taken = clock(ctl)
        post(ctl, worker, index)
        posted = clock(ctl)
        poll(ctl, worker)
        times[TAKE] += taken - start
        times[POST] += posted - taken
        times[POLL] += clock(ctl) - posted
    return 0


@kernel("int64(int64, int64)", nogil=True)
def empty_polls(ctl, n):
    """Time `n` polls that find nothing; return ns."""
    ctl = control_at(ctl)
    worker = worker_row(ctl, ctl.actor)
    start = clock(ctl)
    for _ in range(n):
        poll(ctl, worker)
    return clock(ctl) - start


@kernel("int64(int64, int64)", nogil=True)
def clock_reads(ctl, n):
    """Time `n` readings of the clock; return ns."""
    ctl = control_at(ctl)
    start = clock(ctl)
    for _ in range(n):
        clock(ctl)
    return clock(ctl) - start


# ------------------------------------------------------------------------------ measuring
class Bench:
    """A pair of engines of one process, and scattered requests between them."""

    def __init__(self, **engine: Any) -> None:
        self.source = Engine(provider=Emulated(FREE_WIRE), **engine)
        self.target = Engine(provider=Emulated(FREE_WIRE))
        self.traffic = scattered(max(SIZES), SLICE_BYTES)
        self.source.register(self.traffic.source_buffer)
        self.target.register(self.traffic.target_buffer)

    def write(self, slices: int) -> Batch:
        """Submit so many slices; return the batch."""
        source, target, _ = self.traffic._replace(
            source=self.traffic.source[:slices], target=self.traffic.target[:slices]
        ).operands
        return self.source.write(self.target.name, source, target, SLICE_BYTES)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.source.close()
        self.target.close()


def point(samples: list[float], slices: int, pairs: int = 1) -> Point:
    """Summarise repeats by their trimmed mean and their spread, ns per unit.

    The mean, because a run of many layers pays the sum: where threads fight for a lock, the median layer costs half of
    it. Trimmed by the 5 % at either end, which are mostly other processes' doing on the measuring machine.
    """
    low, high = np.percentile(samples, (5, 95))
    inner = [sample for sample in samples if low <= sample <= high]
    ns, p5, p95 = (max(0.0, round(float(v), 3)) for v in (np.mean(inner), low, high))
    return Point(slices=slices, pairs=pairs, ns=ns, p5=p5, p95=p95, repeats=len(samples))


def repeats_for(slices: int) -> int:
    """Return the number of repeats: more of what is short."""
    return int(np.clip(3_000_000 // slices, 25, 400))


def timed_batches(bench: Bench, slices: int) -> tuple[list[float], list[float]]:
    """Time each submit and each close of batches of so many slices, one after the other; return ns."""
    submits: list[float] = []
    closes: list[float] = []
    now = time.perf_counter_ns
    for _ in range(repeats_for(slices) + 3):
        start = now()
        batch = bench.write(slices)
        submitted = now()
        batch.wait()
        waited = now()
        batch.close()
        closes.append(now() - waited)
        submits.append(submitted - start)
    return submits[3:], closes[3:]


def measure_calls() -> Iterator[tuple[str, Point]]:
    """Measure submit and close from Python, on the pool."""
    with Bench(policy="on_close") as bench:
        submits, closes = timed_batches(bench, 1)
        call, close = float(np.median(submits)), float(np.median(closes))
        yield "submit_call", point([float(v) for v in submits], 1)
        yield "close_call", point([float(v) for v in closes], 1)
        for n in SIZES:
            submits, closes = timed_batches(bench, n)
            yield "fill", point([(v - call) / n for v in submits], n)
            yield "free_slice", point([(v - close) / n for v in closes], n)
    with Bench(policy="bulk") as bench:
        close = float(np.median(timed_batches(bench, 1)[1]))
        for n in SIZES[1:]:
            chunks = -(-n // 256)
            yield "free_chunk", point([(v - close) / chunks for v in timed_batches(bench, n)[1]], n)


def measure_cache() -> Iterator[tuple[str, Point]]:
    """Measure the thread cache: objects out of it and into it, in batches that fit."""
    n = 4096
    with Bench(policy="bulk") as pool:
        fill = float(np.median(timed_batches(pool, n)[0]))
    with Bench(policy="thread_cache", store="heap") as cached:
        submits, closes = timed_batches(cached, n)
        yield "reuse", point([(v - fill) / n for v in submits], n)
        yield "keep", point([v / n for v in closes], n)


def measure_wake() -> Iterator[tuple[str, Point]]:
    """Measure the time from a batch's end until the thread that slept for it runs again."""
    slow = Nic(latency_ns=400_000, move_bytes=False)
    with Engine(provider=Emulated(slow), spin_ns=0) as source, Engine(provider=Emulated(slow)) as target:
        memory = np.zeros((2, SLICE_BYTES), np.uint8)
        here, there = source.register(memory[0]), target.register(memory[1])
        samples = []
        for _ in range(300):
            with source.write(target.name, here.address, there.address, SLICE_BYTES) as batch:
                batch.wait()
                woken = time.monotonic_ns()
                samples.append(woken - calls.finished_at(source.ctl, batch._handle))
    yield "wake", point([float(v) for v in samples], 1)


def stage_times(bench: Bench, slices: int) -> list[np.ndarray]:
    """Time each stage of a staged worker for one batch, repeatedly; return ns."""
    engine = bench.source
    calls.stop(engine.ctl)  # its own worker leaves; this one takes its place
    for actor in engine._runtime.actors.threads:
        actor.join()
    engine._state.shared["stop"] = 0  # the engine itself goes on: submits are accepted
    (worker,) = engine._runtime.actors.workers
    samples = []
    for _ in range(repeats_for(slices) + 3):
        stages = np.zeros(3, np.int64)
        batch = bench.write(slices)
        thread = threading.Thread(target=staged_worker, args=(worker.ctl, slices, stages.ctypes.data))
        thread.start()
        thread.join()
        batch.close()
        samples.append(stages)
    return samples[3:]


def measure_worker() -> Iterator[tuple[str, Point]]:
    """Measure a worker's stages. A doorbell's own cost is the difference between chains of 1 and of 128."""
    with Bench() as bench:
        (worker,) = bench.source._runtime.actors.workers
        clock_ns = clock_reads(worker.ctl, 100_000) / 100_000
        empty = [empty_polls(worker.ctl, 10_000) / 10_000 for _ in range(50)]
        yield "poll", point(empty, 1)
        poll_ns = float(np.median(empty))
        single = stage_times(bench, 1)
    batch = [float(sum(s)) - 4 * clock_ns for s in single]
    posts = {}
    for chain in (1, 128):
        with Bench(chain=chain) as bench:
            posts[chain] = [s[POST] / LAYER for s in stage_times(bench, LAYER)]
    doorbell = (float(np.median(posts[1])) - float(np.median(posts[128]))) * 128 / 127
    yield "doorbell", point([max(0.0, v - float(np.median(posts[128]))) * 128 / 127 for v in posts[1]], LAYER)
    for n in SIZES:
        with Bench() as bench:
            samples = stage_times(bench, n)
        lots = -(-n // 64)
        work_request = [(s[POST] - n / 128 * doorbell - lots * clock_ns) / n for s in samples]
        completion = [(s[POLL] - lots * (poll_ns + clock_ns)) / n for s in samples]
        yield "work_request", point(work_request, n)
        yield "completion", point(completion, n)
    once = poll_ns + doorbell
    yield "batch", point([max(0.0, v - once) for v in batch], 1)


def measure_malloc() -> Iterator[tuple[str, Point]]:
    """Measure the allocator, alone and with others on one arena, each case in a process of its own."""
    for pairs in PAIRS:
        environment = dict(os.environ)
        if pairs > 1:
            environment["MALLOC_ARENA_MAX"] = "1"
        for n in SIZES[1:]:
            command = [sys.executable, "-m", "sim.malloc_bench", str(n), str(pairs)]
            pooled: dict[str, list[float]] = {}
            for _ in range(PROCESSES):
                output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                for table, samples in json.loads(output).items():
                    pooled.setdefault(table, []).extend(samples)
            for table, samples in pooled.items():
                yield table, point(samples, n, pairs)


PARTS: tuple[tuple[str, Callable[[], Iterator[tuple[str, Point]]]], ...] = (
    ("calls from Python", measure_calls),
    ("thread cache", measure_cache),
    ("waking a thread", measure_wake),
    ("worker", measure_worker),
    ("malloc and free", measure_malloc),
)


def machine() -> Machine:
    """Describe the machine that this runs on."""
    facts = provenance()
    return Machine(**{name: facts[name] for name in Machine.model_fields})


def calibrate(name: str, told: Callable[[str], None]) -> Calibration:
    """Measure everything; call `told` with each part as it begins."""
    tables: dict[str, list[Point]] = {table: [] for table in TABLES}
    gc.collect()
    gc.disable()
    try:
        for title, part in PARTS:
            told(title)
            for table, measured in part():
                tables[table].append(measured)
    finally:
        gc.enable()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Calibration(format=1, name=name, measured=today, machine=machine(), tables=tables)
