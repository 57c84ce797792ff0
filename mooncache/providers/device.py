"""The device of software providers: records behind the verbs structs.

    ibv_qp.qp_context --> row of a queue pair --> ring of entries, keys of the target
    ibv_cq.cq_context --> port: the queue pairs of one worker on one rail, visited in turn

One queue serves one worker and one peer, so only that worker's thread posts to it and polls it. Most wires have one
rail; where there are several, each has a queue a worker and peer, and a completion queue a worker. Keys are checked at
the target's table for every work request, as a NIC does: an unregistered range is refused, not touched.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from mooncache import limits
from mooncache.descriptor import Keys
from mooncache.errors import CapacityError, TransportError
from mooncache.kernels.arrays import WORD, Row, address_of, aligned, power_of_two, rows_of
from mooncache.kernels.enums import Access
from mooncache.kernels.inbox import sender
from mooncache.kernels.jit import Callback, kernel
from mooncache.kernels.records.base import behind
from mooncache.kernels.records.verbs import IBV_CONTEXT, IBV_CQ, IBV_QP, ibv_cq_at, ibv_qp_at, wc_at
from mooncache.kernels.state import CompletionQueue, QueuePair
from mooncache.providers.base import Provider
from mooncache.providers.careful import Copier
from mooncache.providers.keys import KeyTable


# ------------------------------------------------------------------------------ kernels
@kernel
def queue_of(qp):
    """Return the row behind an ibv_qp."""
    return ibv_qp_at(qp).qp_context


@kernel
def port_of(cq):
    """Return the port behind an ibv_cq."""
    return ibv_cq_at(cq).cq_context


@kernel
def write_completion(wc, wr_id, status):
    """Write the ibv_wc at the address `wc`; return the address of the next."""
    one = wc_at(wc)
    one.wr_id = wr_id
    one.status = status
    return behind(one)


# ------------------------------------------------------------------------------ the device
class Device:
    """An `ibv_context` whose operations are these two functions; its queue pairs and completion queues are records.

    Whoever holds one of those holds the device as well.
    """

    def __init__(self, post_send: Callback, poll_cq: Callback) -> None:
        self.context = Row(rows_of(IBV_CONTEXT))
        self.context.set(post_send=post_send.address, poll_cq=poll_cq.address)

    def queue_pair(self, row: int) -> np.ndarray:
        """Make an IBV_QP[1] that leads to its owner's row at this address."""
        qp = rows_of(IBV_QP)
        Row(qp).set(context=self.context.address, qp_context=row)
        return qp

    def completion_queue(self, port: int) -> np.ndarray:
        """Make an IBV_CQ[1] that leads to its owner's row at this address."""
        cq = rows_of(IBV_CQ)
        Row(cq).set(context=self.context.address, cq_context=port)
        return cq


class Queue:
    """One queue pair: an ibv_qp, its row, its ring of entries."""

    def __init__(self, device: Device, keys: KeyTable, depth: int, record: np.dtype, entry: np.dtype) -> None:
        entries = power_of_two(depth)
        self.held: list[
            np.ndarray
        ] = []  # keys and inboxes of its targets, and how it names itself there; former ones too
        self._caller: str | None = None
        self.moves = np.zeros(0, np.int64)  # what a provider's row points to besides
        self.copier: Copier | None = None  # where it copies within this process
        self.rail = 0
        self.ring = rows_of(entry, entries)
        self.row = Row(rows_of(record))
        self.row.set(mask=entries - 1, limit=depth, ring=address_of(self.ring))
        self.lead_to(keys)
        self.qp = device.queue_pair(self.row.address)

    @property
    def address(self) -> int:
        """The address of its row, for kernels."""
        return self.row.address

    def lead_to(self, keys: KeyTable, inbox: np.ndarray | None = None, caller: str = "") -> None:
        """Lead what is posted from now on to the device with this key table, and to its inbox, as from `caller`."""
        if self.row["keys"] != keys.address:
            self.held.append(keys.entries)
        if inbox is not None and self.row["inbox"] != address_of(inbox):
            self.held.append(inbox)
        if self._caller != caller:  # else a worker may be reading the words that are there
            self._caller = caller
            self.held.append(sender(caller))
            self.row.put("sender", address_of(self.held[-1]))
        self.row.put("inbox", 0 if inbox is None else address_of(inbox))
        self.row.put("keys", keys.address)

    def rest(self, keys: KeyTable) -> None:
        """Lead to no peer, until it is given to another; `keys` of this engine. Nothing is under way on it."""
        self.row.put("inbox", 0)
        self.row.put("keys", keys.address)
        self._caller = None
        self.held.clear()

    @property
    def pair(self) -> QueuePair:
        """The queue pair as kernels know it."""
        return QueuePair(address_of(self.qp), self.row["limit"], cut=self.row.where("cut"))

    @property
    def outstanding(self) -> int:
        """The work requests posted and not yet polled."""
        return self.row["head"] - self.row["tail"]


class PortRow:
    """A worker's side of a wire: its record, and behind it the addresses of the rows of `peers` queue pairs."""

    def __init__(self, record: np.dtype, peers: int) -> None:
        header = record.itemsize // WORD
        words = aligned(header + peers)
        self.row, self.queues = Row(words[:header].view(record)), words[header:]


class SoftwareProvider(Provider):
    """A provider whose device is memory: subclasses give the two functions and what a queue needs besides."""

    post_send: Callback
    poll_cq: Callback
    queue_record: np.dtype  # of a queue pair's row: QUEUE_FIELDS and its own
    port_record: np.dtype  # of a port: PORT_FIELDS and its own
    entry: np.dtype  # of a queue pair's ring
    queue_type: type[Queue] = Queue
    rails: int = 1

    def __init__(self) -> None:
        self.keys = KeyTable()
        self.queues: list[list[Any]] = []  # [worker][peer x rails + rail]
        self.peers: dict[str, int] = {}
        self._spare: list[int] = []  # numbers that peers had whose queues rest

    def new_device(self) -> Device:
        """Make the device that `open` opens."""
        return Device(self.post_send, self.poll_cq)

    def open(
        self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = limits.PEERS
    ) -> list[list[CompletionQueue]]:
        """Make the device, see `Provider.open`."""
        if self.queues:
            raise TransportError(f"this {self.name} provider is open already; each engine needs one of its own")
        self.depth, self._most = queue_depth, peers
        self.device = self.new_device()
        self.lists = [PortRow(self.port_record, peers) for _ in range(workers * self.rails)]
        self.completion_queues = [self.device.completion_queue(port.row.address) for port in self.lists]
        self.queues = [[] for _ in range(workers)]
        made = [CompletionQueue(address_of(cq)) for cq in self.completion_queues]
        return [made[i : i + self.rails] for i in range(0, len(made), self.rails)]

    def register(self, address: int, length: int, access: int) -> Keys:
        """Register a range, see `Provider.register`; remote keys are all alike, local ones say if it is held."""
        key = self.keys.add(address, length, access)
        return Keys((access & Access.HELD,) * self.rails, (key,) * self.rails)

    def _add_queues(self, name: str, keys: KeyTable) -> None:
        """Make one queue a worker and rail for a new peer: those of a forgotten peer, or new ones."""
        if self._spare:
            self.peers[name] = self._spare.pop()
            for queue in self._queues_of(name):
                queue.lead_to(keys)
            return
        index = len(self.peers)
        if index >= self._most:
            raise CapacityError(
                f"this engine is connected to {self._most} peers, as many as it may: forget() one, or raise `peers`"
            )
        rails = range(self.rails)
        made = [[self._new_queue(worker, rail, keys) for rail in rails] for worker in range(len(self.queues))]
        for worker, queues in enumerate(made):
            self.queues[worker] += queues
            for queue in queues:
                polled = self.lists[worker * self.rails + queue.rail]
                polled.queues[index] = queue.address
                polled.row.put("count", index + 1)
        self.peers[name] = index

    def _new_queue(self, worker: int, rail: int, keys: KeyTable) -> Queue:
        queue = self.queue_type(self.device, keys, self.depth, self.queue_record, self.entry)
        queue.rail = rail
        self.prepare(queue, worker)
        return queue

    def _queues_of(self, name: str) -> list[Any]:
        """Return the queues of a peer, worker by worker."""
        first = self.peers[name] * self.rails
        return [queue for queues in self.queues for queue in queues[first : first + self.rails]]

    def quiet(self, peer: str) -> bool:
        """See `Provider.quiet`."""
        return peer not in self.peers or all(queue.outstanding == 0 for queue in self._queues_of(peer))

    def forget(self, peer: str) -> None:
        """See `Provider.forget`: its queues rest until another peer gets them, and so are polled in vain."""
        if peer in self.peers:
            for queue in self._queues_of(peer):
                queue.rest(self.keys)
            self._spare.append(self.peers.pop(peer))

    def give_up_memory(self) -> None:
        """Free the memory that the workers used, at the end of `close`."""
        self.queues = [[] for _ in self.queues]
        self.peers.clear()
        self._spare.clear()

    @abstractmethod
    def prepare(self, queue: Queue, worker: int) -> None:
        """Set the fields of a new queue that only this provider has."""
