"""Memory of a peer on this host that is mapped here, and what a peer is given that maps ours."""

from __future__ import annotations

import ctypes
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from mooncache import forks, limits
from mooncache.discovery.credentials import Process, has_ended, process_at
from mooncache.discovery.messages import Answer
from mooncache.kernels.arrays import LINE, WORD, address_of
from mooncache.kernels.publication import rise, withdraw_key
from mooncache.kernels.tables import RegionTable
from mooncache.pages import populate
from mooncache.providers.careful import Copier
from mooncache.providers.records import KEY
from mooncache.providers.shm.copy import GUARD_EPOCH
from mooncache.providers.stream.connections import StreamQueue
from mooncache.segments import Pages, allocate, check_foreign

KEYS_BYTES = limits.REGIONS_MOST * KEY.itemsize
GUARD_BYTES = (limits.WORKERS + 1) * LINE  # behind those of the workers a line with these words
EPOCH, RESTARTS = GUARD_EPOCH // WORD, GUARD_EPOCH // WORD + 1


class Mapping(Pages):
    """Memory of a peer, mapped here. Raises TransportError for what could vanish under the mapping."""

    def __init__(self, descriptor: int, length: int, *, writable: bool) -> None:
        check_foreign(descriptor, length)
        super().__init__(descriptor, length, writable=writable)
        forks.private(self)

    def disown(self) -> None:
        """See `forks.Holder`: a child that lives on must not keep the memory of a peer that is gone."""
        self.close()


class Lease:
    """A peer's right to map our memory, with the keys and guards that it was given.

    Attributes:
        copier: the peer and its process, which the kernel named.
        guards: one line a worker of the peer, odd while that copies.
        ended: the peer is gone, and its guards mean nothing any more.
    """

    def __init__(self, peer: str, process: Process) -> None:
        self.peer, self.ended, self._process = peer, False, process
        self.copier = f"peer {peer!r} (process {process.pid} of this host)"
        self.sock: socket.socket | None = None  # to the peer, once it has it
        self.guards = allocate(GUARD_BYTES).view(np.int64)
        self.guards[EPOCH] = 1  # 0: nothing is copied any more
        self._lock = threading.Lock()  # of the epoch

    def revoke(self) -> None:
        """Refuse what the peer copies from now on; a copy that it has begun ends in front of an odd guard."""
        with self._lock:
            withdraw_key(address_of(self.guards) + GUARD_EPOCH)

    def lands_no_more(self) -> bool:
        """See `Copier`: it is stopped, and before it goes on with a copy it looks at its key again."""
        if not self.guards[RESTARTS]:
            return False
        with self._lock:
            if self.guards[EPOCH]:
                rise(address_of(self.guards) + GUARD_EPOCH)
        return self._process.stopped


class Share:
    """The memory of one peer that this engine has mapped.

    Attributes:
        sock: a connection to it that stays open; when it ends, the peer no longer waits for our guards.
        guards: one line a worker of ours.
        pid: of the peer, if the system lets us at the memory of that process; else 0.
        why: why it does not.
    """

    def __init__(self, answer: Answer, there: Sequence[int]) -> None:
        self.sock, body = answer.sock, answer.body
        self.segments: dict[int, tuple[int, Mapping]] = {}  # by number: the peer's address, our mapping
        self.maps = RegionTable("mapped memory", 1)
        with ExitStack() as undo:
            undo.callback(self.sock.close)
            self.keys = Mapping(answer.fds[0], KEYS_BYTES, writable=False)
            undo.callback(self.keys.close)
            self.guards = Mapping(answer.fds[1], GUARD_BYTES, writable=True)
            undo.callback(self.guards.close)
            self.pid, self.why = reachable(self.sock, int(body["word"]), int(body["nonce"]))
            self.learn(answer, there, 2)
            undo.pop_all()

    def learn(self, answer: Answer, there: Sequence[int], first: int) -> tuple[RegionTable, list[Mapping]]:
        """Map the segments that an answer brings, from descriptor `first` on.

        Returns the former table, and the mappings that are no longer there: workers may still use both. Raises OSError
        or CapacityError, with nothing changed.
        """
        segments = {number: known for number, known in self.segments.items() if number in there}
        with ExitStack() as undo:
            for (number, address, length), descriptor in zip(answer.body["segments"], answer.fds[first:], strict=True):
                mapping = Mapping(descriptor, int(length), writable=True)
                undo.callback(mapping.close)
                populate(mapping.address, mapping.length, writable=True)  # rather than by the first transfer
                segments[int(number)] = int(address), mapping
            table = RegionTable("mapped memory", max(1, len(segments)))
            for address, mapping in segments.values():
                table.add(address, mapping.length, (mapping.address,), 0)
            undo.pop_all()
        gone = [mapping for number, (_, mapping) in self.segments.items() if number not in segments]
        former, self.maps, self.segments = self.maps, table, segments
        return former, gone

    def close(self) -> None:
        """Unmap everything. Nobody may be copying."""
        for mapping in self.mappings:
            mapping.close()
        self.sock.close()

    @property
    def revoked(self) -> bool:
        """True if the peer has fenced this engine: nothing is copied any more by these mappings."""
        return ctypes.c_int64.from_address(self.guards.address + GUARD_EPOCH).value == 0

    @property
    def mappings(self) -> list[Mapping]:
        """All of them."""
        return [*(mapping for _, mapping in self.segments.values()), self.keys, self.guards]


class Retired(NamedTuple):
    """Mappings by which no entry goes that is posted from now on.

    Attributes:
        marks: queue pairs, and how far each was posted to before: once all that is answered, nobody uses them any more.
        table: by which those entries went.
        sock: to the peer, which does not wait for our guards once that is closed.
    """

    marks: list[tuple[StreamQueue, int]]
    table: RegionTable
    mappings: list[Mapping]
    sock: socket.socket | None

    @property
    def over(self) -> bool:
        """True once all that was posted before is answered."""
        return all(queue.row["tail"] >= head for queue, head in self.marks)


def reachable(sock: socket.socket, address: int, nonce: int) -> tuple[int, str]:
    """Find the process at the other end, if this one may read and write its memory: its pid, or 0 and why.

    The kernel says which process that is. Reading `nonce` at `address` there shows that its memory can be reached, and
    that it still is the process that answers.
    """
    pid = process_at(sock).pid
    if pid == 0:
        return 0, "it is in another process namespace"
    try:
        seen = Copier().look(pid, address)
    except OSError as error:
        return 0, str(error.strerror)
    if seen != nonce or has_ended(sock):
        return 0, "the process that listened there is another one"
    return pid, ""
