"""What software providers share: a device made of numpy words behind the verbs structs.

    ibv_qp.qp_context --> queue words --> ring of completions, key table of the target
    ibv_cq.cq_context --> list of the queues of one worker on one rail, visited in turn

One queue serves one worker and one peer, so only that worker's thread posts to it and polls it. Most wires have one
rail; where there are several, each has a queue a worker and peer, and a completion queue a worker. Keys are checked at
the target's table for every work request, as a NIC does: an unregistered range is refused, not touched.
"""

from __future__ import annotations

import secrets
import time
import weakref
from abc import abstractmethod
from typing import Any

import numpy as np

from mooncache import forks, limits
from mooncache.errors import CapacityError, TransportError
from mooncache.kernels.arrays import WORD, address_of, aligned, power_of_two, put
from mooncache.kernels.atomics import load, peek, poke, u32
from mooncache.kernels.enums import Access, Opcode
from mooncache.kernels.inbox import sender
from mooncache.kernels.jit import Callback, kernel
from mooncache.kernels.publication import publish, withdraw_key
from mooncache.kernels.state import CompletionQueue, QueuePair
from mooncache.kernels.verbs import (
    CONTEXT_BYTES,
    CONTEXT_POLL_CQ,
    CONTEXT_POST_SEND,
    CQ_BYTES,
    CQ_CQ_CONTEXT,
    QP_BYTES,
    QP_QP_CONTEXT,
    WC_BYTES,
    WC_STATUS,
    WC_WR_ID,
    WcStatus,
)
from mooncache.providers.base import Keys, Provider
from mooncache.providers.careful import Copier

# key table: REGIONS_MOST entries of
KEY, KEY_BASE, KEY_END, KEY_ACCESS, KEY_WORDS = 0, 1, 2, 3, 4
KEY_SLOT_MASK = limits.REGIONS_MOST - 1
# queue words
Q_HEAD, Q_TAIL, Q_MASK, Q_LIMIT, Q_RING, Q_KEYS, Q_MOVING, Q_NIC, Q_NOW = 0, 1, 2, 3, 4, 5, 6, 7, 8
Q_SCRATCH, Q_INBOX, Q_SENDER, Q_OWN, Q_COPIER, Q_CUT, QUEUE_WORDS = 9, 11, 12, 13, 30, 31, 32
# Q_SCRATCH: a timespec; from Q_OWN on: the provider's; Q_COPIER: see `careful`, of queues within a process
# Q_CUT: set to 1 by the kernels to get back what is in flight
# completion queue words: from CQ_OWN on the provider's own, then the queues, as many as there may be peers
CQ_COUNT, CQ_TURN, CQ_OWN, CQ_QUEUES = 0, 1, 2, 48


# ------------------------------------------------------------------------------ kernels
@kernel
def queue_of(qp):
    """Address of the queue words behind an ibv_qp."""
    return peek(qp + QP_QP_CONTEXT)


@kernel
def key_status(keys, rkey, address, length, opcode):
    """Whether the target lets this range be reached under this key, a WcStatus; forms no sum that could overflow.

    0 is the key of entries that are not in use.
    """
    entry = keys + (rkey & KEY_SLOT_MASK) * KEY_WORDS * WORD
    needed = Access.READ if opcode == Opcode.READ else Access.WRITE
    base, end = peek(entry + KEY_BASE * WORD), peek(entry + KEY_END * WORD)
    if rkey == 0 or load(entry + KEY * WORD) != rkey or peek(entry + KEY_ACCESS * WORD) & needed == 0:
        return np.int64(WcStatus.REM_ACCESS_ERR)
    if address < base or address >= end or length > end - address:
        return np.int64(WcStatus.REM_ACCESS_ERR)
    return np.int64(WcStatus.SUCCESS)


@kernel
def write_completion(wc, wr_id, status):
    """Fill in one ibv_wc."""
    poke(wc + WC_WR_ID, wr_id)
    u32(wc + WC_STATUS)[0] = status
    return wc + WC_BYTES


# ------------------------------------------------------------------------------ the device
class KeyTable:
    """What a device lets peers reach. Keys are drawn at random, so that an old one names nothing by chance."""

    def __init__(self, words: np.ndarray | None = None) -> None:
        """`words`: zeroed int64[REGIONS_MOST * KEY_WORDS] to use, on a cache line of its own."""
        words = aligned(limits.REGIONS_MOST * KEY_WORDS) if words is None else words
        self.entries = words.reshape(limits.REGIONS_MOST, KEY_WORDS)
        self.closed = False
        self._free = list(range(limits.REGIONS_MOST - 1, -1, -1))

    @property
    def address(self) -> int:
        """Of the entries, for kernels."""
        return address_of(self.entries)

    def add(self, address: int, length: int, access: int) -> int:
        """Enter a range; returns its key, never 0."""
        if not self._free:
            raise CapacityError(
                f"all {limits.REGIONS_MOST} registrations of this device are in use; unregister some first"
            )
        slot = self._free.pop()
        key = secrets.randbelow(1 << 51) * limits.REGIONS_MOST + slot  # 51 random bits above twelve of the slot
        self.entries[slot, 1:] = address, address + length, access
        publish(self._entry(slot), key)
        return key

    def _entry(self, slot: int) -> int:
        return self.address + slot * KEY_WORDS * WORD

    def remove(self, key: int) -> None:
        """Refuse the key from now on."""
        withdraw_key(self._entry(key & KEY_SLOT_MASK))
        self._free.append(key & KEY_SLOT_MASK)

    def clear(self) -> None:
        """Refuse all keys from now on."""
        self.closed = True
        for slot in np.flatnonzero(self.entries[:, KEY]):
            withdraw_key(self._entry(int(slot)))

    def release(self) -> None:
        """Let go of the entries. Nobody in this process looks at them any more, nor will."""
        self.entries = self.entries[:0].copy()


class Device:
    """An `ibv_context` whose operations are these two functions; its queue pairs and completion queues are words.

    Whoever holds one of those holds the device as well.
    """

    def __init__(self, post_send: Callback, poll_cq: Callback) -> None:
        self.context = aligned(-(-CONTEXT_BYTES // WORD))
        self.context[CONTEXT_POST_SEND // WORD] = post_send.address
        self.context[CONTEXT_POLL_CQ // WORD] = poll_cq.address

    def queue_pair(self, own: np.ndarray) -> np.ndarray:
        """An `ibv_qp` that leads to words of its owner's."""
        qp = aligned(QP_BYTES // WORD)
        qp[[0, QP_QP_CONTEXT // WORD]] = address_of(self.context), address_of(own)
        return qp

    def completion_queue(self, own: np.ndarray) -> np.ndarray:
        """An `ibv_cq`, likewise."""
        cq = aligned(CQ_BYTES // WORD)
        cq[[0, CQ_CQ_CONTEXT // WORD]] = address_of(self.context), address_of(own)
        return cq


class _Queues:
    """All queue pairs of this process."""

    def __init__(self) -> None:
        self.all: weakref.WeakSet[Queue] = weakref.WeakSet()

    def disown(self) -> None:
        """See `forks.Holder`: a copy that was under way in the parent never ends here."""
        self.all.clear()


_queues = forks.private(_Queues())


class Queue:
    """One queue pair: an ibv_qp, its queue words, its ring of `entry_words` a completion."""

    def __init__(self, device: Device, keys: KeyTable, depth: int, entry_words: int) -> None:
        entries = power_of_two(depth)
        self.held: list[np.ndarray] = []  # keys and inboxes of its targets, former ones too
        self.moves = np.zeros(0, np.int64)  # what a provider's queue words point to besides
        self.copier: Copier | None = None  # where it copies within this process
        self.rail = 0
        self.ring = aligned(entries * entry_words)
        self.words = aligned(QUEUE_WORDS)
        self.words[[Q_MASK, Q_LIMIT, Q_RING]] = entries - 1, depth, address_of(self.ring)
        self.lead_to(keys)
        self.qp = device.queue_pair(self.words)
        _queues.all.add(self)

    def lead_to(self, keys: KeyTable, inbox: np.ndarray | None = None, caller: str = "") -> None:
        """Let what is posted from now on reach the device with this key table, and the inbox, where it comes from
        `caller`."""
        if self.words[Q_KEYS] != keys.address:
            self.held.append(keys.entries)
        if inbox is not None and self.words[Q_INBOX] != address_of(inbox):
            self.held.append(inbox)
        self._sender = sender(caller)
        put(self.words, Q_SENDER, address_of(self._sender))
        put(self.words, Q_INBOX, 0 if inbox is None else address_of(inbox))
        put(self.words, Q_KEYS, keys.address)

    def rest(self, keys: KeyTable) -> None:
        """Lead to no peer, until it is given to another; `keys` of this engine. Nothing is under way on it."""
        put(self.words, Q_INBOX, 0)
        put(self.words, Q_KEYS, keys.address)
        self.held.clear()

    @property
    def pair(self) -> QueuePair:
        """How kernels know it."""
        cut = address_of(self.words) + Q_CUT * WORD
        return QueuePair(address_of(self.qp), int(self.words[Q_LIMIT]), cut=cut)

    @property
    def outstanding(self) -> int:
        """Work requests posted and not yet polled."""
        return int(self.words[Q_HEAD] - self.words[Q_TAIL])


def wait_for_moves() -> None:
    """Return when every copy that was under way when this was called has ended. Copies take microseconds."""
    moving = [(queue, int(queue.words[Q_MOVING])) for queue in list(_queues.all)]
    for queue, seen in moving:
        while seen % 2 == 1 and int(queue.words[Q_MOVING]) == seen:
            time.sleep(0)


class SoftwareProvider(Provider):
    """A provider whose device is memory: subclasses give the two functions and what a queue needs besides."""

    post_send: Callback
    poll_cq: Callback
    entry_words: int
    queue_type: type[Queue] = Queue
    rails: int = 1

    def __init__(self) -> None:
        self.keys = KeyTable()
        self.queues: list[list[Any]] = []  # [worker][peer x rails + rail]
        self.peers: dict[str, int] = {}
        self._spare: list[int] = []  # numbers that peers had whose queues rest

    def open(
        self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = limits.PEERS
    ) -> list[list[CompletionQueue]]:
        """See `Provider.open`."""
        if self.queues:
            raise TransportError(f"this {self.name} provider is open already; each engine needs one of its own")
        self.depth, self._most = queue_depth, peers
        self.device = Device(self.post_send, self.poll_cq)
        self.lists = [aligned(CQ_QUEUES + peers) for _ in range(workers * self.rails)]
        self.completion_queues = [self.device.completion_queue(queues) for queues in self.lists]
        self.queues = [[] for _ in range(workers)]
        made = [CompletionQueue(address_of(cq)) for cq in self.completion_queues]
        return [made[i : i + self.rails] for i in range(0, len(made), self.rails)]

    def register(self, address: int, length: int, access: int) -> Keys:
        """See `Provider.register`; all remote keys are the same, and local ones say whether the memory is held."""
        key = self.keys.add(address, length, access)
        return Keys((access & Access.HELD,) * self.rails, (key,) * self.rails)

    def _add_queues(self, name: str, keys: KeyTable) -> None:
        """One queue a worker and rail for a new peer: those of a peer that was forgotten, or new ones."""
        if self._spare:
            self.peers[name] = self._spare.pop()
            for queue in self._queues_of(name):
                queue.lead_to(keys)
            return
        index = len(self.peers)
        if index >= self._most:
            raise CapacityError(f"this engine is connected to {self._most} peers, as many as it may: forget one first")
        rails = range(self.rails)
        made = [[self._new_queue(worker, rail, keys) for rail in rails] for worker in range(len(self.queues))]
        for worker, queues in enumerate(made):
            self.queues[worker] += queues
            for queue in queues:
                polled = self.lists[worker * self.rails + queue.rail]
                polled[CQ_QUEUES + index] = address_of(queue.words)
                put(polled, CQ_COUNT, index + 1)
        self.peers[name] = index

    def _new_queue(self, worker: int, rail: int, keys: KeyTable) -> Queue:
        queue = self.queue_type(self.device, keys, self.depth, self.entry_words)
        queue.rail = rail
        self.prepare(queue, worker)
        return queue

    def _queues_of(self, name: str) -> list[Any]:
        """The queues of a peer, worker by worker."""
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
        """At the end of `close`: let go of what the workers used."""
        self.queues = [[] for _ in self.queues]
        self.peers.clear()
        self._spare.clear()

    @abstractmethod
    def prepare(self, queue: Queue, worker: int) -> None:
        """Set what a new queue of this provider needs besides."""
