"""Allocates an engine's memory as `layout` describes it, and makes control blocks for its actors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from mooncache import limits
from mooncache.errors import CapacityError, UsageError
from mooncache.kernels import layout, regions
from mooncache.kernels.layout import WORD, Kind, Policy, Store, aligned
from mooncache.kernels.ring import new_ring
from mooncache.kernels.verbs import SEND_SIGNALED, SEND_WR, SGE_BYTES, WC_BYTES, WR_BYTES

_libc = ctypes.CDLL(None)


def function_address(name: str) -> int:
    """Address of a libc function; kernels call it by that, which keeps them cacheable."""
    return int(ctypes.cast(getattr(_libc, name), ctypes.c_void_p).value or 0)


def address_of(array: np.ndarray) -> int:
    """Address of an array's first byte; a third of the cost of `array.ctypes.data`."""
    return int(array.__array_interface__["data"][0])


@dataclass(frozen=True)
class Settings:
    """What an engine is made with. Capacities default to the sums in `limits`; times are ns."""

    store: Store = Store.POOL
    policy: Policy = Policy.BULK
    workers: int = 1
    slices: int = limits.POOL_SLICES  # rounded up to whole chunks of 256
    batches: int = limits.BATCHES
    peers: int = limits.PEERS
    slice_bytes: int = limits.SLICE_BYTES
    queue_depth: int = limits.QUEUE_DEPTH
    chain: int = limits.CHAIN
    poll_lot: int = limits.POLL_LOT
    retries: int = limits.RETRIES
    cache_slices: int = limits.CACHE_SLICES
    reaper_lot: int = limits.REAPER_LOT
    reaper_period_ns: int = limits.REAPER_PERIOD_NS
    spin_ns: int = limits.SPIN_NS

    def __post_init__(self) -> None:
        upper = {
            "workers": limits.WORKERS,
            "slices": limits.SLICES_MAX,
            "batches": 1 << 20,
            "peers": 1 << 15,
            "slice_bytes": 1 << 30,
            "queue_depth": 1 << 16,
            "chain": 1 << 12,
            "poll_lot": 1 << 12,
            "retries": 100,
            "cache_slices": 1 << 24,
            "reaper_lot": limits.SLICES_MAX,
            "reaper_period_ns": 10**12,
            "spin_ns": 10**12,
        }
        for name, most in upper.items():
            value = getattr(self, name)
            least = 0 if name in ("retries", "cache_slices", "spin_ns") else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UsageError(f"{name} must be an integer from {least} to {most}, got {value!r}")

    @property
    def chunks(self) -> int:
        """Chunks of the pool."""
        return -(-self.slices // limits.CHUNK_SLICES)

    @property
    def chain_length(self) -> int:
        """Work requests behind one doorbell; at most half the queue, so that posting never leaves it empty."""
        return max(1, min(self.chain, self.queue_depth // 2))


class RegionTable:
    """Registered ranges of one engine, sorted by address; see `kernels/regions.py`. Changed by one thread at a time."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.header = aligned(layout.TABLE_WORDS)
        self.bases, self.ends, self.slots, self.keys, self.access = np.zeros((5, limits.REGIONS), np.int64)
        for field, column in (
            (layout.TABLE_BASES, self.bases),
            (layout.TABLE_ENDS, self.ends),
            (layout.TABLE_SLOTS, self.slots),
            (layout.TABLE_KEYS, self.keys),
            (layout.TABLE_ACCESS, self.access),
        ):
            self.header[field] = address_of(column)
        self._free = list(range(limits.REGIONS - 1, -1, -1))

    def __len__(self) -> int:
        return int(self.header[layout.TABLE_COUNT])

    @property
    def gone(self) -> int:
        """Address of the word that says that the connection to the peer with this table is broken."""
        return address_of(self.header) + layout.TABLE_GONE * WORD

    def overlapping(self, address: int, length: int) -> tuple[int, int] | None:
        """The first registered (address, length) that overlaps the range, if any."""
        n = len(self)
        at = int(np.searchsorted(self.ends[:n], address, side="right"))
        if at < n and self.bases[at] < address + length:
            return int(self.bases[at]), int(self.ends[at] - self.bases[at])
        return None

    def add(self, address: int, length: int, key: int, access: int) -> int:
        """Enter a range; returns its slot, which stays the same until `remove`."""
        taken = self.overlapping(address, length)
        if taken is not None:
            raise UsageError(
                f"{self.owner}: the range [{address:#x}, +{length}) overlaps the registered region "
                f"[{taken[0]:#x}, +{taken[1]}); register each byte once"
            )
        if not self._free:
            raise CapacityError(f"{self.owner}: all {limits.REGIONS} regions are in use; unregister some first")
        n, slot = len(self), self._free.pop()
        self.keys[slot], self.access[slot] = key, access
        at = int(np.searchsorted(self.bases[:n], address))
        regions.insert(address_of(self.header), at, address, address + length, slot)
        return slot

    def position(self, slot: int) -> int:
        """Where in the table the range with this slot stands."""
        return int(np.flatnonzero(self.slots[: len(self)] == slot)[0])

    def remove(self, slot: int) -> None:
        """Forget a range. Its slot may be given to another at once."""
        regions.remove(address_of(self.header), self.position(slot))
        self.recycle(slot)

    def recycle(self, slot: int) -> None:
        """Let another range have the slot of one that is no longer in the table."""
        self._free.append(slot)

    def ranges(self) -> list[tuple[int, int, int]]:
        """(address, length, slot) of each region, ascending."""
        n = len(self)
        return [
            (int(base), int(end - base), int(slot))
            for base, end, slot in zip(self.bases[:n], self.ends[:n], self.slots[:n], strict=True)
        ]


class Block:
    """One actor's control block: `ctl` is its address. Keeps the actor's own arrays alive."""

    def __init__(self, state: State, actor: int = -1) -> None:
        self.words = aligned(layout.BLOCK_WORDS)
        self.words[:] = state.template
        self.ctl = address_of(self.words)
        self.counters = aligned(len(Kind))
        self.spent = aligned(len(Kind))
        self.words[layout.ACTOR] = actor
        self.words[layout.COUNTERS] = address_of(self.counters)
        self.words[layout.SPENT] = address_of(self.spent)
        self.words[layout.CACHE_FIRST] = -1
        self.cache = np.zeros(state.settings.cache_slices, np.int64)
        self.words[layout.CACHE_OBJECTS] = address_of(self.cache)
        if actor >= 0:
            self._prepare_work_requests(state.settings)
            state.worker_rows[actor, layout.WORKER_CTL] = self.ctl

    def _prepare_work_requests(self, settings: Settings) -> None:
        chain = settings.chain_length
        self.work_requests = np.zeros(chain, SEND_WR)
        self.gathers = aligned(chain * SGE_BYTES // WORD)
        self.completions = aligned(settings.poll_lot * WC_BYTES // WORD)
        self.run = aligned(settings.poll_lot)
        first_wr, first_sge = address_of(self.work_requests), address_of(self.gathers)
        wr = self.work_requests
        wr["next"] = first_wr + WR_BYTES * np.arange(1, chain + 1)
        wr["next"][-1] = 0
        wr["sg_list"] = first_sge + SGE_BYTES * np.arange(chain)
        wr["num_sge"] = 1
        wr["send_flags"] = SEND_SIGNALED
        for field, array in (
            (layout.WORK_REQUESTS, self.work_requests),
            (layout.GATHERS, self.gathers),
            (layout.COMPLETIONS, self.completions),
            (layout.RUN, self.run),
        ):
            self.words[field] = address_of(array)


class State:
    """All memory of one engine, and the template of its control blocks."""

    def __init__(self, settings: Settings, *, virtual: bool = False, event_fd: int = -1) -> None:
        self.settings = settings
        chunks, slots = settings.chunks, settings.chunks * limits.CHUNK_SLICES
        self.template = np.zeros(layout.BLOCK_WORDS, np.int64)
        self.arrays: list[np.ndarray] = []
        for field, dtype in (
            (layout.SLICE_SOURCE, np.int64),
            (layout.SLICE_TARGET, np.int64),
            (layout.SLICE_LENGTH, np.int32),
            (layout.SLICE_FIRST, np.int32),
            (layout.SLICE_LAST, np.int32),
            (layout.SLICE_LOCAL, np.int16),
            (layout.SLICE_REMOTE, np.int16),
            (layout.SLICE_STATE, np.int16),
            (layout.SLICE_ATTEMPTS, np.int8),
        ):
            self._hold(field, np.zeros(slots, dtype))
        self._hold(layout.SLICE_OBJECT, np.zeros(slots if settings.store == Store.HEAP else 0, np.int64))
        self.chunk_next = self._hold(layout.CHUNK_NEXT, np.arange(1, chunks + 1, dtype=np.int64))
        self.chunk_next[-1] = -1
        for field in (
            layout.CHUNK_PREVIOUS,
            layout.CHUNK_BATCH,
            layout.CHUNK_GENERATION,
            layout.CHUNK_SLICES,
            layout.CHUNK_LIVE,
        ):
            self._hold(field, np.zeros(chunks, np.int64))
        self.batch_rows = self._hold(layout.BATCH_ROWS, aligned(settings.batches * layout.BATCH_WORDS)).reshape(
            settings.batches, layout.BATCH_WORDS
        )
        link = self._hold(layout.BATCH_LINK, np.arange(1, settings.batches + 1, dtype=np.int64))
        link[-1] = -1
        self.peer_tables = self._hold(layout.PEER_TABLES, np.zeros(settings.peers, np.int64))
        self.endpoint_rows = self._hold(
            layout.ENDPOINT_ROWS, aligned(settings.workers * settings.peers * layout.ENDPOINT_WORDS)
        ).reshape(settings.workers, settings.peers, layout.ENDPOINT_WORDS)
        self.endpoint_rows[:, :, layout.ENDPOINT_FIRST] = -1
        self.endpoint_rows[:, :, layout.ENDPOINT_LAST] = -1
        self.endpoint_rows[:, :, [layout.ENDPOINT_NOTE_FIRST, layout.ENDPOINT_NOTE_LAST]] = -1
        self._hold(layout.NOTES, np.zeros(settings.batches * limits.NOTE_BYTES, np.uint8))
        self.worker_rows = self._hold(layout.WORKER_ROWS, aligned(settings.workers * layout.WORKER_WORDS)).reshape(
            settings.workers, layout.WORKER_WORDS
        )
        self.worker_rows[:, layout.WORKER_EPOCH] = layout.EPOCH_QUIET
        self.worker_rows[:, [layout.WORKER_EPOLL, layout.WORKER_BELL_FD]] = -1
        self.rings: list[np.ndarray] = []
        for row in self.worker_rows:
            submissions = new_ring(3 * settings.batches)  # each batch once, once more to cancel it, once to detach it
            retries = new_ring(settings.queue_depth * settings.peers)  # everything outstanding may come back
            self.rings += [submissions, retries]
            row[layout.WORKER_RING], row[layout.WORKER_RETRY_RING] = address_of(submissions), address_of(retries)
        self._hold(layout.RETIRED_RING, new_ring(settings.batches))
        self.shared = self._hold(layout.SHARED, aligned(layout.SHARED_WORDS))
        self.shared[layout.SHARED_FREE_CHUNKS] = 1
        self.shared[layout.SHARED_FREE_BATCHES] = 1
        self.shared[layout.SHARED_FREE_COUNT] = chunks
        self.shared[layout.SHARED_LOW] = chunks
        self.regions = RegionTable("this engine")
        self.template[layout.LOCAL_TABLE] = address_of(self.regions.header)
        self._set_scalars(virtual, event_fd)

    def _hold(self, field: int, array: np.ndarray) -> np.ndarray:
        """Keep an array alive and note its address in the template."""
        self.arrays.append(array)
        self.template[field] = address_of(array)
        return array

    def _set_scalars(self, virtual: bool, event_fd: int) -> None:
        s, t = self.settings, self.template
        for field, value in (
            (layout.CAPACITY, s.chunks * limits.CHUNK_SLICES),
            (layout.CHUNKS, s.chunks),
            (layout.BATCHES, s.batches),
            (layout.PEERS, s.peers),
            (layout.WORKERS, s.workers),
            (layout.STORE, s.store),
            (layout.POLICY, s.policy),
            (layout.SLICE_BYTES, s.slice_bytes),
            (layout.TAIL_BYTES, s.slice_bytes // 4),
            (layout.QUEUE_DEPTH, s.queue_depth),
            (layout.CHAIN, s.chain_length),
            (layout.POLL_LOT, s.poll_lot),
            (layout.RETRIES, s.retries),
            (layout.CACHE_SLICES, s.cache_slices),
            (layout.REAPER_LOT, s.reaper_lot),
            (layout.REAPER_PERIOD, s.reaper_period_ns),
            (layout.SPIN, s.spin_ns),
            (layout.EVENT_FD, event_fd),
            (layout.VIRTUAL, virtual),
            (layout.CLOCK_GETTIME, function_address("clock_gettime")),
            (layout.SYSCALL, function_address("syscall")),
            (layout.WRITE, function_address("write")),
            (layout.MALLOC, 0 if virtual else function_address("malloc")),
            (layout.FREE, 0 if virtual else function_address("free")),
        ):
            t[field] = value

    def connect(self, peer: int, table: RegionTable, queue_pairs: list[int]) -> None:
        """Enter a peer: its region table, and one queue pair a worker. The table must outlive the engine."""
        self.peer_tables[peer] = address_of(table.header)
        self.endpoint_rows[:, peer, layout.ENDPOINT_QP] = queue_pairs

    @property
    def free_slices(self) -> int:
        """Slots in the free list."""
        return int(self.shared[layout.SHARED_FREE_COUNT]) * limits.CHUNK_SLICES

    @property
    def high_water_slices(self) -> int:
        """Most slots ever in use at once, in whole chunks."""
        return (self.settings.chunks - int(self.shared[layout.SHARED_LOW])) * limits.CHUNK_SLICES
