"""An engine's memory, allocated as the records in `records/` describe it, and the control blocks of its actors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mooncache import limits
from mooncache.errors import CapacityError, UsageError
from mooncache.kernels.arrays import (
    Row,
    address_of,
    aligned,
    function_address,
    power_of_two,
    put,
    python_address,
    rows_of,
    zeros,
)
from mooncache.kernels.enums import Kind, Order, QueueState, Store
from mooncache.kernels.queue import INCARNATION, INDEX_SHIFT
from mooncache.kernels.records.base import CELL
from mooncache.kernels.records.batch import BATCH
from mooncache.kernels.records.control import CONTROL
from mooncache.kernels.records.endpoint import ENDPOINT
from mooncache.kernels.records.queue import CQ, QUEUE, WEIGHT_ONE
from mooncache.kernels.records.shared import SHARED
from mooncache.kernels.records.table import PEER_BITS, TABLE
from mooncache.kernels.records.verbs import SEND_WR, SGE, WC
from mooncache.kernels.records.worker import EPOCH_QUIET, WORKER
from mooncache.kernels.ring import new_ring
from mooncache.kernels.settings import Settings
from mooncache.kernels.tables import RegionTable

SLICE_DTYPES = {
    "slice_source": np.int64,
    "slice_target": np.int64,
    "slice_length": np.int32,
    "slice_first": np.int32,
    "slice_last": np.int32,
    "slice_local": np.int16,
    "slice_remote": np.int16,
    "slice_state": np.int16,
    "slice_attempts": np.int8,
    "slice_next": np.int32,
}
QUEUES_MAX = 1 << 14
"""Queue pairs of one worker, at most: their index is the uppermost part of a work request's id."""


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
    weight: int = WEIGHT_ONE  # share of the load, see kernels/spread.py
    breaks: bool = False  # any error breaks it; it is posted to only after an order to probe it
    notes: bool = False  # for notifications only
    cut: int = 0  # where nothing breaks it: address of a word that is set to 1 to get back what is in flight, or 0
    push: int = 0  # address of its `verbs.push`, if it has one


class QueueRow:
    """A queue pair's row as Python reads it; records/queue.py says who writes what."""

    def __init__(self, state: State, worker: int, tag: int, pair: QueuePair, endpoint: int) -> None:
        self.worker, self.pair = worker, pair
        self.row = Row(rows_of(QUEUE))
        self.address = self.row.address
        self._entries = aligned(power_of_two(pair.depth))
        regions = state.settings.regions
        self.row.set(
            qp=pair.address,
            entries=address_of(self._entries),
            mask=len(self._entries) - 1,
            depth=pair.depth,
            tag=tag,
            cq=int(state.worker_rows[worker]["cqs"]) + pair.cq * CQ.itemsize,
            lkeys=pair.lkeys * regions * CELL.itemsize,
            rkeys=pair.rkeys * regions * CELL.itemsize,
            signal=state.settings.signal or pair.signal,
            gathers=min(pair.gathers, pair.message_bytes // (2 * state.settings.slice_bytes)),
            inline=pair.inline,
            weight=pair.weight,
            breaks=pair.breaks,
            state=QueueState.CLOSED if pair.breaks else QueueState.READY,
            endpoint=endpoint,
            cut=pair.cut,
            push=pair.push,
        )

    @property
    def state(self) -> QueueState:
        """The state it was in a moment ago."""
        return QueueState(self.row["state"])

    @property
    def outstanding(self) -> int:
        """The work requests without an answer."""
        return self.row["head"] - self.row["tail"]

    @property
    def at_rest(self) -> bool:
        """True when nothing is in flight on it, and its worker has nothing to decide."""
        still = self.state in (QueueState.READY, QueueState.CLOSED) and self.row["order"] == Order.NONE
        return bool(still and self.outstanding == 0)

    def leads_to(self, pair: QueuePair) -> bool:
        """Return whether it describes this queue pair, or once closed can: all but the address is the same."""
        same = self.pair._replace(address=pair.address) == pair
        return same and (self.pair == pair or self.state == QueueState.CLOSED)

    @property
    def cause(self) -> int:
        """The `ibv_wc_status` of the error that broke it last."""
        return self.row["cause"]


class Block:
    """One actor's control block: `ctl` is its address. Keeps the actor's own arrays alive."""

    def __init__(self, state: State, actor: int = -1) -> None:
        array = rows_of(CONTROL)
        array[:] = state.template
        self.row = Row(array)
        self.ctl = self.row.address
        self.counters, self.spent = aligned(len(Kind)), aligned(len(Kind))
        self.cache = np.zeros(state.settings.cache_slices, np.int64)
        self.row.set(
            actor=actor,
            counters=address_of(self.counters),
            spent=address_of(self.spent),
            cache_first=-1,
            cache_objects=address_of(self.cache),
        )
        if actor >= 0:
            self._prepare_work_requests(state.settings)
            state.worker_rows[actor]["ctl"] = self.ctl

    def _prepare_work_requests(self, settings: Settings) -> None:
        chain = settings.chain_length
        self.work_requests = np.zeros(chain, SEND_WR)
        self.gathers = np.zeros(chain * limits.SLICES_GATHERED, SGE)
        self.completions = np.zeros(settings.poll_lot, WC)
        wr = self.work_requests
        wr["next"] = address_of(wr) + SEND_WR.itemsize * np.arange(1, chain + 1)
        wr["next"][-1] = 0
        self.row.set(
            work_requests=address_of(wr), gathers=address_of(self.gathers), completions=address_of(self.completions)
        )


class State:
    """All memory of one engine, and the template of its control blocks."""

    def __init__(self, settings: Settings, *, virtual: bool = False, event_fd: int = -1, look_fd: int = -1) -> None:
        self.settings = settings
        chunks, slots = settings.chunks, settings.chunks * limits.CHUNK_SLICES
        self.template = rows_of(CONTROL)
        self.arrays: list[np.ndarray] = []
        for field, dtype in SLICE_DTYPES.items():
            self._hold(field, zeros(slots, dtype))
        self._hold("slice_object", zeros(slots if settings.store == Store.HEAP else 0, np.int64))
        self.chunk_next = self._hold("chunk_next", np.arange(1, chunks + 1, dtype=np.int64))
        self.chunk_next[-1] = -1
        for field in ("chunk_previous", "chunk_batch", "chunk_slices", "chunk_live"):
            self._hold(field, zeros(chunks, np.int64))
        self.batch_rows = self._hold("batch_rows", rows_of(BATCH, settings.batches))
        link = self._hold("batch_link", np.arange(1, settings.batches + 1, dtype=np.int64))
        link[-1] = -1
        self._nobody = Row(rows_of(TABLE))  # header of a table that no submit names
        self._nobody.set(gone=1, peer=-1)
        self.peer_tables = self._hold("peer_tables", np.full(settings.peers, self._nobody.address, np.int64))
        self.peer_turns = [0] * settings.peers  # how many peers each row has been given back by
        endpoints = self._hold("endpoint_rows", rows_of(ENDPOINT, settings.workers * settings.peers))
        self.endpoint_rows = endpoints.reshape(settings.workers, settings.peers)
        for ends in ("to_post", "to_notify"):
            self.endpoint_rows[ends]["first"] = self.endpoint_rows[ends]["last"] = -1
        self._hold("notes", zeros(settings.batches * settings.note_stride, np.uint8, sparse=True))
        self.worker_rows = self._hold("worker_rows", rows_of(WORKER, settings.workers))
        self.worker_rows["epoch"], self.worker_rows["spins"] = EPOCH_QUIET, 1
        for field in ("epoll", "bell_fd", "trouble_fd"):
            self.worker_rows[field] = -1
        self._left = 0  # batches that held a row when the memory of all was given back
        self.queues: dict[tuple[int, int], list[QueueRow]] = {}  # by worker and peer
        self._data: dict[tuple[int, int], np.ndarray] = {}  # likewise: addresses of the rows of those for data
        self._vacant = Row(rows_of(QUEUE))  # stands where a row was: closed, and named by nothing
        self._vacant["tag"] = -1
        self._vacancies: list[list[int]] = [[] for _ in range(settings.workers)]  # tags for the next rows there
        self.rings: list[np.ndarray] = []
        self.queue_tables: list[np.ndarray] = []
        for row in self.worker_rows:
            submissions = new_ring(3 * settings.batches)  # each batch once, once more to cancel it, once to detach it
            self.rings.append(submissions)
            row["ring"] = address_of(submissions)
            row["retry"]["first"] = row["kept"]["first"] = -1
            table = aligned(min(settings.peers * limits.QUEUE_PAIRS, QUEUES_MAX))
            self.queue_tables.append(table)
            row["queues"] = address_of(table)
        self._hold("retired_ring", new_ring(settings.batches))
        self.shared = Row(self._hold("shared", rows_of(SHARED)))
        self.shared.set(free_chunks=1, free_batches=1, free_count=chunks, low=chunks)
        self.regions = RegionTable("this engine", settings.regions)
        self._set_scalars(virtual, event_fd, look_fd)

    def _hold(self, field: str, array: np.ndarray) -> np.ndarray:
        """Keep an array alive and note its address in the template."""
        self.arrays.append(array)
        self.template[field] = address_of(array)
        return array

    def _set_scalars(self, virtual: bool, event_fd: int, look_fd: int) -> None:
        s = self.settings
        Row(self.template).set(
            local_table=self.regions.header.address,
            note_stride=s.note_stride,
            capacity=s.chunks * limits.CHUNK_SLICES,
            chunks=s.chunks,
            batches=s.batches,
            peers=s.peers,
            workers=s.workers,
            store=s.store,
            policy=s.policy,
            slice_bytes=s.slice_bytes,
            tail_bytes=s.slice_bytes // 4,
            chain=s.chain_length,
            poll_lot=s.poll_lot,
            retries=s.retries,
            cache_slices=s.cache_slices,
            reaper_lot=s.reaper_lot,
            reaper_period=s.reaper_period_ns,
            spin=s.spin_ns,
            event_fd=event_fd,
            look_fd=look_fd,
            one=1,
            virtual=virtual,
            clock_gettime=function_address("clock_gettime"),
            syscall=function_address("syscall"),
            write=function_address("write"),
            malloc=0 if virtual else function_address("malloc"),
            free=0 if virtual else function_address("free"),
            save_thread=0 if virtual else python_address("PyEval_SaveThread"),
            restore_thread=0 if virtual else python_address("PyEval_RestoreThread"),
        )

    def poll_from(self, worker: int, queues: Sequence[CompletionQueue]) -> None:
        """Let a worker take completions from these queues."""
        rows = rows_of(CQ, len(queues))
        self.arrays.append(rows)
        rows["address"] = [queue.address for queue in queues]
        rows["credits"] = [queue.entries for queue in queues]
        row = self.worker_rows[worker]
        row["cqs"], row["cq_count"] = address_of(rows), len(queues)

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
        table.header["peer"] = self.handle(peer)
        put(self.peer_tables, peer, table.header.address)
        rows = []
        for worker, pairs in enumerate(queue_pairs):
            known = self.queues.get((worker, peer))
            if known is None:
                known = self._enter_queues(worker, peer, pairs)
            for row, pair in zip(known, pairs, strict=True):
                row.pair = pair
                row.row.put("qp", pair.address)
            rows += known
        return rows

    def handle(self, peer: int) -> int:
        """Return the name by which submits know the peer that has a row now."""
        return self.peer_turns[peer] << PEER_BITS | peer

    def fits(self, peer: int, queue_pairs: Sequence[Sequence[QueuePair]]) -> bool:
        """Return whether a peer's rows, if it has any, can lead to these queue pairs."""
        known = self.rows_of(peer)
        pairs = [pair for own in queue_pairs for pair in own]
        return not known or (len(known) == len(pairs) and all(map(QueueRow.leads_to, known, pairs)))

    def rows_of(self, peer: int) -> list[QueueRow]:
        """Return the rows of a peer's queue pairs, worker by worker."""
        return [row for worker in range(self.settings.workers) for row in self.queues.get((worker, peer), ())]

    def take_rows(self, peer: int) -> object:
        """Take a peer's queue pairs from the workers; nothing may be under way on them.

        Returns what workers may look at until their next round: keep it until then.
        """
        kept: list[object] = []
        for worker in range(self.settings.workers):
            rows = self.queues.pop((worker, peer), [])
            for row in rows:
                tag = row.row["tag"]
                index, incarnation = tag >> INDEX_SHIFT, (tag + INCARNATION) & (0xFFFF << 32)
                put(self.queue_tables[worker], index, self._vacant.address)
                self._vacancies[worker].append(index << INDEX_SHIFT | incarnation)
            kept += [rows, self._data.pop((worker, peer), None)]
        return kept

    def disconnect(self, peer: int) -> object:
        """Take a peer's queue pairs from the workers, and refuse submits that name it: the row may get another peer."""
        put(self.peer_tables, peer, self._nobody.address)
        self.peer_turns[peer] += 1
        return self.take_rows(peer)

    def _check_room(self, worker: int, n: int) -> None:
        table, vacant = self.queue_tables[worker], self._vacancies[worker]
        used = int(self.worker_rows[worker]["queue_count"]) - len(vacant)
        if used + n > len(table):
            raise CapacityError(
                f"a worker has at most {len(table)} queue pairs, and {used} are in use; forget() peers that are not "
                "needed, or ask for fewer queue pairs on a path"
            )

    def _enter_queues(self, worker: int, peer: int, pairs: Sequence[QueuePair]) -> list[QueueRow]:
        row, table = Row(self.worker_rows, worker), self.queue_tables[worker]
        endpoint = Row(self.endpoint_rows, worker * self.settings.peers + peer)
        vacant, count = self._vacancies[worker], row["queue_count"]
        tags = [vacant.pop() for _ in pairs[: len(vacant)]]
        tags += [index << INDEX_SHIFT | INCARNATION for index in range(count, count + len(pairs) - len(tags))]
        rows = [QueueRow(self, worker, tag, pair, endpoint.address) for tag, pair in zip(tags, pairs, strict=True)]
        data = np.array([queue.address for queue in rows if not queue.pair.notes], np.int64)
        notes = [queue.address for queue in rows if queue.pair.notes]
        self._data[worker, peer], self.queues[worker, peer] = data, rows
        endpoint.set(notes=notes[0] if notes else int(data[0]), lost=0)
        endpoint.put("queues", address_of(data))
        endpoint.put("count", len(data))
        for tag, queue in zip(tags, rows, strict=True):
            put(table, tag >> INDEX_SHIFT, queue.address)
        row.put("queue_count", max(count, 1 + max(tag >> INDEX_SHIFT for tag in tags)))
        return rows

    @property
    def open_batches(self) -> int:
        """The batches that hold a row, or did at the end."""
        return self._left + int(np.count_nonzero(self.batch_rows["state"]))

    @property
    def memory(self) -> object:
        """The memory that kernels look at: a caller of one that gives the GIL up holds this, lest `release` comes."""
        return self.arrays, self.rings

    def release(self, blocks: Sequence[Block]) -> None:
        """Free the memory of batches and slices; the workers have left. Levels and counters stay.

        No handle names anything for whoever calls with one of `blocks`, which are all there are, or with a later one.
        """
        self.template["batches"] = 0
        for block in blocks:
            block.row["batches"] = 0
        left, self.batch_rows = self.open_batches, self.batch_rows[:0].copy()
        self._left = left
        fields = (*SLICE_DTYPES, "slice_object", "batch_rows", "notes")
        large = {int(self.template[field][0]) for field in fields}
        self.arrays = [array for array in self.arrays if array.size and address_of(array) not in large]
        self.rings = []

    @property
    def free_slices(self) -> int:
        """The slots in the free list."""
        return self.shared["free_count"] * limits.CHUNK_SLICES

    @property
    def high_water_slices(self) -> int:
        """The most slots ever in use at once, in whole chunks."""
        return (self.settings.chunks - self.shared["low"]) * limits.CHUNK_SLICES
