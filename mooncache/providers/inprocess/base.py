"""The common part of wires within a process: the target's keys and inbox are at hand, bytes are copied to its pages."""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import dataclass

import numpy as np

from mooncache import forks, limits
from mooncache.descriptor import Descriptor, Keys
from mooncache.errors import TransportError
from mooncache.kernels.atomics import copy, fence
from mooncache.kernels.enums import Access, Opcode
from mooncache.kernels.inbox import deliver
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import TIMESPEC, record_at, release, row
from mooncache.kernels.state import CompletionQueue, QueuePair
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.base import Link
from mooncache.providers.careful import FIRST, Copier, copier_at, move_one, set_pair
from mooncache.providers.device import Queue, SoftwareProvider
from mooncache.providers.keys import KEY_SLOT_MASK, KeyTable, key_status
from mooncache.providers.records import PORT_FIELDS, QUEUE_FIELDS, key_at

FIELDS = [
    *QUEUE_FIELDS,
    ("moving", np.int64),  # odd while bytes are moved, for `unregister`
    ("copier", np.int64),  # address of a COPIER, for memory that may be gone
    ("nic", np.int64),  # emulated: address of a NIC
    ("now", np.int64),  # emulated: address of the virtual clock, ps, or 0
    ("timespec", TIMESPEC),  # emulated: scratch of the real one
    ("moves", np.int64),  # emulated: address of what each entry moves
    ("broken", np.int64),  # emulated: 0, or the WcStatus that the next work request ends with; then all are flushed
]
QUEUE = row(FIELDS)
PORT = row(PORT_FIELDS)
queue_at, port_at = record_at(QUEUE), record_at(PORT)


# ------------------------------------------------------------------------------ kernels
@kernel
def move_bytes(queue, keys, rkey, opcode, local, remote, length):
    """Copy one slice if its key still holds; return a WcStatus. `moving` is odd meanwhile, for `unregister`.

    `local` is negated where the engine does not hold what keeps it mapped: then, and where the target does not, either
    may be gone.
    """
    release(queue, "moving", queue.moving + 1)
    fence()
    status = key_status(keys, rkey, remote, length, opcode)
    if status == WcStatus.SUCCESS:
        held = key_at(keys, rkey & KEY_SLOT_MASK).access & Access.HELD
        if local < 0 or held == 0:
            copier = copier_at(queue.copier)
            set_pair(copier, FIRST, abs(local), remote, length)
            status = move_one(copier, copier.own_pid, opcode, FIRST)
        elif opcode == Opcode.READ:
            copy(local, remote, length)
        else:
            copy(remote, local, length)
    release(queue, "moving", queue.moving + 1)
    return status


@kernel
def send_note(queue, local, length):
    """Put a notification into the inbox of a peer in the same process; return a WcStatus."""
    inbox = queue.inbox
    if inbox != 0 and deliver(inbox, queue.sender, local, length):
        return np.int64(WcStatus.SUCCESS)
    return np.int64(WcStatus.RNR_RETRY_EXC_ERR)


# ------------------------------------------------------------------------------ the provider
@dataclass(frozen=True)
class InProcess:
    """The `Descriptor.data` of providers whose peers live in the same process."""

    process: int
    keys: KeyTable
    inbox: np.ndarray
    rails: int


class _Queues:
    """The queue pairs of these wires in this process."""

    def __init__(self) -> None:
        self.all: weakref.WeakSet[Queue] = weakref.WeakSet()

    def disown(self) -> None:
        """Forget the queues in a forked child, where the parent's copies never end; see `forks.Holder`."""
        self.all.clear()


_queues = forks.private(_Queues())


def wait_for_moves() -> None:
    """Wait until every copy that was under way at the call has ended. Copies take microseconds."""
    moving = [(queue, queue.row["moving"]) for queue in list(_queues.all)]
    for queue, seen in moving:
        while seen % 2 == 1 and queue.row["moving"] == seen:
            time.sleep(0)


class InProcessProvider(SoftwareProvider):
    """A software provider whose peers live in the same process."""

    queue_record, port_record = QUEUE, PORT

    def open(
        self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = limits.PEERS
    ) -> list[list[CompletionQueue]]:
        """See `Provider.open`."""
        self.inbox = inbox
        self._tables: dict[str, KeyTable] = {}  # of peers
        return super().open(workers, queue_depth, inbox, peers)

    def register(self, address: int, length: int, access: int) -> Keys:
        """See `Provider.register`."""
        if not access & Access.HELD and not Copier().permitted:
            raise TransportError(
                f"memory given as (address, length) may go away, which provider {self.name!r} could not tell: this "
                "system forbids process_vm_readv; register the array or tensor that holds it, or use 'tcp'"
            )
        return super().register(address, length, access)

    def unregister(self, keys: Keys) -> None:
        """See `Provider.unregister`."""
        self.keys.remove(keys.rkeys[0])
        wait_for_moves()

    def _new_queue(self, worker: int, rail: int, keys: KeyTable) -> Queue:
        queue = super()._new_queue(worker, rail, keys)
        _queues.all.add(queue)
        queue.copier = Copier()
        queue.row["copier"] = queue.copier.address
        return queue

    def describe(self, unix: str = "") -> InProcess:
        """See `Provider.describe`."""
        return InProcess(os.getpid(), self.keys, self.inbox, self.rails)

    def connect(self, peer: Descriptor, link: Link) -> list[list[QueuePair]]:
        """See `Provider.connect`."""
        data = peer.data
        if not isinstance(data, InProcess) or data.process != os.getpid():
            raise TransportError(
                f"provider {self.name!r} reaches engines of the same process only; peer {peer.name!r} "
                f"uses provider {peer.provider!r} elsewhere"
            )
        if peer.name not in self.peers:
            self._add_queues(peer.name, data.keys)
        first = self.peers[peer.name] * self.rails
        ours = [queues[first : first + self.rails] for queues in self.queues]
        for queues in ours:
            for queue in queues:
                queue.lead_to(data.keys, data.inbox, link.caller)
        self._tables[peer.name] = data.keys
        return [[self.pair_of(queue, data) for queue in queues] for queues in ours]

    def connected(self, peer: str) -> bool:
        """Return whether the peer is open, see `Provider.connected`."""
        return not self._tables[peer].closed

    def forget(self, peer: str) -> None:
        """See `Provider.forget`."""
        super().forget(peer)
        self._tables.pop(peer, None)

    def retract(self, peer: str, limit_s: float) -> int:
        """Get back what is in flight to a peer; return how many queue pairs lead there.

        What was submitted must not be posted any more. Raises TransportError when it does not come back in time.
        """
        if peer not in self.peers:
            return 0
        ours = self._queues_of(peer)
        posted = [queue.row["head"] for queue in ours]
        for queue in ours:
            queue.row.put("cut", 1)
        deadline = time.monotonic() + limit_s
        while any(queue.row["tail"] < head for queue, head in zip(ours, posted, strict=True)):
            if time.monotonic() > deadline:
                raise TransportError(f"what is in flight to {peer!r} did not come back within {limit_s} s; try again")
            time.sleep(1e-4)
        return len(ours)

    def pair_of(self, queue: Queue, peer: InProcess) -> QueuePair:
        """Return the queue pair, as kernels know it, of a queue that leads to a peer."""
        return queue.pair

    def close(self) -> None:
        """Close the device, see `Provider.close`; peers are refused from now on."""
        self.keys.clear()
        wait_for_moves()
        self._tables.clear()
        self.inbox = self.inbox[:0].copy()
        self.give_up_memory()
