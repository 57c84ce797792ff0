"""What wires within a process share: the target's keys and inbox are at hand, and bytes are copied to its pages."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from mooncache import limits
from mooncache.errors import TransportError
from mooncache.kernels.arrays import WORD, address_of
from mooncache.kernels.atomics import copy, fence, peek, store
from mooncache.kernels.enums import Access, Opcode
from mooncache.kernels.inbox import deliver
from mooncache.kernels.jit import kernel
from mooncache.kernels.publication import publish
from mooncache.kernels.state import CompletionQueue, QueuePair
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.base import Descriptor, Keys, Link
from mooncache.providers.careful import C_SELF, FIRST, Copier, move_one, set_pair
from mooncache.providers.device import (
    KEY_ACCESS,
    KEY_SLOT_MASK,
    KEY_WORDS,
    Q_COPIER,
    Q_CUT,
    Q_HEAD,
    Q_INBOX,
    Q_MOVING,
    Q_SENDER,
    Q_TAIL,
    KeyTable,
    Queue,
    SoftwareProvider,
    key_status,
    wait_for_moves,
)


# ------------------------------------------------------------------------------ kernels
@kernel
def move_bytes(queue, keys, rkey, opcode, local, remote, length):
    """Copy one slice if its key still holds; returns a WcStatus. `Q_MOVING` is odd meanwhile, for `unregister`.

    `local` is negated where the engine does not hold what keeps it mapped: then, and where the target does not, either
    may be gone.
    """
    store(queue + Q_MOVING * WORD, peek(queue + Q_MOVING * WORD) + 1)
    fence()
    status = key_status(keys, rkey, remote, length, opcode)
    if status == WcStatus.SUCCESS:
        held = peek(keys + ((rkey & KEY_SLOT_MASK) * KEY_WORDS + KEY_ACCESS) * WORD) & Access.HELD
        if local < 0 or held == 0:
            copier = peek(queue + Q_COPIER * WORD)
            set_pair(copier, FIRST, abs(local), remote, length)
            status = move_one(copier, peek(copier + C_SELF * WORD), opcode, FIRST)
        elif opcode == Opcode.READ:
            copy(local, remote, length)
        else:
            copy(remote, local, length)
    store(queue + Q_MOVING * WORD, peek(queue + Q_MOVING * WORD) + 1)
    return status


@kernel
def send_note(queue, local, length):
    """Put a notification into the inbox of a peer in the same process; returns a WcStatus."""
    inbox = peek(queue + Q_INBOX * WORD)
    if inbox != 0 and deliver(inbox, peek(queue + Q_SENDER * WORD), local, length):
        return np.int64(WcStatus.SUCCESS)
    return np.int64(WcStatus.RNR_RETRY_EXC_ERR)


# ------------------------------------------------------------------------------ the provider
@dataclass(frozen=True)
class InProcess:
    """`Descriptor.data` of the providers whose peers live in the same process."""

    process: int
    keys: KeyTable
    inbox: np.ndarray
    rails: int


class InProcessProvider(SoftwareProvider):
    """A software provider whose peers live in the same process."""

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
        queue.copier = Copier()
        queue.words[Q_COPIER] = queue.copier.address
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
        """See `Provider.connected`: until the peer is closed."""
        return not self._tables[peer].closed

    def forget(self, peer: str) -> None:
        """See `Provider.forget`."""
        super().forget(peer)
        self._tables.pop(peer, None)

    def retract(self, peer: str, limit_s: float) -> int:
        """Get back what is in flight to a peer; returns how many queue pairs lead there.

        What was submitted must not be posted any more. Raises TransportError when it does not come back in time.
        """
        if peer not in self.peers:
            return 0
        ours = self._queues_of(peer)
        posted = [int(queue.words[Q_HEAD]) for queue in ours]
        for queue in ours:
            publish(address_of(queue.words) + Q_CUT * WORD, 1)
        deadline = time.monotonic() + limit_s
        while any(int(queue.words[Q_TAIL]) < head for queue, head in zip(ours, posted, strict=True)):
            if time.monotonic() > deadline:
                raise TransportError(f"what is in flight to {peer!r} did not come back within {limit_s} s; try again")
            time.sleep(1e-4)
        return len(ours)

    def pair_of(self, queue: Queue, peer: InProcess) -> QueuePair:
        """How kernels know a queue that leads to a peer."""
        return queue.pair

    def close(self) -> None:
        """See `Provider.close`; peers are refused from now on."""
        self.keys.clear()
        wait_for_moves()
        self._tables.clear()
        self.inbox = self.inbox[:0].copy()
        self.give_up_memory()
