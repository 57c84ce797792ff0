"""RDMA: one-sided reads and writes by a NIC, posted and polled by the kernels through the NIC's own driver.

Python makes the resources, by pyverbs, and looks after connections; see `outgoing` and `incoming` for their two ends
and `notes` for notifications. A thread, the keeper, watches everything that can change: queue pairs that break, ports
that go down, and the sockets over which connections were asked for, whose end means that the peer is gone.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from mooncache import forks, limits
from mooncache.cuda import memory_kind
from mooncache.deadline import Deadline
from mooncache.descriptor import Descriptor, Keys
from mooncache.discovery.messages import Reply, Request
from mooncache.errors import CapacityError, DiscoveryError, EngineClosed, TransportError, UsageError, came
from mooncache.kernels import calls
from mooncache.kernels.enums import Access, Order
from mooncache.kernels.state import CompletionQueue, QueuePair, QueueRow
from mooncache.pages import populate
from mooncache.providers.base import Link, Provider
from mooncache.providers.rdma import gpu
from mooncache.providers.rdma.hub import NoteHub, NoteQueue
from mooncache.providers.rdma.incoming import Incoming
from mooncache.providers.rdma.nic import Nic, Registration
from mooncache.providers.rdma.outgoing import NOTE_S, Outgoing
from mooncache.providers.rdma.paths import VERSION, End, Plan
from mooncache.providers.rdma.ports import choose
from mooncache.providers.rdma.queues import QueuePair as Verbs
from mooncache.providers.rdma.queues import Remote

log = logging.getLogger("mooncache")

SIGNAL = 16
"""Work requests behind one completion: a sixteenth of the polling, and a queue of 512 still reports 32 times."""

CQ_ENTRIES = 16_384
"""The entries of one worker and NIC: 32 peers with full queues of which every work request fails at once."""

POPULATE_BYTES = 64 << 20
"""From here on pages are faulted in by several threads before a NIC pins them: 16,384 pages, 10 ms or so."""

KEEPER = "mooncache-rdma"
"""The thread that watches the sockets and NICs."""

SETTLE_S = 5.0
"""The time for workers to give back what a connection that is gone had under way, which takes microseconds."""


class Rdma(Provider):
    """A wire over verbs NICs: InfiniBand, RoCE, or Soft-RoCE.

    Args:
        devices: "device" or "device:port" names; None takes every active port.
        gid_index, interface, family: choose the GID by index, network interface, or "ipv4", "ipv6" or "ib".
        queue_pairs: to one peer, on each path, for each worker.
        signal: work requests behind one completion (`Settings.signal` goes before).
        timeout, retry_count: how long a NIC waits for an acknowledgement, 4.096 µs * 2**timeout, and how often it sends
            again. 14 and 6: 0.4 s until it gives up, up to four times that on some NICs. 7 is for ever on Soft-RoCE.
        region_bytes: longest registration; None takes what the NICs can do. Longer regions are cut.

    Raises:
        UsageError: a figure out of range.
    """

    name = "rdma"
    spins = True
    reaches_gpus = True

    def __init__(
        self, devices: Sequence[str] | None = None, *, gid_index: int | None = None, interface: str | None = None,
        family: str | None = None, queue_pairs: int = 2, signal: int = SIGNAL, timeout: int = 14, retry_count: int = 6,
        region_bytes: int | None = None,
    ) -> None:  # fmt: skip
        bounds: tuple[tuple[str, Any, int, int], ...] = (
            ("queue_pairs", queue_pairs, 1, limits.QUEUE_PAIRS // limits.NICS),
            ("signal", signal, 1, limits.QUEUE_DEPTH),
            ("timeout", timeout, 1, 31),
            ("retry_count", retry_count, 0, 7),
            ("region_bytes", region_bytes or 1, 1, 1 << 62),
        )
        for name, value, least, most in bounds:
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UsageError(f"expected {name} to be an integer from {least} to {most}, got {came(value)}")
        self._devices, self._gid = devices, (gid_index, interface, family)
        self.queue_pairs, self.signal, self._timeout, self._retries = queue_pairs, signal, timeout, retry_count
        self._region_bytes = region_bytes
        self.lock = threading.RLock()  # held while queue pairs are made, connected or destroyed
        self.nics: list[Nic] = []
        self.down: set[int] = set()  # indices of NICs whose port is down
        self.never = np.zeros(1, np.int64)
        self._registered: dict[tuple[int, ...], list[Registration]] = {}
        self._outgoing: dict[str, Outgoing] = {}
        self._incoming: dict[int, Incoming] = {}
        self._note_queues: dict[str, list[NoteQueue]] = {}
        self._spare_notes: list[list[NoteQueue]] = []  # of peers that were forgotten
        self._closed = False

    # -------------------------------------------------------------------------- opening
    def open(
        self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = limits.PEERS
    ) -> list[list[CompletionQueue]]:
        """See `Provider.open`."""
        if peers > limits.PEERS:
            raise CapacityError(f"expected at most {limits.PEERS} peers over rdma, got {peers}")
        if self.nics:
            raise TransportError("this rdma provider is open already; each engine needs one of its own")
        gid_index, interface, family = self._gid
        choices = choose(self._devices, gid_index=gid_index, interface=interface, family=family)
        if len(choices) > limits.NICS:
            raise CapacityError(
                f"expected at most {limits.NICS} ports, there are {len(choices)}: name some, Rdma(['mlx5_0', ...])"
            )
        self._depth, self.instance = queue_depth, secrets.randbits(62)
        with ExitStack() as undo:
            for choice in choices:
                self.nics.append(Nic(choice))
                undo.callback(self.nics[-1].close)
            self.ends = [
                End(nic.gid, nic.lid, nic.mtu, nic.limits.max_rd_atomic, nic.port.rate_gbps) for nic in self.nics
            ]
            most = min(nic.limits.max_mr_size for nic in self.nics)
            self.region_bytes = min(self._region_bytes or most, most, 1 << 62)
            self.cqs = [
                [nic.completion_queue(min(CQ_ENTRIES, nic.limits.max_cqe)) for nic in self.nics] for _ in range(workers)
            ]
            self.hub = NoteHub(self.nics, workers, inbox)
            self._open_keeper(workers, undo)
            undo.callback(self._end_keeper)  # a signal handler may raise while it is started
            self.background.start(KEEPER, self._keep, self._unwatched)
            undo.pop_all()
        return [
            [*(CompletionQueue(cq.address, cq.capacity) for cq in own), self.hub.completion_queue(worker)]
            for worker, own in enumerate(self.cqs)
        ]

    def _open_keeper(self, workers: int, undo: ExitStack) -> None:
        self._watched = select.epoll()
        undo.callback(self._watched.close)
        forks.private(self)
        self.trouble_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        undo.callback(os.close, self.trouble_fd)
        self.descriptors = [[channel.fd for channel in self.hub.channels], *([] for _ in range(workers - 1))]
        self._sockets: dict[int, tuple[socket.socket, Outgoing | Incoming]] = {}
        self._watched.register(self.trouble_fd, select.EPOLLIN)
        for nic in self.nics:
            self._watched.register(nic.async_fd, select.EPOLLIN)

    def ends_now(self) -> list[End]:
        """Return our NICs, and whether each is up."""
        return [end._replace(up=index not in self.down) for index, end in enumerate(self.ends)]

    def depth_on(self, nic: Nic) -> int:
        """Return the work requests in flight on one queue pair of a NIC."""
        return min(self._depth, nic.limits.max_qp_wr)

    def connect_pair(self, verbs: Verbs, end: End, number: int, psn: int, remote_psn: int, plan: Plan) -> None:
        """Connect one end of a queue pair to the queue pair `number` at the peer's NIC."""
        verbs.connect(
            Remote(number, end.gid, end.lid), psn=psn, remote_psn=remote_psn, mtu=plan.mtu, rd_atomic=plan.rd_atomic,
            timeout=self._timeout, retry_count=self._retries, rnr_retry=7,
        )  # fmt: skip

    # -------------------------------------------------------------------------- memory
    def register(self, address: int, length: int, access: int) -> Keys:
        """See `Provider.register`: with every NIC. A GPU's memory by dma-buf, or else by its driver's peer memory."""
        on_gpu = memory_kind(address) == "gpu"
        by_dmabuf = on_gpu and gpu.choose(address, length) == "dma-buf"
        if not on_gpu and length >= POPULATE_BYTES:
            populate(address, length, bool(access & Access.LOCAL))
        made: list[Registration] = []
        try:
            for nic in self.nics:
                if by_dmabuf:
                    made.append(self._register_dmabuf(nic, address, length, access))
                else:
                    made.append(nic.register(address, length, access))
        except BaseException:
            for registration in made:
                registration.close()
            raise
        keys = Keys(tuple(r.lkey for r in made), tuple(r.rkey for r in made))
        self._registered[keys.rkeys] = made
        return keys

    @staticmethod
    def _register_dmabuf(nic: Nic, address: int, length: int, access: int) -> Registration:
        buffer = gpu.dmabuf_fd(address, length)
        try:
            return nic.register_dmabuf(buffer.fd, buffer.offset, length, address, access)
        finally:
            os.close(buffer.fd)

    def unregister(self, keys: Keys) -> None:
        """See `Provider.unregister`."""
        for registration in self._registered.pop(keys.rkeys):
            registration.close()

    # -------------------------------------------------------------------------- as a target
    def describe(self, unix: str = "") -> dict[str, Any]:
        """See `Provider.describe`."""
        return {"rdma": VERSION, "instance": self.instance, "nics": [end.told() for end in self.ends_now()]}

    def serve(self, request: Request) -> Reply:
        """See `Provider.serve`: a peer connects, or has its queue pairs fenced or connected anew."""
        body = request.body
        if request.purpose == "rdma-connect":
            if body["instance"] != self.instance:
                raise DiscoveryError("this engine was opened anew since the caller looked it up; look it up again")
            with self.lock:
                self._check_open()
                if int(body["connection"]) in self._incoming:
                    raise UsageError(f"connection {body['connection']} exists already")
                incoming = Incoming(self, request.caller, body)
                self._incoming[incoming.number] = incoming
            return Reply(
                incoming.answer, then=lambda sock: self._hold(sock, incoming),
                undo=lambda: self._let_go(lambda known: known is incoming),
            )  # fmt: skip
        if request.purpose == "rdma-retire":
            self._let_go(lambda known: known.number == body["connection"] and known.caller == request.caller)
            return Reply({})
        if request.purpose in ("rdma-fence", "rdma-repair"):
            with self.lock:
                self._check_open()
                known = self._incoming.get(body["connection"])
                if known is None or known.caller != request.caller:
                    why = "this engine was opened anew, or took its peer for gone"
                    raise UsageError(f"no connection {body['connection']} here: {why}")
                return Reply(known.fence(body) if request.purpose == "rdma-fence" else known.repair(body))
        raise UsageError(f"expected a purpose of describe or rdma-connect, got {request.purpose!r}")

    def fence(self, caller: str, limit_s: float) -> int:
        """See `Provider.fence`: destroying our end of a queue pair drops whatever still comes for it."""
        return self._let_go(lambda known: known.caller == caller)

    def _let_go(self, chosen: Callable[[Incoming], bool]) -> int:
        """End the chosen connections of peers; return how many. Nothing of theirs reaches our memory any more."""
        with self.lock:
            ended = [known for known in self._incoming.values() if chosen(known)]
            for known in ended:
                del self._incoming[known.number]
                known.close()
        return len(ended)

    @property
    def unsettled(self) -> int:
        """See `Provider.unsettled`."""
        return sum(outgoing.unsettled for outgoing in list(self._outgoing.values()))

    def settle(self, limit_s: float) -> None:
        """See `Provider.settle`."""
        Deadline(limit_s).until(lambda: not any(o.settler.in_doubt for o in list(self._outgoing.values())))

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")

    def _hold(self, sock: socket.socket, connection: Outgoing | Incoming) -> None:
        """Watch the socket over which a connection was asked for."""
        with self.lock:
            connection.socket = sock
            if self._closed or (isinstance(connection, Incoming) and connection.number not in self._incoming):
                sock.close()  # it was fenced meanwhile
                return
            self._sockets[sock.fileno()] = sock, connection
            self._watched.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def forget_socket(self, sock: socket.socket) -> None:
        """Stop watching a connection's socket, which is about to be closed."""
        with self.lock:
            if self._sockets.pop(sock.fileno(), None) is not None:
                with suppress(OSError):
                    self._watched.unregister(sock.fileno())

    # -------------------------------------------------------------------------- as an initiator
    def connect(self, peer: Descriptor, link: Link) -> list[list[QueuePair]]:
        """See `Provider.connect`."""
        known = self._outgoing.get(peer.name)
        if known is not None and not known.gone and known.generation == peer.generation:
            return known.pairs
        if known is not None:
            known.lose("another engine has its name now")
            self._end(known, link.deadline)
            known.retire(link)  # nothing of it may land over what is sent next
        notes = self._note_queues.get(peer.name)
        if notes is None and self._spare_notes:
            notes = self._note_queues[peer.name] = self._spare_notes.pop()
        if notes is None:
            cq = len(self.nics)
            notes = [self.hub.queue_pair(worker, cq) for worker in range(len(self.cqs))]
            self._note_queues[peer.name] = notes
        with self.lock:
            self._check_open()
        outgoing = Outgoing(self, peer, link, notes)
        assert outgoing.socket is not None
        self._outgoing[peer.name] = outgoing
        self._hold(outgoing.socket, outgoing)
        return outgoing.pairs

    def _end(self, outgoing: Outgoing, deadline: Deadline) -> None:
        """Close a connection that is gone, once the workers have nothing to do with it any more."""
        limit = deadline.within(SETTLE_S)
        limit.waits_for(f"what is under way to peer {outgoing.peer!r}")
        if not limit.until(lambda: outgoing.quiet):
            raise TransportError(f"what is under way to peer {outgoing.peer!r} did not come back; try again")
        outgoing.close()

    def start(self, peer: str, queues: Sequence[QueueRow], ctl: int) -> None:
        """See `Provider.start`."""
        self._outgoing[peer].start(queues, self._orders(ctl))

    def _orders(self, ctl: int) -> Callable[[QueueRow, Order], None]:
        def order(row: QueueRow, what: Order) -> None:
            with self.lock:
                calls.order(ctl, row.worker, row.address, what.value)

        return order

    def connected(self, peer: str) -> bool:
        """See `Provider.connected`."""
        return not self._outgoing[peer].gone

    def disconnect(self, peer: str) -> None:
        """See `Provider.disconnect`."""
        if peer in self._outgoing:
            self._outgoing[peer].lose("this engine ended it")

    def quiet(self, peer: str) -> bool:
        """See `Provider.quiet`."""
        known = self._outgoing.get(peer)
        return known is None or (known.quiet and not known.settler.in_doubt)

    def forget(self, peer: str) -> None:
        """See `Provider.forget`."""
        outgoing, notes = self._outgoing.pop(peer, None), self._note_queues.pop(peer, None)
        if outgoing is not None:
            outgoing.close()
        if notes is not None:
            self._spare_notes.append(notes)

    def wire(self, peer: str) -> str:
        """See `Provider.wire`."""
        return self._outgoing[peer].wire() if peer in self._outgoing else self.name

    # -------------------------------------------------------------------------- the keeper
    def _keep(self) -> None:
        """Look after NICs, queue pairs and peers, in a thread of its own."""
        by_descriptor = {nic.async_fd: index for index, nic in enumerate(self.nics)}
        while not self._closed:
            for descriptor, _ in self._watched.poll(NOTE_S / 2):
                if descriptor == self.trouble_fd:
                    with suppress(BlockingIOError):
                        os.eventfd_read(descriptor)
                elif descriptor in by_descriptor:
                    self._look_at_events(by_descriptor[descriptor])
                else:
                    self._hung_up(descriptor)
            for outgoing in list(self._outgoing.values()):
                outgoing.look_at_note()
                outgoing.stir()

    def _unwatched(self, error: Exception) -> None:
        """Count all peers as gone: the keeper failed, and nothing would be mended, no end be noticed."""
        for outgoing in list(self._outgoing.values()):
            outgoing.lose(f"nobody looks after it: {error}")

    def _look_at_events(self, index: int) -> None:
        nic = self.nics[index]
        try:
            while (event := nic.next_event()) is not None:
                if event.name in ("PORT_ERR", "DEVICE_FATAL"):
                    self._take_down(index, event.name)
                elif event.name == "PORT_ACTIVE":
                    log.warning("RDMA port %s is active again", nic.port.name)
                    self.background.settled(f"RDMA port {nic.port.name}")
                    self.down.discard(index)
        except TransportError as error:  # the device is gone, and tells nothing more
            self._watched.unregister(nic.async_fd)
            self._take_down(index, str(error))

    def _take_down(self, index: int, why: str) -> None:
        """Take a port down that reaches nobody: what is on it goes over the others, if there are any."""
        port = self.nics[index].port.name
        if self.background.note(f"RDMA port {port}", why):
            log.warning("RDMA port %s: %s", port, why)
        self.down.add(index)
        for outgoing in list(self._outgoing.values()):
            outgoing.fail_nic(index)

    def _hung_up(self, descriptor: int) -> None:
        with self.lock:
            found = self._sockets.get(descriptor)
            if found is None:
                return
            self.forget_socket(found[0])
        connection = found[1]
        if isinstance(connection, Outgoing):
            connection.lose("it hung up")
        else:
            self._let_go(lambda known: known is connection)

    # -------------------------------------------------------------------------- the end
    def hang_up(self) -> None:
        """See `Provider.hang_up`."""
        for outgoing in list(self._outgoing.values()):
            outgoing.lose("the engine is closed")

    def close(self) -> None:
        """See `Provider.close`."""
        self._end_keeper()
        for outgoing in self._outgoing.values():
            outgoing.close()
        with self.lock:
            while self._incoming:
                self._incoming.popitem()[1].close()
        self.hub.acknowledge()
        for nic in self.nics:
            nic.close()
        self._watched.close()
        descriptor, self.trouble_fd = self.trouble_fd, -1
        forks.drop([descriptor])

    def _end_keeper(self) -> None:
        with self.lock:
            self._closed = True
        if self.trouble_fd >= 0:
            os.eventfd_write(self.trouble_fd, 1)
        self.background.stop()
        self.background.join(KEEPER)

    def disown(self) -> None:
        """Close nothing in a forked child; NICs and sockets do so by themselves; see `forks.Holder`."""
        self._closed = True
        self._watched.close()
        forks.drop([self.trouble_fd])
