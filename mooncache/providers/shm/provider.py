"""Peers on the same host: bytes are copied once, straight from pages to pages, by the sender's workers.

    mapped    the peer's memory was allocated by an engine: its segment is mapped here. Our end is touched by a plain
              copy where this engine holds what keeps it mapped; else the kernel copies, for it may be gone
    PROCESS   any other memory: process_vm_writev and readv, where the system permits them
    LANE      where it does not, and for notifications: a connection, as over TCP

Keys are checked in the peer's own table, which is mapped here for reading, for every slice. A peer that withdraws a
range waits for the *guards*, words that are odd while a sender copies. A sender that is stopped in the middle of a copy
looks at an *epoch* before it goes on (`kernels/restartable.py`), and so need not be waited for. Who is handed these
mappings is of the same user or has proven to know the secret: it is trusted to look at the keys before it writes, as no
other kind of peer has to be. So it is handed only segments of which each byte is registered, for reading and for
writing: the rest goes the other two ways, as nothing can be both a mapping for reading only and a file that its user
cannot open for writing.

Nothing that a peer says about itself is believed: its process is what the kernel says of the socket, its memory must
be as long as it says, and sealed to stay so.

Mappings, and who holds them, are in `mappings`; the kernels that copy are in `copy`.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mooncache import limits
from mooncache.descriptor import Descriptor, Keys
from mooncache.discovery.dial import AnotherUser
from mooncache.discovery.messages import Reply, Request
from mooncache.errors import TransportError, UsageError
from mooncache.kernels.arrays import LINE, WORD, address_of
from mooncache.kernels.enums import Access
from mooncache.kernels.publication import publish
from mooncache.kernels.state import CompletionQueue, QueuePair
from mooncache.pages import populate
from mooncache.providers.base import Link
from mooncache.providers.careful import Copier
from mooncache.providers.keys import KeyTable
from mooncache.providers.shm.copy import GUARD_EPOCH, LOT, lead, poll_cq, post_send, push
from mooncache.providers.shm.mappings import KEYS_BYTES, Lease, Retired, Share
from mooncache.providers.stream.connections import STALL_S, StreamQueue
from mooncache.providers.stream.provider import StreamProvider
from mooncache.providers.stream.quotas import check_leases
from mooncache.providers.stream.waiting import wait_while_odd
from mooncache.segments import Segment, allocate, segment_of
from mooncache.shortage import none_left

log = logging.getLogger("mooncache")

RETIRE_S = 2e-3
"""Between two looks at whether mappings that were retired are still used: a lot of a copy takes some hundred us."""

_BOTH = Access.READ | Access.WRITE


class Shared(NamedTuple):
    """A registered range in allocated memory."""

    segment: Segment
    address: int
    length: int
    access: int


class Shm(StreamProvider):
    """Engines of other processes on the same host.

    Args:
        elsewhere: reach peers that share no memory as well, over TCP.
        lanes: connections of each worker to each peer.
    """

    name = "shm"
    post_send = post_send
    poll_cq = poll_cq
    push = push

    def __init__(self, *, elsewhere: bool = False, lanes: int = 1) -> None:
        super().__init__(lanes)
        self.elsewhere = elsewhere
        self._nonce = np.frombuffer(secrets.token_bytes(WORD), np.int64).copy()
        self._shared: dict[int, Shared] = {}  # by rkey
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()  # from before a peer has it until its connection ends
        self._shares: dict[str, Share | None] = {}
        self._retired: list[Retired] = []
        self._table = np.zeros(0, np.uint8)

    def open(
        self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = limits.PEERS
    ) -> list[list[CompletionQueue]]:
        """See `Provider.open`."""
        former = self._table, self.keys
        try:
            return super().open(workers, queue_depth, inbox, peers)
        except BaseException:
            self._table, self.keys = former
            raise

    def _connect_ports(self, workers: int) -> None:
        super()._connect_ports(workers)
        self._table = allocate(KEYS_BYTES, for_reading=True)
        self.keys = KeyTable(self._table.view(np.int64))
        self._copiers = [Copier(LOT) for _ in self.ports]
        for port, copier in zip(self.ports, self._copiers, strict=True):
            port.row["keys"] = self.keys.address
            port.row["copier"] = copier.address

    # ------------------------------------------------------------------------------ as a target
    def register(self, address: int, length: int, access: int) -> Keys:
        """See `Provider.register`."""
        keys = super().register(address, length, access)
        segment = segment_of(address, length)
        if segment is not None:
            populate(address, length, writable=True)
            self._shared[keys.rkeys[0]] = Shared(segment, address, length, access)
        return keys

    def unregister(self, keys: Keys) -> None:
        """See `Provider.unregister`."""
        super().unregister(keys)
        self._wait_for_guards()
        self._shared.pop(keys.rkeys[0], None)

    def _offered(self) -> dict[int, Segment]:
        """Return the segments that peers may map, by number: a peer that maps one can read and write all of it."""
        open_bytes: dict[int, int] = {}
        segments: dict[int, Segment] = {}
        for segment, address, length, access in list(self._shared.values()):
            segments[segment.number] = segment
            if access & _BOTH == _BOTH:
                end = min(address + length, segment.address + segment.nbytes)  # behind that is nothing of anybody's
                open_bytes[segment.number] = open_bytes.get(segment.number, 0) + max(0, end - address)
        return {number: s for number, s in segments.items() if open_bytes.get(number) == s.nbytes}

    def fence(self, caller: str, limit_s: float) -> int:
        """See `Provider.fence`."""
        ended = super().fence(caller, limit_s)
        with self._lock:
            leases = [lease for lease in self._leases if lease.peer == caller and not lease.ended]
        for lease in leases:
            lease.revoke()
        self._wait_for_guards(leases, limit_s)
        for lease in leases:
            lease.ended = True
            if lease.sock is not None:
                self.watcher.unwatch(lease.sock)  # by which the peer hears of it, and maps this memory anew
        return ended + len(leases)

    def _wait_for_guards(self, leases: Sequence[Lease] | None = None, limit_s: float = STALL_S) -> None:
        """Return when every copy of these peers, or all, that may have looked at its key before has ended."""
        if leases is None:
            with self._lock:
                leases = list(self._leases)
        for lease in leases:
            words = [(lease.guards, worker * LINE // WORD) for worker in range(limits.WORKERS)]
            wait_while_odd(words, lease, limit_s)

    def describe(self, unix: str = "") -> dict[str, Any]:
        """See `Provider.describe`."""
        return {**super().describe(), "unix": unix, "segments": sorted(self._offered())}

    def serve(self, request: Request) -> Reply:
        """See `Provider.serve`: a peer on this host asks for descriptors of our memory."""
        if request.purpose not in ("share", "segments"):
            return super().serve(request)
        if request.process is None:
            raise UsageError(f"{request.purpose!r} is answered over the Unix socket only")
        known = set(request.body["have"])
        wanted = {number: s for number, s in self._offered().items() if number not in known}
        held = {number: memory for number, s in wanted.items() if (memory := s.memory()) is not None}
        body: dict[str, Any] = {"segments": [[n, wanted[n].address, wanted[n].length] for n in held]}
        fds = [wanted[n].descriptor for n in held]
        if request.purpose == "segments":
            return Reply(body, fds, then=lambda sock, held=held: sock.close())  # type: ignore[misc]
        lease = Lease(request.caller, request.process)
        with self._lock:
            check_leases([lease.peer for lease in self._leases if not lease.ended], request.caller)
            self._leases.add(lease)  # the peer may copy before `_hold` is called
        own = [segment_of(address_of(array), array.nbytes) for array in (self._table, lease.guards)]
        body |= {"word": address_of(self._nonce), "nonce": int(self._nonce[0])}
        return Reply(
            body, [s.descriptor for s in own if s] + fds,
            then=lambda sock, held=held: self._hold(sock, lease),  # type: ignore[misc]
            undo=lambda: self._end(lease),
        )  # fmt: skip

    def _hold(self, sock: socket.socket, lease: Lease) -> None:
        if lease.ended:  # fenced meanwhile
            sock.close()
            return
        lease.sock = sock
        self.watcher.watch(sock, lambda: self._end(lease))

    def _end(self, lease: Lease) -> None:
        """End a lease whose peer is gone: its guards mean nothing any more."""
        lease.ended = True

    # ------------------------------------------------------------------------------ as an initiator
    def connect(self, peer: Descriptor, link: Link) -> list[list[QueuePair]]:
        """See `Provider.connect`."""
        share = self._shares.get(peer.name)
        if share is not None and share.revoked:
            self.let_go(peer.name)
        queue_pairs = super().connect(peer, link)
        share = self._shares.get(peer.name)
        try:
            if share is None:
                with ExitStack() as undo:
                    undo.callback(self.disconnect, peer.name)
                    self._shares[peer.name] = self._open_share(peer, link)
                    undo.pop_all()
            elif share.segments.keys() != set(peer.data["segments"]):
                self._learn(share, peer, link)
        except OSError as error:
            what = f"memory of peer {peer.name!r} at {peer.address} cannot be mapped here"
            raise none_left(error, what) or TransportError(f"{what}: {error.strerror}") from error
        except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise TransportError(
                f"what peer {peer.name!r} at {peer.address} says of its memory does not hold ({error!r}); use the same "
                "release on both ends"
            ) from error
        return queue_pairs

    def _open_share(self, peer: Descriptor, link: Link) -> Share | None:
        """Map a peer's memory, if it is on this host and offers that."""
        unix = peer.data.get("unix")
        if not unix:
            self._go_without(peer, "it was not opened for shared memory")
            return None
        segments = peer.data["segments"]
        try:
            answer = link.dial("share", {"have": []}, unix=unix, deadline=link.deadline)
        except AnotherUser as error:
            self._go_without(peer, str(error))
            return None
        except TransportError as error:
            if not isinstance(error.__cause__, ConnectionRefusedError):
                raise
            self._go_without(peer, "it is on another host")
            return None
        try:
            share = Share(answer, segments)
        finally:
            for descriptor in answer.fds:
                os.close(descriptor)
        try:
            self.watcher.watch(share.sock, partial(self._lost, peer.name, share))
        except OSError:
            share.close()
            raise
        if share.why:
            log.info(
                "peer %r: memory that no engine allocated goes over TCP, since process_vm_readv is refused: %s",
                peer.name, share.why,
            )  # fmt: skip
        if all(copier.restarts for copier in self._copiers):
            publish(share.guards.address + GUARD_EPOCH + WORD, 1)
        for queue in self.queues_of(peer.name):
            queue.row.put("keys", share.keys.address)
            queue.row.put("guards", share.guards.address)
            queue.row.put("pid", share.pid)
            queue.row.put("maps", share.maps.header.address)
        return share

    def _lost(self, peer: str, share: Share) -> None:
        """Note that a peer has closed its end of a share, or its process has ended."""
        if self._shares.get(peer) is share:
            log.info("peer %r on this host is gone: its memory is let go", peer)
            self.disconnect(peer)

    def _go_without(self, peer: Descriptor, why: str) -> None:
        if not self.elsewhere:
            raise TransportError(
                f"peer {peer.name!r} at {peer.address} cannot be reached by shared memory: {why}; use auto or tcp"
            )
        log.debug("peer %r is reached over TCP: %s", peer.name, why)

    def _learn(self, share: Share, peer: Descriptor, link: Link) -> None:
        """Map the segments that the peer has registered since the last time."""
        answer = link.dial("segments", {"have": sorted(share.segments)}, unix=peer.data["unix"], deadline=link.deadline)
        answer.sock.close()
        try:
            former, gone = share.learn(answer, peer.data["segments"], 0)
        finally:
            for descriptor in answer.fds:
                os.close(descriptor)
        self._retire(self.queues_of(peer.name), share.maps.header.address, Retired([], former, gone, None))

    def let_go(self, peer: str) -> None:
        """See `StreamProvider.let_go`."""
        share, queues = self._shares.pop(peer, None), self.queues_of(peer)
        if share is not None:
            for queue in queues:
                queue.row.put("pid", 0)
            self._retire(queues, 0, Retired([], share.maps, share.mappings, share.sock))

    def _retire(self, queues: Sequence[StreamQueue], maps: int, what: Retired) -> None:
        """Let queue pairs go by other maps. `look_around` lets go of what they went by, once they are done with it."""
        for queue in queues:
            lead(queue.address, maps)
        wait_while_odd([(queue.row, "posting") for queue in queues])
        marks = [(queue, queue.row["head"]) for queue in queues]
        with self._lock:
            self._retired.append(what._replace(marks=marks))
        self.watcher.stir()

    @property
    def patience(self) -> float | None:  # type: ignore[override]
        """See `StreamProvider`: nobody tells when entries that went by retired mappings are answered."""
        return RETIRE_S if self._retired else None

    def look_around(self) -> None:
        """See `StreamProvider.look_around`."""
        with self._lock:
            over = [retired for retired in self._retired if retired.over]
            self._retired = [retired for retired in self._retired if retired not in over]
        for retired in over:
            self._unmap(retired)

    def _unmap(self, retired: Retired) -> None:
        for mapping in retired.mappings:
            mapping.close()
        if retired.sock is not None:
            self.watcher.unwatch(retired.sock)

    def wire(self, peer: str) -> str:
        """See `Provider.wire`."""
        share = self._shares.get(peer)
        if share is None:
            return "tcp"
        return "shm, other memory by " + ("process_vm_writev" if share.pid else f"tcp ({share.why})")

    def close(self) -> None:
        """See `Provider.close`."""
        self.keys.clear()
        try:
            self._wait_for_guards()  # while peers that hang up are still noticed
        except TransportError as error:
            log.warning("closing all the same: %s", error)
        super().close()
        for retired in self._retired:
            self._unmap(retired)
        for share in self._shares.values():
            if share is not None:
                share.close()
        self._shares.clear()
        self._retired.clear()
        self._shared.clear()
        self._table = self._table[:0].copy()
