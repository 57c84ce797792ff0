"""What tests share: engines in pairs over filled memory, a rig that is turned by hand, waits that end in failure."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np

from mooncache import Batch, Engine, Stats
from mooncache.descriptor import Descriptor
from mooncache.kernels import enums, pump
from mooncache.kernels.arrays import address_of
from mooncache.kernels.enums import Kind, Opcode, Policy, QueueState
from mooncache.kernels.records.batch import BATCH
from mooncache.kernels.settings import Settings
from mooncache.kernels.state import Block, CompletionQueue, QueueRow, State
from mooncache.kernels.submit import prepare, publish, submit
from mooncache.kernels.tables import RegionTable
from mooncache.limits import CHUNK_SLICES
from mooncache.providers.base import HERE, Provider
from mooncache.providers.inprocess import emulated, nic
from tests.kernels.entries import Gated, never

LIMIT = 60.0  # seconds: far more than anything here takes; only a hang gets there
POLICIES = tuple(policy.name.lower() for policy in Policy)
STORES = ("pool", "heap")
SMALL: dict[str, int] = {"slices": 4096, "batches": 64, "peers": 4}
ROOT = Path(__file__).resolve().parent.parent
_numbers = itertools.count()

TIMING_KINDS = (Kind.POLLS, Kind.DOORBELLS, Kind.PARKS, Kind.WAKES)
"""Kinds whose counts depend on how threads interleave; all others are a function of the batches alone."""


# ------------------------------------------------------------------------------ waiting
class Task:
    """A function in a thread of its own, whose result or exception is fetched within the limit."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function(*self._arguments)
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, limit: float = LIMIT) -> Any:
        self._thread.join(limit)
        if self._thread.is_alive():
            faulthandler.dump_traceback(file=sys.__stderr__)
            raise AssertionError(f"{self._function} hangs: not done within {limit} s")
        if self._error is not None:
            raise self._error
        return self._result


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Run all at the same time, from one starting line; their results, in order."""
    line = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        line.wait(LIMIT)
        return function()

    return [task.result() for task in [Task(run, function) for function in functions]]


def until(condition: Callable[[], Any], what: str) -> None:
    """Let other threads run until the condition holds; fails after the limit."""
    end = monotonic() + LIMIT
    while not condition():
        sleep(1e-3)
        assert monotonic() < end, f"never saw: {what}"


@contextlib.contextmanager
def looks_held(engine: Engine) -> Iterator[threading.Event]:
    """Whoever asks a peer what it has registered gets no answer meanwhile; the event says that somebody does."""
    asked, answer, look_up = threading.Event(), threading.Event(), engine._peers._look_up

    def slowly(*arguments: Any) -> Descriptor:
        asked.set()
        answer.wait(LIMIT)
        return look_up(*arguments)

    engine._peers._look_up = slowly
    try:
        yield asked
    finally:
        engine._peers._look_up = look_up
        answer.set()


async def awaited(batch: Batch) -> None:
    """`await batch` as a coroutine, for a task."""
    await batch


def environment(**more: str) -> dict[str, str]:
    """For a child: all that this process was given, since a Python may need any of it, and where modules are."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), **more}


def run_python(script: str, limit: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own, in the project's root, with `more` in its environment."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        env=environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False,
    )  # fmt: skip


def usual_signals() -> None:
    """Take back what was blocked or ignored where this process was started, for its children, too.

    Hang-ups and interrupts stay ignored: that is what `nohup` and `&` are for. What is interrupted sets a handler.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


# ------------------------------------------------------------------------------ engines
def random_bytes(n: int, seed: int = 0) -> np.ndarray:
    """uint8[n] without zeros, so that a byte that never arrived shows."""
    return np.random.Generator(np.random.Philox(key=[seed, n])).integers(1, 256, n, dtype=np.uint8)


class Pair:
    """Two connected engines: `here` submits, `there` is the peer. Each has one registered arena.

    `here` uses the policy, store and settings of the test; `there` only lends its memory.
    """

    def __init__(
        self, here: Provider | str = "loopback", there: Provider | str | None = None, *, arena: int = 1 << 20,
        store: str = "pool", policy: str = "bulk", **settings: int,
    ) -> None:  # fmt: skip
        number = next(_numbers)
        if there is None:
            there = here if isinstance(here, str) else type(here)()
        self.here = Engine(f"here-{number}", provider=here, store=store, policy=policy, **{**SMALL, **settings})
        self.there = Engine(f"there-{number}", provider=there, **SMALL)
        self.peer = self.there.name
        self.source, self.target = random_bytes(arena, number), np.zeros(arena, np.uint8)
        self.local = self.here.register(self.source)
        self.remote = self.there.register(self.target)

    @property
    def state(self) -> State:
        return self.here._state

    def write(self, offset: Any = 0, to: Any = None, length: Any = 64, **options: Any) -> Any:
        """Write by offsets into the arenas; to the same offset unless said otherwise."""
        to = offset if to is None else to
        return self.here.write(self.peer, self.local.address + offset, self.remote.address + to, length, **options)

    def read(self, offset: Any = 0, to: Any = None, length: Any = 64, **options: Any) -> Any:
        """Read by offsets: from the remote arena at `offset` into the local one at `to`."""
        to = offset if to is None else to
        return self.here.read(self.peer, self.remote.address + offset, self.local.address + to, length, **options)

    def scattered(self, n: int, length: int = 64, **options: Any) -> Any:
        """A batch of exactly n slices."""
        return self.write(np.arange(n, dtype=np.int64) * (length + 1), length=length, **options)

    def close(self) -> None:
        for engine in (self.here, self.there):
            if isinstance(engine.provider, Gated):
                engine.provider.open_gate()
        self.here.close()
        self.there.close()


def unchanged(pair: Pair):
    """What a refused call must leave as it was."""
    stats = pair.here.stats()
    timing = {kind.name.lower() for kind in TIMING_KINDS}
    counts = {kind: n for kind, n in stats.counts.items() if kind not in timing}
    return counts, stats.free_slices, stats.open_batches, pair.state.regions.ranges(), pair.target.tobytes()


def batch_field(engine: Engine, batch: Batch, field: str) -> int:
    """A field of an open batch's row."""
    return int(engine._state.batch_rows[batch._handle & 0xFFFFFFFF][field])


def leaked_slots(engine: Engine) -> int:
    return int(engine._state.shared["leaked_count"]) * CHUNK_SLICES


def assert_balanced(engine: Engine) -> Stats:
    """Everything that was taken came back, and every count has its counterpart. The engine must be at rest."""
    stats, settings = engine.stats(), engine._settings
    c = stats.counts
    assert stats.open_batches == 0
    assert stats.free_slices + leaked_slots(engine) == stats.capacity_slices
    assert c["stale"] == 0
    assert c["slices_filled"] == c["completed"] + c["failed"]
    assert c["slices_freed"] + c["slices_dropped"] + c["slices_leaked"] == c["slices_filled"]
    rows = assert_at_rest(engine._state, *credits_of(engine))
    if all(row.pair.gathers == 1 and not row.pair.breaks for row in rows):
        if all(row.row["signal"] == 1 for row in rows):
            assert c["completions"] == c["work_requests"]  # each answered once
        assert c["completed"] + c["retried"] + c["failed"] >= c["completions"]  # the rest failed unposted
    assert c["batches_submitted"] == c["batches_finished"] == c["batches_closed"]
    if settings.store == enums.Store.HEAP:
        made = c["heap_allocated"] + c["heap_reused"]
        assert made == c["slices_filled"]
        assert made == c["heap_freed"] + c["heap_cached"] + c["slices_leaked"]
    else:
        assert c["heap_allocated"] == c["heap_reused"] == c["heap_freed"] == c["heap_cached"] == 0
    assert_free_list_whole(engine._state, leaked_slots(engine) // CHUNK_SLICES)
    return stats


def credits_of(engine: Engine) -> set[int]:
    """Credits of completion queues that nothing is in flight on: software's, or as many as NICs have."""
    real = {cq.capacity for own in getattr(engine.provider, "cqs", ()) for cq in own}
    return {CompletionQueue(0).entries} | real


def assert_at_rest(state: State, *entries: int) -> list[QueueRow]:
    """Nothing is in flight on any queue pair, held or to be posted again, all credits are back; returns the rows.

    `entries`: what completion queues hold, where they are not software's.
    """
    rows = [row for rows in state.queues.values() for row in rows]
    for row in rows:
        assert row.row["head"] == row.row["tail"]
        assert row.row["loose"] == 0
        assert row.state in (QueueState.READY, QueueState.CLOSED, QueueState.PROBING)
    for row in state.worker_rows:
        for field in ("outstanding", "queued", "notes", "undecided"):
            assert row[field] == 0
        assert row["retry"]["first"] == -1
        polled = next(a for a in state.arrays if a.size and address_of(a) == row["cqs"])
        assert set(polled["credits"]) <= ({*entries} or {CompletionQueue(0).entries})
    return rows


def free_chunks(state: State) -> list[int]:
    """The pool's free list, top first."""
    return _walk(state.chunk_next, (int(state.shared["free_chunks"]) & 0xFFFFFF) - 1)


def _walk(links: np.ndarray, first: int) -> list[int]:
    chunks: list[int] = []
    while first >= 0:
        chunks.append(first)
        assert len(chunks) <= len(links), "the list has a cycle"
        first = int(links[first])
    return chunks


def assert_free_list_whole(state: State, missing: int = 0) -> None:
    """Each free chunk is in the list once. (Chunks in a thread's cache or leaked are not in it.)"""
    chunks = free_chunks(state)
    assert len(set(chunks)) == len(chunks) == int(state.shared["free_count"])
    assert len(chunks) + missing <= state.settings.chunks


# ------------------------------------------------------------------------------ the rig
class Rig:
    """One engine's state without threads: the test turns the worker by hand, in virtual time that costs nothing.

    Regions are made up: nothing here follows an address, unless the rig gets a provider that moves bytes. An emulated
    NIC goes by the worker's clock.
    """

    BASE, SPAN = 1 << 40, 1 << 30

    def __init__(self, provider: Any = None, *, bare: bool = False, **settings: Any) -> None:
        settings = {"slices": 2048, "batches": 8, "peers": 2, **settings}
        self.state = State(Settings(**settings), virtual=True)
        self._zeros = np.zeros(len(Kind), np.int64)
        self.caller, self.worker = self._block(-1), self._block(0)
        self.provider = provider or Gated()
        self.worker.row["next_completion"] = never.address
        if isinstance(self.provider, emulated.Emulated):
            self.provider.clocks = [self.worker.row.where("now")]
            self.worker.row["next_completion"] = nic.next_completion.address
        (queues,) = self.provider.open(1, self.state.settings.queue_depth, np.zeros(0, np.int64))
        self.queues = queues
        self.state.poll_from(0, queues)
        self.worker.row["horizon"] = (1 << 62) - 2
        self.remote = RegionTable("the peer")
        peer = Descriptor("peer", 1, "", self.provider.name, (), self.provider.describe())
        self.rows = self.state.connect(0, self.remote, self.provider.connect(peer, HERE))
        if not bare:
            self.arena = np.zeros(1 << 16, np.uint8)
            base = self.arena.ctypes.data
            access = enums.Access.WRITE | enums.Access.READ | enums.Access.HELD
            keys = self.provider.register(base, 1 << 16, access)
            self.state.regions.add(base, 1 << 16, keys.lkeys, 7)
            self.remote.add(base, 1 << 16, keys.rkeys, 3)

    def _block(self, actor: int) -> Block:
        block = Block(self.state, actor)
        block.row["cost_fixed"] = block.row["cost_each"] = address_of(self._zeros)
        return block

    @property
    def ctl(self) -> int:
        return self.caller.ctl

    def row(self, slot: int) -> int:
        """Address of a batch row."""
        return address_of(self.state.batch_rows) + slot * BATCH.itemsize

    def batch(self, handle: int) -> Any:
        """The row of a batch."""
        return self.state.batch_rows[handle & 0xFFFFFFFF]

    def array(self, field: str) -> np.ndarray:
        """The state array whose address the control block holds in `field`."""
        return next(a for a in self.state.arrays if a.size and address_of(a) == self.state.template[field])

    def submit(self, slices: int, length: int = 8) -> int:
        """A sealed batch of so many slices within the arena, or minus a Status."""
        offsets = self.arena.ctypes.data + np.arange(slices, dtype=np.int64) % 4096 * 16
        # A slice onto itself: nothing is adjacent, and loopback's copy changes nothing.
        return int(submit(self.ctl, 0, Opcode.WRITE, 0, offsets, offsets, np.full(slices, length, np.int64)))

    def requests(self, source: Any, target: Any, length: Any, opcode: int = Opcode.WRITE) -> int:
        """An open batch of requests at made-up addresses, or minus a Status."""
        operands = [np.atleast_1d(np.asarray(o, np.int64)) for o in (source, target, length)]
        return int(prepare(self.ctl, 0, opcode, 0, *operands))

    def publish(self, handle: int) -> int:
        return int(publish(self.ctl, handle))

    def turn(self) -> int:
        """Run the worker until it has nothing to do; returns the last reason."""
        why = pump.Pump.FINISHED
        while why == pump.Pump.FINISHED:
            why = pump.pump(self.worker.ctl)
        return int(why)

    @property
    def counts(self) -> dict[str, int]:
        return enums.words_of(Kind, self.caller.counters + self.worker.counters)

    def snapshot(self) -> list[np.ndarray]:
        """A copy of all that a call could change, counters included."""
        tables = [self.state.regions, self.remote]
        columns = [c for t in tables for c in (t.header.array, t.bases, t.ends, t.slots, t.keys, t.access)]
        counters = [self.caller.counters, self.worker.counters]
        return [a.copy() for a in (*self.state.arrays, *self.state.rings, *columns, *counters)]


def assert_same(before: list[np.ndarray], after: list[np.ndarray]) -> None:
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
