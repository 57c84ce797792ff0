"""The traffic that benches send, counts that must agree, and the circumstances and quantiles of what they measure."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mooncache import Engine, Stats
from mooncache.cores import siblings_of
from mooncache.errors import MooncacheError
from mooncache.limits import CHUNK_SLICES
from mooncache.operands import Operand
from mooncache.providers.inprocess.emulated import Nic

FREE_WIRE = Nic(bits_per_s=10**15, messages_per_s=10**12, latency_ns=0, move_bytes=False)
"""A NIC that answers at once and moves nothing: what remains is the engine's own work."""

SEED = 20250406  # the day upstream began to free slices in its workers; any number would do
GROWTH_MIB = 1.0  # of resident memory after the first layers; more is a leak
QUIET_S = 60.0  # the slowest policy, deferred, frees 30 M slices in that time


class FingerprintError(MooncacheError):
    """A bench did other work than it was asked for, so its times mean nothing."""


# ------------------------------------------------------------------------------ traffic
class Traffic(NamedTuple):
    """Requests of `length` bytes scattered over two buffers; no two touch, so each becomes one slice."""

    source_buffer: np.ndarray  # uint8[2 * n * length]
    target_buffer: np.ndarray  # uint8[2 * n * length]
    source: np.ndarray  # int64[n]   addresses, in random order
    target: np.ndarray  # int64[n]   addresses, in another random order
    length: int  # bytes

    @property
    def operands(self) -> tuple[Operand, Operand, int]:
        """The operands of `Engine.write`: arrays, or integers for a single request."""
        if self.source.size == 1:
            return int(self.source[0]), int(self.target[0]), self.length
        return self.source, self.target, self.length


def scattered(requests: int, length: int) -> Traffic:
    """Make traffic in an order drawn from SEED. The buffers cost memory only once somebody touches them."""
    chance = np.random.Generator(np.random.Philox(key=[SEED, requests]))
    source, target = (np.empty(2 * requests * length, np.uint8) for _ in range(2))
    sources, targets = (b.ctypes.data + 2 * length * chance.permutation(requests) for b in (source, target))
    return Traffic(source, target, sources, targets, length)


def slots_of(slices: int) -> int:
    """Return the slots that a batch of `slices` occupies: whole chunks."""
    return -(-slices // CHUNK_SLICES) * CHUNK_SLICES


# ------------------------------------------------------------------------------ fingerprints
def expect(what: str, came: object, expected: object) -> None:
    """Raise FingerprintError unless both are equal."""
    if came != expected:
        raise FingerprintError(f"{what}: expected {expected}, came {came}; the figures of this run mean nothing")


def expect_counts(stats: Stats, slices: int, batches: int, store: str, policy: str) -> None:
    """Check that a quiet engine did exactly this: `slices` in `batches` filled, arrived and given up."""
    counts, leaks, name = stats.counts, policy == "leak", f"{store} + {policy}"
    for kind in ("slices_filled", "work_requests", "completions", "completed"):
        expect(f"{name}: {kind}", counts[kind], slices)
    for kind in ("batches_submitted", "batches_taken", "batches_finished", "batches_closed"):
        expect(f"{name}: {kind}", counts[kind], batches)
    for kind in ("failed", "retried", "stale"):
        expect(f"{name}: {kind}", counts[kind], 0)
    gone = counts["slices_freed"] + counts["slices_dropped"] + counts["slices_leaked"]
    expect(f"{name}: slices freed, dropped or leaked", gone, slices)
    expect(f"{name}: slices leaked", counts["slices_leaked"], slices if leaks else 0)
    objects = slices if store == "heap" else 0
    expect(f"{name}: objects made or reused", counts["heap_allocated"] + counts["heap_reused"], objects)
    back = counts["heap_freed"] + counts["heap_cached"]
    expect(f"{name}: objects freed or cached", back, 0 if leaks else objects)
    expect(f"{name}: open batches", stats.open_batches, 0)
    if not leaks:
        expect(f"{name}: free slots", stats.free_slices, stats.capacity_slices)


def wait_until_quiet(engine: Engine) -> Stats:
    """Wait until the engine holds no batch, so that all slots are back; return its stats from then on."""
    deadline = time.monotonic() + QUIET_S
    while (holds := engine.stats().open_batches) > 0:
        if time.monotonic() > deadline:
            raise FingerprintError(f"{engine!r} still holds {holds} batches after {QUIET_S:.0f} s")
        time.sleep(2e-4)
    return engine.stats()  # anew: the counts above were read before the batches were counted


# ------------------------------------------------------------------------------ measuring
@contextmanager
def on_own_cores() -> Iterator[Callable[[Engine], None]]:
    """Keep this thread, and those it starts, on one core, and the workers of engines passed to it on another.

    Linux likes to wake a worker on the very core of the submitter that rang its bell, and then a submit lasts
    until the worker has finished, or not, as it happens. With a single core there is nothing to choose.
    """
    before = os.sched_getaffinity(0)
    caller = min(before)
    others = sorted(before - {caller} - siblings_of(caller)) or sorted(before - {caller}) or [caller]

    def keep_apart(engine: Engine) -> None:
        for thread in threads_of(engine):
            os.sched_setaffinity(thread, {others[0]})

    os.sched_setaffinity(0, {caller})
    try:
        yield keep_apart
    finally:
        os.sched_setaffinity(0, before)


def threads_of(engine: Engine) -> list[int]:
    """Return Linux's ids of an engine's own threads: workers and reaper."""
    names = f"{engine.name}-worker-", f"{engine.name}-reaper"
    return [t.native_id for t in threading.enumerate() if t.name.startswith(names) and t.native_id]


def taken_ns(engine: Engine) -> int:
    """Return how long an engine's threads, ready to run, have waited for a core that another process had.

    Threads that may share a core with the caller are left out: they wait for this process as well.
    """
    apart = [t for t in threads_of(engine) if not os.sched_getaffinity(t) & os.sched_getaffinity(0)]
    waits = [Path(f"/proc/self/task/{thread}/schedstat") for thread in apart]
    return sum(int(path.read_text().split()[1]) for path in waits if path.exists())


@contextmanager
def no_collections() -> Iterator[None]:
    """Keep Python's garbage collector out of what is measured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quantile(samples: Sequence[float], q: float) -> float:
    """Return the q-quantile, linearly interpolated."""
    return float(np.quantile(np.asarray(samples), q))


def median(samples: Sequence[float]) -> float:
    """Return the median."""
    return quantile(samples, 0.5)


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int | str = "self") -> int:
    """Count the open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))
