"""Allocates an engine's memory as `layout` describes it, and makes control blocks for its actors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mooncache import limits
from mooncache.errors import CapacityError, UsageError, came
from mooncache.kernels import layout, regions
from mooncache.kernels.layout import WORD, Kind, Order, Policy, QueueState, Store, aligned, power_of_two, zeros
from mooncache.kernels.publication import publish
from mooncache.kernels.queue import INCARNATION, INDEX_SHIFT
from mooncache.kernels.ring import new_ring
from mooncache.kernels.verbs import SEND_WR, SGE_BYTES, WC_BYTES, WR_BYTES

_libc = ctypes.CDLL(None)
QUEUES_MAX = 1 << 14
"""Queue pairs of one worker, at most: their index is the uppermost part of a work request's id."""

"""A NIC's keys in a region table."""


def function_address(name: str) -> int:
    """Address of a libc function; kernels call it by that, which keeps them cacheable."""
    return int(ctypes.cast(getattr(_libc, name), ctypes.c_void_p).value or 0)


def address_of(array: np.ndarray) -> int:
    """Address of an array's first byte; a third of the cost of `array.ctypes.data`."""
    return int(array.__array_interface__["data"][0])


def put(words: np.ndarray, index: int, value: int) -> None:
    """Publish one word of contiguous int64 words: see `kernels/publication.py`."""
    publish(address_of(words) + index * WORD, int(value))


@dataclass(frozen=True)
class Settings:
    """What an engine is made with. Capacities default to the sums in `limits`; times are ns."""

    store: Store = Store.POOL
    policy: Policy = Policy.BULK
    workers: int = 1
    slices: int = limits.POOL_SLICES  # rounded up to whole chunks of 256
    batches: int = limits.BATCHES
    peers: int = limits.PEERS
    regions: int = limits.REGIONS
    notes: int = limits.INBOX_NOTES
    note_bytes: int = limits.NOTE_BYTES
    slice_bytes: int = limits.SLICE_BYTES
    queue_depth: int = limits.QUEUE_DEPTH
    chain: int = limits.CHAIN
    poll_lot: int = limits.POLL_LOT
    retries: int = limits.RETRIES
    signal: int = 0  # ask for a completion every so many work requests; 0: as the wire prefers
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
            "regions": limits.REGIONS_MOST,
            "notes": 1 << 20,
            "note_bytes": limits.NOTE_BYTES_MOST,
            "slice_bytes": 1 << 30,
            "queue_depth": 1 << 16,
            "chain": 1 << 12,
            "poll_lot": 1 << 12,
            "retries": 100,
            "signal": 1 << 12,
            "cache_slices": 1 << 24,
            "reaper_lot": limits.SLICES_MAX,
            "reaper_period_ns": 10**12,
            "spin_ns": 10**12,
        }
        for name, most in upper.items():
            value = getattr(self, name)
            least = 0 if name in ("retries", "signal", "cache_slices", "spin_ns") else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UsageError(f"{name} must be an integer from {least} to {most}, got {came(value)}")

    @property
    def chunks(self) -> int:
        """Chunks of the pool."""
        return -(-self.slices // limits.CHUNK_SLICES)

    @property
    def note_stride(self) -> int:
        """Bytes of the longest notification as it travels, whole words."""
        return limits.NOTE_HEAD_BYTES + -(-self.note_bytes // layout.WORD) * layout.WORD

    @property
    def chain_length(self) -> int:
        """Work requests behind one doorbell; at most half the queue, so that posting never leaves it empty."""
        return max(1, min(self.chain, self.queue_depth // 2))


class RegionTable:
    """Registered ranges of one engine, sorted by address; see `kernels/regions.py`. Changed by one thread at a time.

    `rows`: most ranges; a `State` takes tables of as many as its setting regions.
    """

    def __init__(self, owner: str, rows: int = limits.REGIONS) -> None:
        self.owner, self.rows = owner, rows
        self.header = aligned(layout.TABLE_WORDS)
        columns = [zeros(rows, np.int64) for _ in range(5)]
        self.bases, self.ends, self.slots, self.access, self.refused = columns
        self.keys = np.zeros((limits.NICS, rows), np.int64)
        for field, column in (
            (layout.TABLE_BASES, self.bases),
            (layout.TABLE_ENDS, self.ends),
            (layout.TABLE_SLOTS, self.slots),
            (layout.TABLE_KEYS, self.keys),
            (layout.TABLE_ACCESS, self.access),
            (layout.TABLE_REFUSED, self.refused),
        ):
            self.header[field] = address_of(column)
        self._free = list(range(rows - 1, -1, -1))

    def __len__(self) -> int:
        return int(self.header[layout.TABLE_COUNT])

    @property
    def gone(self) -> int:
        """Address of the word that says that the connection to the peer with this table is broken."""
        return address_of(self.header) + layout.TABLE_GONE * WORD

    def forgive(self) -> None:
        """The owner has said again what is registered: whatever it refused may be tried again."""
        self.refused[:] = 0
        put(self.header, layout.TABLE_REFUSALS, 0)

    def overlapping(self, address: int, length: int) -> tuple[int, int] | None:
        """The first registered (address, length) that overlaps the range, if any."""
        n = len(self)
        at = int(np.searchsorted(self.ends[:n], address, side="right"))
        if at < n and self.bases[at] < address + length:
            return int(self.bases[at]), int(self.ends[at] - self.bases[at])
        return None

    def add(self, address: int, length: int, keys: Sequence[int], access: int, slot: int | None = None) -> int:
        """Enter a range with its key for each NIC; returns its slot, which stays the same until `remove`.

        `slot`: that of a range that was taken out, whose place this one takes; by default a free one.
        """
        taken, renewed = self.overlapping(address, length), slot is not None
        if taken is not None:
            raise UsageError(
                f"{self.owner}: the range [{address:#x}, +{length}) overlaps the registered region "
                f"[{taken[0]:#x}, +{taken[1]}); register each byte once"
            )
        if slot is None:
            if not self._free:
                raise CapacityError(
                    f"{self.owner}: all {self.rows} regions are in use; unregister some first, or open the engine with "
                    "more `regions`"
                )
            slot = self._free.pop()
        n = len(self)
        self.keys[: len(keys), slot], self.access[slot] = keys, access
        put(self.refused, slot, 0)  # slices that carry the slot already are posted from here on, under these keys
        if renewed:
            put(self.header, layout.TABLE_RENEWALS, self.header[layout.TABLE_RENEWALS] + 1)
        at = int(np.searchsorted(self.bases[:n], address))
        regions.insert(address_of(self.header), at, address, address + length, slot)
        return slot

    def position(self, slot: int) -> int:
        """Where in the table the range with this slot stands."""
        return int(np.flatnonzero(self.slots[: len(self)] == slot)[0])

    @property
    def room(self) -> int:
        """How many more ranges it can take."""
        return len(self._free)

    def take_out(self, slot: int) -> None:
        """Forget a range. No other gets its slot until `recycle`, and slices that carry it are refused."""
        regions.remove(address_of(self.header), self.position(slot))
        self.refused[slot] = 1
        put(self.header, layout.TABLE_REFUSALS, 1)

    def remove(self, slot: int) -> None:
        """Forget a range. Its slot may be given to another at once."""
        self.take_out(slot)
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


class CompletionQueue(NamedTuple):
    """An `ibv_cq` by its address, and how many completions it holds."""

    address: int
    entries: int = 1 << 40  # software's do not run over


class QueuePair(NamedTuple):
    """An `ibv_qp` by its address, and what the kernels may do with it."""

    address: int
    depth: int  # most work requests in flight
    cq: int = 0  # which of the worker's completion queues reports for it
    lkeys: int = 0  # index of its NIC here: which of a region's local keys it takes
    rkeys: int = 0  # index of its NIC at the peer
    signal: int = 1  # ask for a completion every so many work requests, unless the settings say otherwise
    gathers: int = 1  # most slices in one work request
    message_bytes: int = limits.MESSAGE_BYTES  # most bytes in one
    inline: int = 0  # bytes up to which a write is copied into its work request
    weight: int = layout.WEIGHT_ONE  # share of the load, see kernels/spread.py
    breaks: bool = False  # any error breaks it; it is posted to only after an order to probe it
    notes: bool = False  # for notifications only
    cut: int = 0  # where nothing breaks it: address of a word that is set to 1 to get back what is in flight, or 0
    push: int = 0  # address of its `verbs.push`, if it has one


class QueueRow:
    """A queue pair as a worker sees it; see `layout` and kernels/queue.py for who writes what."""

    def __init__(self, state: State, worker: int, tag: int, pair: QueuePair, endpoint: int) -> None:
        self.worker, self.pair = worker, pair
        self.words = aligned(layout.QUEUE_WORDS)
        self.address = address_of(self.words)
        self._entries = aligned(power_of_two(pair.depth))
        cqs = int(state.worker_rows[worker, layout.WORKER_CQS])
        for field, value in (
            (layout.QUEUE_QP, pair.address),
            (layout.QUEUE_ENTRIES, address_of(self._entries)),
            (layout.QUEUE_MASK, len(self._entries) - 1),
            (layout.QUEUE_DEPTH, pair.depth),
            (layout.QUEUE_TAG, tag),
            (layout.QUEUE_CQ, cqs + pair.cq * layout.CQ_WORDS * WORD),
            (layout.QUEUE_LKEYS, pair.lkeys * state.settings.regions * WORD),
            (layout.QUEUE_RKEYS, pair.rkeys * state.settings.regions * WORD),
            (layout.QUEUE_SIGNAL, state.settings.signal or pair.signal),
            (layout.QUEUE_GATHERS, min(pair.gathers, pair.message_bytes // (2 * state.settings.slice_bytes))),
            (layout.QUEUE_INLINE, pair.inline),
            (layout.QUEUE_WEIGHT, pair.weight),
            (layout.QUEUE_BREAKS, pair.breaks),
            (layout.QUEUE_STATE, QueueState.CLOSED if pair.breaks else QueueState.READY),
            (layout.QUEUE_ENDPOINT, endpoint),
            (layout.QUEUE_CUT, pair.cut),
            (layout.QUEUE_PUSH, pair.push),
        ):
            self.words[field] = value

    @property
    def state(self) -> QueueState:
        """Where in its life it is, a moment ago."""
        return QueueState(int(self.words[layout.QUEUE_STATE]))

    @property
    def outstanding(self) -> int:
        """Work requests without an answer."""
        return int(self.words[layout.QUEUE_HEAD] - self.words[layout.QUEUE_TAIL])

    @property
    def at_rest(self) -> bool:
        """Whether nothing is in flight on it, and its worker has nothing to decide."""
        still = self.state in (QueueState.READY, QueueState.CLOSED) and self.words[layout.QUEUE_ORDER] == Order.NONE
        return bool(still and self.outstanding == 0)

    def leads_to(self, pair: QueuePair) -> bool:
        """Whether it describes this queue pair, or once closed can be made to: all but the address is the same."""
        same = self.pair._replace(address=pair.address) == pair
        return same and (self.pair == pair or self.state == QueueState.CLOSED)

    @property
    def cause(self) -> int:
        """`ibv_wc_status` of the error that broke it last."""
        return int(self.words[layout.QUEUE_CAUSE])


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
        self.gathers = aligned(chain * limits.SLICES_GATHERED * SGE_BYTES // WORD)
        self.completions = aligned(settings.poll_lot * WC_BYTES // WORD)
        first_wr = address_of(self.work_requests)
        wr = self.work_requests
        wr["next"] = first_wr + WR_BYTES * np.arange(1, chain + 1)
        wr["next"][-1] = 0
        for field, array in (
            (layout.WORK_REQUESTS, self.work_requests),
            (layout.GATHERS, self.gathers),
            (layout.COMPLETIONS, self.completions),
        ):
            self.words[field] = address_of(array)


class State:
    """All memory of one engine, and the template of its control blocks."""

    def __init__(self, settings: Settings, *, virtual: bool = False, event_fd: int = -1, look_fd: int = -1) -> None:
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
            (layout.SLICE_NEXT, np.int32),
        ):
            self._hold(field, zeros(slots, dtype))
        self._hold(layout.SLICE_OBJECT, zeros(slots if settings.store == Store.HEAP else 0, np.int64))
        self.chunk_next = self._hold(layout.CHUNK_NEXT, np.arange(1, chunks + 1, dtype=np.int64))
        self.chunk_next[-1] = -1
        for field in (
            layout.CHUNK_PREVIOUS,
            layout.CHUNK_BATCH,
            layout.CHUNK_GENERATION,
            layout.CHUNK_SLICES,
            layout.CHUNK_LIVE,
        ):
            self._hold(field, zeros(chunks, np.int64))
        self.batch_rows = self._hold(layout.BATCH_ROWS, aligned(settings.batches * layout.BATCH_WORDS)).reshape(
            settings.batches, layout.BATCH_WORDS
        )
        link = self._hold(layout.BATCH_LINK, np.arange(1, settings.batches + 1, dtype=np.int64))
        link[-1] = -1
        self._nobody = aligned(layout.TABLE_WORDS)  # header of a table that no submit names
        self._nobody[[layout.TABLE_GONE, layout.TABLE_PEER]] = 1, -1
        self.peer_tables = self._hold(layout.PEER_TABLES, np.full(settings.peers, address_of(self._nobody), np.int64))
        self.peer_turns = [0] * settings.peers  # how many peers each row has been given back by
        self.endpoint_rows = self._hold(
            layout.ENDPOINT_ROWS, aligned(settings.workers * settings.peers * layout.ENDPOINT_WORDS)
        ).reshape(settings.workers, settings.peers, layout.ENDPOINT_WORDS)
        self.endpoint_rows[:, :, [layout.ENDPOINT_FIRST, layout.ENDPOINT_LAST]] = -1
        self.endpoint_rows[:, :, [layout.ENDPOINT_NOTE_FIRST, layout.ENDPOINT_NOTE_LAST]] = -1
        self._hold(layout.NOTES, zeros(settings.batches * settings.note_stride, np.uint8, sparse=True))
        self.worker_rows = self._hold(layout.WORKER_ROWS, aligned(settings.workers * layout.WORKER_WORDS)).reshape(
            settings.workers, layout.WORKER_WORDS
        )
        self.worker_rows[:, layout.WORKER_EPOCH] = layout.EPOCH_QUIET
        self.worker_rows[:, [layout.WORKER_EPOLL, layout.WORKER_BELL_FD, layout.WORKER_TROUBLE_FD]] = -1
        self.worker_rows[:, layout.WORKER_SPINS] = 1
        self._left = 0  # batches that held a row when the memory of all was given back
        self.queues: dict[tuple[int, int], list[QueueRow]] = {}  # by worker and peer
        self._data: dict[tuple[int, int], np.ndarray] = {}  # likewise: addresses of the rows of those for data
        self._vacant = aligned(layout.QUEUE_WORDS)  # stands where a row was: closed, and named by nothing
        self._vacant[layout.QUEUE_TAG] = -1
        self._vacancies: list[list[int]] = [[] for _ in range(settings.workers)]  # tags for the next rows there
        self.rings: list[np.ndarray] = []
        self.queue_tables: list[np.ndarray] = []
        for row in self.worker_rows:
            submissions = new_ring(3 * settings.batches)  # each batch once, once more to cancel it, once to detach it
            self.rings.append(submissions)
            row[layout.WORKER_RING] = address_of(submissions)
            row[[layout.WORKER_RETRY_FIRST, layout.WORKER_KEPT_FIRST]] = -1
            table = aligned(min(settings.peers * limits.QUEUE_PAIRS, QUEUES_MAX))
            self.queue_tables.append(table)
            row[layout.WORKER_QUEUES] = address_of(table)
        self._hold(layout.RETIRED_RING, new_ring(settings.batches))
        self.shared = self._hold(layout.SHARED, aligned(layout.SHARED_WORDS))
        self.shared[layout.SHARED_FREE_CHUNKS] = 1
        self.shared[layout.SHARED_FREE_BATCHES] = 1
        self.shared[layout.SHARED_FREE_COUNT] = chunks
        self.shared[layout.SHARED_LOW] = chunks
        self.regions = RegionTable("this engine", settings.regions)
        self.template[layout.LOCAL_TABLE] = address_of(self.regions.header)
        self._set_scalars(virtual, event_fd, look_fd)

    def _hold(self, field: int, array: np.ndarray) -> np.ndarray:
        """Keep an array alive and note its address in the template."""
        self.arrays.append(array)
        self.template[field] = address_of(array)
        return array

    def _set_scalars(self, virtual: bool, event_fd: int, look_fd: int) -> None:
        s, t = self.settings, self.template
        for field, value in (
            (layout.CAPACITY, s.chunks * limits.CHUNK_SLICES),
            (layout.CHUNKS, s.chunks),
            (layout.BATCHES, s.batches),
            (layout.NOTE_STRIDE, s.note_stride),
            (layout.PEERS, s.peers),
            (layout.WORKERS, s.workers),
            (layout.STORE, s.store),
            (layout.POLICY, s.policy),
            (layout.SLICE_BYTES, s.slice_bytes),
            (layout.TAIL_BYTES, s.slice_bytes // 4),
            (layout.CHAIN, s.chain_length),
            (layout.POLL_LOT, s.poll_lot),
            (layout.RETRIES, s.retries),
            (layout.CACHE_SLICES, s.cache_slices),
            (layout.REAPER_LOT, s.reaper_lot),
            (layout.REAPER_PERIOD, s.reaper_period_ns),
            (layout.SPIN, s.spin_ns),
            (layout.EVENT_FD, event_fd),
            (layout.LOOK_FD, look_fd),
            (layout.VIRTUAL, virtual),
            (layout.CLOCK_GETTIME, function_address("clock_gettime")),
            (layout.SYSCALL, function_address("syscall")),
            (layout.WRITE, function_address("write")),
            (layout.MALLOC, 0 if virtual else function_address("malloc")),
            (layout.FREE, 0 if virtual else function_address("free")),
        ):
            t[field] = value

    def poll_from(self, worker: int, queues: Sequence[CompletionQueue]) -> None:
        """Let a worker take completions from these queues."""
        rows = aligned(len(queues) * layout.CQ_WORDS).reshape(-1, layout.CQ_WORDS)
        self.arrays.append(rows)
        rows[:, layout.CQ_ADDRESS] = [queue.address for queue in queues]
        rows[:, layout.CQ_CREDITS] = [queue.entries for queue in queues]
        row = self.worker_rows[worker]
        row[layout.WORKER_CQS], row[layout.WORKER_CQ_COUNT] = address_of(rows), len(queues)

    def connect(self, peer: int, table: RegionTable, queue_pairs: Sequence[Sequence[QueuePair]]) -> list[QueueRow]:
        """Enter a peer: its region table, and the queue pairs that each worker has to it; returns their rows.

        A peer that is entered again keeps its rows, which those queue pairs must fit (`fits`); those that are closed
        lead to them from now on. The table and what the addresses point to must live until `disconnect`.
        Raises CapacityError, or UsageError for slices that a device does not take, with nothing changed.
        """
        longest = min((pair.message_bytes for own in queue_pairs for pair in own if not pair.notes), default=1 << 62)
        if longest < 2 * self.settings.slice_bytes:
            raise UsageError(
                f"slice_bytes is {self.settings.slice_bytes}, so slices may have twice that, and a NIC sends at most "
                f"{longest} bytes in a message: open the engine with slice_bytes={longest // 2} or less"
            )
        new = [(worker, peer) for worker in range(len(queue_pairs)) if (worker, peer) not in self.queues]
        for worker, _ in new:
            self._check_room(worker, len(queue_pairs[worker]))
        table.header[layout.TABLE_PEER] = self.handle(peer)
        put(self.peer_tables, peer, address_of(table.header))
        rows = []
        for worker, pairs in enumerate(queue_pairs):
            known = self.queues.get((worker, peer))
            if known is None:
                known = self._enter_queues(worker, peer, pairs)
            for row, pair in zip(known, pairs, strict=True):
                row.pair = pair
                put(row.words, layout.QUEUE_QP, pair.address)
            rows += known
        return rows

    def handle(self, peer: int) -> int:
        """How submits name the peer that has a row now."""
        return self.peer_turns[peer] << layout.PEER_BITS | peer

    def fits(self, peer: int, queue_pairs: Sequence[Sequence[QueuePair]]) -> bool:
        """Whether a peer's rows, if it has any, can lead to these queue pairs."""
        known = self.rows_of(peer)
        pairs = [pair for own in queue_pairs for pair in own]
        return not known or (len(known) == len(pairs) and all(map(QueueRow.leads_to, known, pairs)))

    def rows_of(self, peer: int) -> list[QueueRow]:
        """The rows of a peer's queue pairs, worker by worker."""
        return [row for worker in range(self.settings.workers) for row in self.queues.get((worker, peer), ())]

    def take_rows(self, peer: int) -> object:
        """Take a peer's queue pairs from the workers; nothing may be under way on them.

        Returns what workers may look at until their next round: keep it until then.
        """
        kept: list[object] = []
        for worker in range(self.settings.workers):
            rows = self.queues.pop((worker, peer), [])
            for row in rows:
                tag = int(row.words[layout.QUEUE_TAG])
                index, incarnation = tag >> INDEX_SHIFT, (tag + INCARNATION) & (0xFFFF << 32)
                put(self.queue_tables[worker], index, address_of(self._vacant))
                self._vacancies[worker].append(index << INDEX_SHIFT | incarnation)
            kept += [rows, self._data.pop((worker, peer), None)]
        return kept

    def disconnect(self, peer: int) -> object:
        """`take_rows`, and whoever names the peer is refused from now on: the row may be another's by then."""
        put(self.peer_tables, peer, address_of(self._nobody))
        self.peer_turns[peer] += 1
        return self.take_rows(peer)

    def _check_room(self, worker: int, n: int) -> None:
        table, vacant = self.queue_tables[worker], self._vacancies[worker]
        used = int(self.worker_rows[worker, layout.WORKER_QUEUE_COUNT]) - len(vacant)
        if used + n > len(table):
            raise CapacityError(f"a worker has at most {len(table)} queue pairs, and {used} are in use")

    def _enter_queues(self, worker: int, peer: int, pairs: Sequence[QueuePair]) -> list[QueueRow]:
        row, table, endpoint = self.worker_rows[worker], self.queue_tables[worker], self.endpoint_rows[worker, peer]
        vacant, count = self._vacancies[worker], int(row[layout.WORKER_QUEUE_COUNT])
        tags = [vacant.pop() for _ in pairs[: len(vacant)]]
        tags += [index << INDEX_SHIFT | INCARNATION for index in range(count, count + len(pairs) - len(tags))]
        rows = [QueueRow(self, worker, tag, pair, address_of(endpoint)) for tag, pair in zip(tags, pairs, strict=True)]
        data = np.array([queue.address for queue in rows if not queue.pair.notes], np.int64)
        notes = [queue.address for queue in rows if queue.pair.notes]
        self._data[worker, peer], self.queues[worker, peer] = data, rows
        endpoint[[layout.ENDPOINT_NOTES, layout.ENDPOINT_LOST]] = notes[0] if notes else data[0], 0
        put(endpoint, layout.ENDPOINT_QUEUES, address_of(data))
        put(endpoint, layout.ENDPOINT_COUNT, len(data))
        for tag, queue in zip(tags, rows, strict=True):
            put(table, tag >> INDEX_SHIFT, queue.address)
        put(row, layout.WORKER_QUEUE_COUNT, max(count, 1 + max(tag >> INDEX_SHIFT for tag in tags)))
        return rows

    @property
    def open_batches(self) -> int:
        """Batches that hold a row, or did at the end."""
        return self._left + int(np.count_nonzero(self.batch_rows[:, layout.BATCH_STATE]))

    @property
    def memory(self) -> object:
        """What a kernel looks at: whoever calls one that gives the GIL up holds this, lest `release` comes."""
        return self.arrays, self.rings

    def release(self, blocks: Sequence[Block]) -> None:
        """Give back what batches and slices live in; the workers have left. Levels and counters stay.

        No handle names anything for whoever calls with one of `blocks`, which are all there are, or with a later one.
        """
        for words in (self.template, *(block.words for block in blocks)):
            words[layout.BATCHES] = 0
        self._left = self.open_batches
        self.batch_rows = self.batch_rows[:0].copy()
        fields = (*range(layout.SLICE_SOURCE, layout.SLICE_OBJECT + 1), layout.BATCH_ROWS, layout.NOTES)
        large = {int(self.template[field]) for field in fields}
        self.arrays = [array for array in self.arrays if array.size and address_of(array) not in large]
        self.rings = []

    @property
    def free_slices(self) -> int:
        """Slots in the free list."""
        return int(self.shared[layout.SHARED_FREE_COUNT]) * limits.CHUNK_SLICES

    @property
    def high_water_slices(self) -> int:
        """Most slots ever in use at once, in whole chunks."""
        return (self.settings.chunks - int(self.shared[layout.SHARED_LOW])) * limits.CHUNK_SLICES
