"""The engine: what serving code holds. Composes state, kernels, worker threads and a provider."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from time import monotonic_ns
from types import TracebackType
from typing import Any

import numpy as np

from mooncache.batch import Batch
from mooncache.errors import CapacityError, EngineClosed, Status, TransportError, UsageError
from mooncache.kernels import calls, jit, layout, pump, submit
from mooncache.kernels.layout import Access, Kind, Opcode, Policy, Store, words_of
from mooncache.kernels.split import REQUESTS
from mooncache.kernels.state import Block, RegionTable, Settings, State
from mooncache.memory import ACCESS, Range, Region, range_of
from mooncache.providers.base import Descriptor, Provider, RemoteRegion
from mooncache.providers.emulated import Emulated
from mooncache.providers.loopback import Loopback

log = logging.getLogger("mooncache")

PROVIDERS: dict[str, type[Provider]] = {"loopback": Loopback, "emulated": Emulated}
JOIN_SECONDS = 5.0
Operand = int | np.integer[Any] | np.ndarray

_engines: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_directory_lock = threading.Lock()


@dataclass(frozen=True)
class Stats:
    """A consistent-enough look at an engine: each figure is exact, but they are read one after another.

    Attributes:
        counts: work done since the engine opened, by kind (`layout.Kind`, lower case).
        capacity_slices, free_slices: slots of the pool; a batch holds whole chunks of 256.
        high_water_slices: most slots ever in use at once.
        open_batches: batches that hold a row: running, done and not closed, detached, or waiting for the reaper.
        worker_busy_s: seconds each worker had something to do.
        worker_freeing_s: of those, seconds each spent freeing slices.
        caller_freeing_s, reaper_freeing_s: seconds callers and the reaper spent freeing slices.
    """

    counts: dict[str, int]
    capacity_slices: int
    free_slices: int
    high_water_slices: int
    open_batches: int
    worker_busy_s: tuple[float, ...]
    worker_freeing_s: tuple[float, ...]
    caller_freeing_s: float
    reaper_freeing_s: float


class Peer:
    """An engine this one is connected to. `table` mirrors what it has registered."""

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name = index, name
        self.table = RegionTable(f"peer {name!r}")
        self._known: dict[RemoteRegion, int] = {}

    def refresh(self, regions: Iterable[RemoteRegion]) -> None:
        """Bring the table up to date with what the peer says it has registered."""
        now = set(regions)
        for gone in [region for region in self._known if region not in now]:
            self.table.remove(self._known.pop(gone))
        for region in now - self._known.keys():
            self._known[region] = self.table.add(*region)

    def __repr__(self) -> str:
        return f"<Peer {self.name!r}, {len(self.table)} regions>"


class Engine:
    """Moves ranges of registered memory to and from peers.

    Args:
        name: how peers call it; must be unique in the process. Default: "engine-<n>".
        provider: "loopback", "emulated", or a `Provider` of your own making, not opened yet.
        store: "pool" (struct of arrays) or "heap" (one malloc'ed object a slice, for comparison).
        policy: where finished slices are deleted: leak, inline, on_close, thread_cache, deferred, epoch or bulk.
        settings: capacities and limits, see `kernels.state.Settings`: workers, slices, batches, slice_bytes,
            queue_depth, chain, poll_lot, retries, cache_slices, reaper_lot, reaper_period_ns, spin_ns.

    All methods may be called from any thread. Raises UsageError for a setting out of range or a name in use.
    """

    def __init__(
        self, name: str | None = None, *, provider: str | Provider = "loopback", store: str = "pool",
        policy: str = "bulk", **settings: int,
    ) -> None:  # fmt: skip
        self._settings = _settings(store, policy, settings)
        self.provider = _provider(provider)
        self.closed = False
        self._lock = threading.RLock()
        self.regions: dict[int, Region] = {}
        self._peers: dict[str, Peer] = {}
        self._awaiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = {}
        self._loops: set[asyncio.AbstractEventLoop] = set()
        self._blocks: dict[int, Block] = {}
        self._local = threading.local()
        with ExitStack() as undo:  # if anything below fails, what stands above it is given back
            self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, self._event_fd)
            self._state = State(self._settings, event_fd=self._event_fd)
            self._workers = [Block(self._state, i) for i in range(self._settings.workers)]
            self._reaper = Block(self._state)
            queues = self.provider.open(self._settings.workers, self._settings.queue_depth)
            undo.callback(self.provider.close)
            self._state.worker_rows[:, layout.WORKER_CQ] = queues
            jit.prewarm()
            self.name = self._enter_directory(name)
            undo.pop_all()
        self._threads = self._start_threads()

    def _enter_directory(self, name: str | None) -> str:
        with _directory_lock:
            if name is None:
                n = 0
                while f"engine-{n}" in _engines:
                    n += 1
                name = f"engine-{n}"
            if name in _engines:
                raise UsageError(f"an engine named {name!r} is open in this process; names must be unique")
            _engines[name] = self
        return name

    def _start_threads(self) -> list[threading.Thread]:
        # The threads hold the blocks, not the engine: one that is forgotten can be collected, which closes it.
        threads = [
            threading.Thread(target=pump.pump, args=(b.ctl,), name=f"{self.name}-worker-{i}", daemon=True)
            for i, b in enumerate(self._workers)
        ]
        if self._settings.policy == Policy.DEFERRED:
            args = (self._reaper.ctl,)
            threads.append(threading.Thread(target=pump.reaper, args=args, name=f"{self.name}-reaper", daemon=True))
        for thread in threads:
            thread.start()
        return threads

    # ------------------------------------------------------------------------------ who calls
    @property
    def ctl(self) -> int:
        """Address of the calling thread's control block."""
        try:
            return self._local.ctl  # type: ignore[no-any-return]
        except AttributeError:
            self._local.ctl = self._block_of_thread().ctl
            return self._local.ctl  # type: ignore[no-any-return]

    def _block_of_thread(self) -> Block:
        """A block for a thread that calls for the first time; blocks of threads that ended are used again."""
        with self._lock:
            own = threading.current_thread().ident or 0  # also makes a thread that Python did not start known below
            alive = {thread.ident for thread in threading.enumerate()}
            # A new thread may have the number of one that ended.
            ended = own if own in self._blocks else next((i for i in self._blocks if i not in alive), None)
            block = Block(self._state) if ended is None else self._blocks.pop(ended)
            self._blocks[own] = block
            return block

    # ------------------------------------------------------------------------------ memory
    def register(self, buffer: Any, *, access: str = "both") -> Region:
        """Let transfers use a buffer, and peers reach it.

        Args:
            buffer: a contiguous NumPy array, torch tensor, DLPack object, writable or read-only buffer, or
                `(address, length)`. It is kept alive until `Region.unregister` (a pair: by the caller).
            access: what peers may do: "read", "write" or "both". Read-only memory takes "read" only.

        Raises:
            UsageError: not such a buffer, empty, overlapping a registered region, or read-only with write access.
            CapacityError: too many regions. EngineClosed: the engine is closed.
        """
        self._check_open()
        if access not in ACCESS:
            raise UsageError(f"access must be one of {', '.join(map(repr, ACCESS))}, got {access!r}")
        memory = range_of(buffer)
        if not memory.writable and access != "read":
            raise UsageError(f"this {type(buffer).__name__} is read-only; register it with access='read'")
        with self._lock:
            return self._register(memory, access)

    def _register(self, memory: Range, access: str) -> Region:
        own = Access.LOCAL if memory.writable else 0
        slot = self._state.regions.add(memory.address, memory.length, 0, ACCESS[access] | own)
        try:
            keys = self.provider.register(memory.address, memory.length, ACCESS[access])
        except BaseException:
            self._state.regions.remove(slot)
            raise
        self._state.regions.keys[slot] = keys.lkey
        region = self.regions[slot] = Region(self, memory, access, slot, keys)
        return region

    def unregister(self, region: Region) -> None:
        """What `Region.unregister` does."""
        with self._lock:
            if not region.registered:
                raise UsageError(f"{region!r} is not registered with engine {self.name!r}")
            table = self._state.regions
            busy = calls.withdraw(self.ctl, region._slot, table.position(region._slot))
            if busy:
                raise UsageError(f"{region!r} is in use by {busy} slices; wait for their batches, then unregister it")
            del self.regions[region._slot]
            self.provider.unregister(region._keys)
            table.recycle(region._slot)

    # ------------------------------------------------------------------------------ peers
    def describe(self) -> Descriptor:
        """What peers are told: name, provider, registered regions, and what the provider needs to connect."""
        with self._lock:
            regions = tuple(
                RemoteRegion(r.address, r.length, r._keys.rkey, ACCESS[r.access]) for r in self.regions.values()
            )
            return Descriptor(self.name, self.provider.name, regions, self.provider.describe())

    def connect(self, name: str) -> Peer:
        """Connect to the engine called `name`; the same peer every time. `write` and `read` do this by themselves.

        Raises:
            TransportError: no such engine, or one with another provider. CapacityError: too many peers.
        """
        self._check_open()
        if name in self._peers:
            return self._peers[name]
        # This takes the peer's lock, so never while holding one's own: it may be connecting to us.
        described = self._look_up(name)
        with self._lock:
            peer = self._peers.get(name)
            if peer is None:
                if len(self._peers) >= self._settings.peers:
                    raise CapacityError(f"engine {self.name!r} has {self._settings.peers} peers, as many as it may")
                peer = Peer(len(self._peers), name)
                peer.refresh(described.regions)
                self._state.connect(peer.index, peer.table, self.provider.connect(described))
                self._peers[name] = peer
            return peer

    def _look_up(self, name: str) -> Descriptor:
        engine = _engines.get(name)
        if engine is None or engine.closed:
            known = ", ".join(sorted(n for n, e in _engines.items() if not e.closed)) or "none"
            raise TransportError(f"no engine named {name!r} in this process; there are: {known}")
        described = engine.describe()
        if described.provider != self.provider.name:
            raise TransportError(
                f"peer {name!r} uses provider {described.provider!r}, this engine {self.provider.name!r}; "
                "both ends need the same"
            )
        return described

    def refresh(self, name: str) -> None:
        """Look at a peer's regions again, since it refused one that this engine believed in. No error if it is gone."""
        with suppress(TransportError):
            regions = self._look_up(name).regions
            with self._lock:
                self._peers[name].refresh(regions)

    # ------------------------------------------------------------------------------ transfers
    def write(
        self, peer: str | Peer, source: Operand, target: Operand, length: Operand, *, timeout: float | None = None
    ) -> Batch:
        """Copy local ranges to a peer, one request per index.

        Args:
            peer: its name, or what `connect` returned.
            source: local addresses, int64[n] C-contiguous, or one integer that holds for all.
            target: addresses at the peer, likewise.
            length: bytes, each at least 1, likewise.
            timeout: seconds, for the whole batch: until then slots are waited for if too few are free, and slices
                are posted; afterwards unposted ones fail as TIMED_OUT. None: no limit.

        Returns a running `Batch`, or a finished one when n is 0. The arrays may be reused at once; the ranges belong
        to the transfer until `Batch.quiesced`.

        Raises (nothing is submitted then):
            UsageError: unequal sizes, wrong dtype, a length that is not positive, a byte that is not registered.
            CapacityError: more slices than the pool can hold, or too few free before the timeout.
            TransportError: the peer is unknown. EngineClosed: the engine is closed.
        """
        return self._submit(Opcode.WRITE, peer, source, target, length, timeout)

    def read(
        self, peer: str | Peer, source: Operand, target: Operand, length: Operand, *, timeout: float | None = None
    ) -> Batch:
        """Copy a peer's ranges here: `source` are addresses at the peer, `target` local ones. Else like `write`."""
        return self._submit(Opcode.READ, peer, target, source, length, timeout)

    def _submit(
        self, opcode: Opcode, peer: str | Peer, local: Operand, remote: Operand, length: Operand, timeout: float | None
    ) -> Batch:
        """`local` and `remote` are what the kernels call source and target: a read's bytes flow the other way."""
        if self.closed:
            self._check_open()
        to = self._own(peer) if isinstance(peer, Peer) else self._peers.get(peer) or self.connect(peer)
        deadline = 0 if timeout is None else monotonic_ns() + round(timeout * 1e9)
        ctl = self.ctl
        if type(local) is int and type(remote) is int and type(length) is int:
            operands: tuple[Any, ...] = _words(local, remote, length)
            kernel, requests = submit.submit_one, 1
        else:
            arrays = _arrays(local, remote, length)
            operands, kernel, requests = arrays, submit.submit, max(a.size for a in arrays)
        handle = kernel(ctl, to.index, opcode.value, deadline, *operands)
        if handle < 0:
            handle = self._try_again(kernel, ctl, to, opcode, deadline, operands)
        return Batch(self, handle, to.name, requests)

    def _own(self, peer: Peer) -> Peer:
        if self._peers.get(peer.name) is not peer:
            raise UsageError(f"{peer!r} belongs to another engine; give its name, or what this one's connect() returns")
        return peer

    def _try_again(
        self, kernel: jit.Kernel, ctl: int, peer: Peer, opcode: Opcode, deadline: int, operands: Any
    ) -> int:
        """A submit was refused: wait for capacity, look at the peer's regions once more, or say what is wrong."""
        refreshed = False
        while True:
            self._check_open()
            bell = calls.capacity_bell(ctl)  # read before the attempt, so that what comes back meanwhile is not missed
            handle = int(kernel(ctl, peer.index, opcode.value, deadline, *operands))
            if handle >= 0:
                return handle
            status = Status(-handle)
            if status in (Status.POOL_EMPTY, Status.BATCHES_EMPTY):
                self._wait_for_capacity(ctl, status, deadline, bell)
            elif status in (Status.TARGET_NOT_REGISTERED, Status.ACCESS_DENIED) and not refreshed:
                refreshed = True
                regions = self._look_up(peer.name).regions
                with self._lock:
                    peer.refresh(regions)
            else:
                raise self._refusal(status, ctl, peer, opcode, operands)

    def _wait_for_capacity(self, ctl: int, status: Status, deadline: int, bell: int) -> None:
        left = 100_000_000 if deadline == 0 else min(100_000_000, deadline - monotonic_ns())
        if left <= 0 or self._settings.policy == Policy.LEAK:
            what = "batch rows" if status == Status.BATCHES_EMPTY else "slots"
            why = (
                "the leak policy never frees any"
                if self._settings.policy == Policy.LEAK
                else "and none came back before the timeout; close finished batches, or give the engine more"
            )
            raise CapacityError(f"too few free {what}: {self!r}, {why}")
        calls.wait_capacity(ctl, bell, left)

    def _refusal(self, status: Status, ctl: int, peer: Peer, opcode: Opcode, operands: Any) -> Exception:
        """The exception that says which request was refused, why, and what would have been right."""
        if status == Status.TOO_LARGE:
            return CapacityError(
                f"the batch needs more slices than the pool has slots ({self._settings.chunks * 256}) or more than "
                f"{REQUESTS} requests; split it, or give the engine more slices"
            )
        if status == Status.CLOSED:
            return EngineClosed(f"engine {self.name!r} is closed")
        if status == Status.HEAP_EMPTY:
            return CapacityError("malloc has no more memory for slice objects")
        index = calls.refused_request(ctl)
        local, remote, length = (
            int(o if isinstance(o, int) else o[index] if o.size > 1 else o[0]) for o in operands
        )
        where = f"request {index}"
        if status == Status.LENGTH:
            return UsageError(f"{where}: expected a length from 1 to {1 << 40} bytes, got {length}")
        here, there = ("source", "target") if opcode == Opcode.WRITE else ("target", "source")
        if status == Status.SOURCE_NOT_REGISTERED:
            return UsageError(
                f"{where}: the {here} range [{local:#x}, +{length}) is not inside this engine's registered regions: "
                f"{_nearest(self._state.regions, local)}"
            )
        if status == Status.READ_ONLY:
            return UsageError(
                f"{where}: the {here} range [{local:#x}, +{length}) is read-only memory; read into a writable buffer"
            )
        doing = "reading" if opcode == Opcode.READ else "writing"
        why = "does not permit " + doing if status == Status.ACCESS_DENIED else "has not registered all of it"
        return UsageError(
            f"{where}: the {there} range [{remote:#x}, +{length}): peer {peer.name!r} {why}: "
            f"{_nearest(peer.table, remote)}"
        )

    # ------------------------------------------------------------------------------ asyncio
    def finished(self, handle: int) -> asyncio.Future[None]:
        """A future of the running event loop that is resolved when the batch is done. `await batch` uses it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._check_open()
        with self._lock:
            self._loops = {known for known in self._loops if not known.is_closed()} | {loop}
            loop.add_reader(self._event_fd, self._announce)
        self._awaiting[id(future)] = (loop, future)
        future.add_done_callback(lambda f: self._awaiting.pop(id(f), None))
        future._mooncache_handle = handle  # type: ignore[attr-defined]
        if calls.await_finish(self.ctl, handle) != Status.NOT_FINISHED:
            future.set_result(None)
        return future

    def _announce(self) -> None:
        """The eventfd was written: resolve the futures of all batches that are done, in whichever loop they are."""
        with suppress(BlockingIOError):  # another event loop was faster
            os.eventfd_read(self._event_fd)
        for loop, future in list(self._awaiting.values()):
            handle = future._mooncache_handle  # type: ignore[attr-defined]
            if calls.status(self.ctl, handle) != Status.NOT_FINISHED and not _tell(loop, _resolve, future):
                self._awaiting.pop(id(future), None)

    def _leave(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Stop watching the eventfd, from within a loop; the last one to do so closes it, so that no loop ever watches
        another file under its number."""
        with self._lock:
            if loop is not None:
                loop.remove_reader(self._event_fd)
                self._loops.discard(loop)
            if not self._loops:
                os.close(self._event_fd)

    # ------------------------------------------------------------------------------ looking
    def stats(self) -> Stats:
        """Counters and levels; see `Stats`. Costs some microseconds and disturbs nobody."""
        with self._lock:
            callers = list(self._blocks.values())
        blocks = [*callers, *self._workers, self._reaper]
        total = sum((b.counters for b in blocks), np.zeros(len(Kind), np.int64))
        rows = self._state.batch_rows[:, layout.BATCH_STATE]
        return Stats(
            counts=words_of(Kind, total),
            capacity_slices=self._settings.chunks * 256,
            free_slices=self._state.free_slices + sum(_cached_slots(self._settings, b) for b in blocks),
            high_water_slices=self._state.high_water_slices,
            open_batches=int(np.count_nonzero(rows)),
            worker_busy_s=tuple(int(b.words[layout.TIME_BUSY]) / 1e9 for b in self._workers),
            worker_freeing_s=tuple(int(b.words[layout.TIME_FREEING]) / 1e9 for b in self._workers),
            caller_freeing_s=sum(int(b.words[layout.TIME_FREEING]) for b in callers) / 1e9,
            reaper_freeing_s=int(self._reaper.words[layout.TIME_FREEING]) / 1e9,
        )

    def __repr__(self) -> str:
        s = self._settings
        state = "closed" if self.closed else f"{self._state.free_slices} of {s.chunks * 256} slots free"
        return (
            f"<Engine {self.name!r} on {self.provider.name}, {s.store.name.lower()} + {s.policy.name.lower()}, "
            f"{len(self.regions)} regions, {len(self._peers)} peers, {state}>"
        )

    # ------------------------------------------------------------------------------ the end
    def _check_open(self) -> None:
        if self.closed:
            raise EngineClosed(f"engine {self.name!r} is closed")

    def close(self) -> None:
        """Cancel what runs, wait for the NIC's last answers, stop the workers. A second close does nothing.

        Raises TransportError when the NIC does not answer within 5 s; its buffers are then not quiesced.
        """
        with self._lock:
            if self.closed:
                return
            self.closed = True
        with _directory_lock:
            _engines.pop(self.name, None)
        calls.stop(self.ctl)
        workers, reapers = self._threads[: len(self._workers)], self._threads[len(self._workers) :]
        hanging = _join(workers, JOIN_SECONDS)
        if hanging:
            calls.abandon(self.ctl)
            _join(workers, JOIN_SECONDS / 10)
        calls.stop_reaper(self.ctl)
        _join(reapers, JOIN_SECONDS)
        for loop, future in list(self._awaiting.values()):
            _tell(loop, _resolve, future)
        if hanging:  # the NIC may still use these, and a worker that could not leave as well
            _abandoned.append((self._state, self._workers, self._reaper, self.provider, self._peers))
            raise TransportError(f"{', '.join(hanging)} still wait for the NIC; buffers in flight are not quiesced")
        self.provider.close()
        with self._lock:
            self._loops = {loop for loop in self._loops if _tell(loop, self._leave, loop)}
            if not self._loops:
                self._leave()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "closed", True) and hasattr(self, "_threads"):
            self.close()


_abandoned: list[object] = []


@atexit.register
def _close_all() -> None:
    for engine in list(_engines.values()):
        engine.close()


def _settings(store: str, policy: str, settings: dict[str, int]) -> Settings:
    known = Settings.__dataclass_fields__.keys() - {"store", "policy"}
    for name in settings:
        if name not in known:
            raise UsageError(f"unknown setting {name!r}; there are: {', '.join(sorted(known))}")
    changed: dict[str, Any] = {**settings}
    try:
        return replace(Settings(), store=Store[store.upper()], policy=Policy[policy.upper()], **changed)
    except KeyError as error:
        raise UsageError(
            f"expected a store of {[s.name.lower() for s in Store]} and a policy of "
            f"{[p.name.lower() for p in Policy]}, got {store!r} and {policy!r}"
        ) from error


def _provider(provider: str | Provider) -> Provider:
    if isinstance(provider, Provider):
        return provider
    if provider not in PROVIDERS:
        raise UsageError(f"expected a Provider or one of {', '.join(map(repr, PROVIDERS))}, got {provider!r}")
    return PROVIDERS[provider]()


def _words(*values: int) -> tuple[int, ...]:
    """Python integers that fit an int64, as they must for a kernel."""
    for value in values:
        if not -(1 << 63) <= value < 1 << 63:
            raise UsageError(f"expected addresses and lengths below 2**63, got {value}")
    return values


def _arrays(*operands: Any) -> tuple[np.ndarray, ...]:
    """The operands as int64 arrays; a single value becomes an array of one, which holds for all requests."""
    sizes = {o.size for o in operands if isinstance(o, np.ndarray)}
    if len(sizes) > 1:
        shapes = ", ".join(str(o.shape) if isinstance(o, np.ndarray) else "one value" for o in operands)
        raise UsageError(f"expected arrays of equal length, got {shapes}")
    n = sizes.pop() if sizes else 1
    arrays = []
    for operand in operands:
        if isinstance(operand, np.ndarray):
            if operand.dtype == np.uint64:
                operand = operand.view(np.int64)
            if operand.dtype != np.int64 or operand.ndim != 1 or not operand.flags.c_contiguous:
                raise UsageError(
                    f"expected an int64 array of one contiguous dimension, got {operand.dtype} of shape "
                    f"{operand.shape}; np.ascontiguousarray(x, dtype=np.int64) makes one"
                )
            arrays.append(operand)
        elif isinstance(operand, int | np.integer) and not isinstance(operand, bool):
            arrays.append(np.full(min(n, 1), _words(int(operand))[0], np.int64))
        else:
            raise UsageError(f"expected an int64 array or an integer, got {type(operand).__name__}")
    return tuple(arrays)


def _nearest(table: RegionTable, address: int) -> str:
    """The regions on either side of an address, for a message."""
    ranges = table.ranges()
    if not ranges:
        return "there are none"
    near = sorted(ranges, key=lambda r: min(abs(address - r[0]), abs(address - r[0] - r[1])))[:2]
    listed = " and ".join(f"[{base:#x}, +{length})" for base, length, _ in sorted(near))
    return f"nearest of {len(ranges)}: {listed}"


def _cached_slots(settings: Settings, block: Block) -> int:
    """Slots of chunks that a thread keeps for itself under thread_cache on the pool."""
    return int(block.words[layout.CACHE_COUNT]) if settings.store == Store.POOL else 0


def _join(threads: list[threading.Thread], seconds: float) -> list[str]:
    """Wait for threads to end, all together for so long; names of those that did not."""
    deadline = monotonic_ns() + round(seconds * 1e9)
    for thread in threads:
        thread.join(max(0.0, (deadline - monotonic_ns()) / 1e9))
    return [thread.name for thread in threads if thread.is_alive()]


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> bool:
    """Have a function called in an event loop; False when that loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
