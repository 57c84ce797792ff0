"""The common part of providers over connected sockets: queue pairs whose entries travel in lanes.

    engine A                                                engine B
    queue pair of worker 0 for B  ==lane==>  a lane of some worker of B   -->  B's pages, under B's keys
    a lane of some worker of A    <==lane==  queue pair of B's worker 0 for A

Each side's queue pairs send requests over lanes of their own; a peer's requests come in over the peer's lanes. Python
opens and closes (see `connections`), the workers' kernels do the rest (see `lane`).
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from mooncache import limits
from mooncache.deadline import Deadline
from mooncache.descriptor import Descriptor, Keys
from mooncache.discovery.complaints import Complaints
from mooncache.discovery.messages import Reply, Request
from mooncache.errors import CapacityError, DiscoveryError, EngineClosed, TransportError, UsageError, came
from mooncache.kernels.arrays import Row, address_of, rows_of
from mooncache.kernels.jit import Callback
from mooncache.kernels.records.table import TABLE
from mooncache.kernels.state import CompletionQueue, QueuePair
from mooncache.providers.base import Link
from mooncache.providers.device import Queue, SoftwareProvider
from mooncache.providers.stream import lane as lanes
from mooncache.providers.stream.connections import (
    LANES_MOST,
    STALL_S,
    Arrival,
    Lane,
    Port,
    StreamQueue,
    Ticket,
    cut,
    give_up,
    set_lane_options,
)
from mooncache.providers.stream.lane import LaneState, Reason
from mooncache.providers.stream.quotas import check_lanes
from mooncache.providers.stream.records import ENTRY, PORT, QUEUE
from mooncache.providers.stream.settler import StreamSettler
from mooncache.providers.stream.waiting import wait_until, wait_while_odd
from mooncache.providers.stream.watcher import Watcher
from mooncache.shortage import none_left

log = logging.getLogger("mooncache")


class StreamProvider(SoftwareProvider):
    """A provider whose peers are reached over connections. Subclasses say how entries travel.

    Args:
        lanes: connections of each worker to each peer.
    """

    push: Callback
    queue_record, port_record, entry = QUEUE, PORT, ENTRY
    queue_type = StreamQueue
    spins = False
    patience: float | None = None  # seconds until the watching thread looks around unasked

    def __init__(self, lanes: Any = 1) -> None:
        super().__init__()
        if not isinstance(lanes, int) or isinstance(lanes, bool) or not 1 <= lanes <= LANES_MOST:
            raise UsageError(f"expected lanes to be an integer from 1 to {LANES_MOST}, got {came(lanes)}")
        self.lane_count = lanes
        self._lock = threading.Lock()
        self.generations: dict[str, int] = {}
        self._arrivals: set[Arrival] = set()
        self._settlers: dict[str, StreamSettler] = {}
        self._left_unsettled = 0  # when it was closed
        self._parting: set[str] = set()  # peers that were disconnected, and not connected to since
        self._nowhere = Row(rows_of(TABLE))  # header of a table for queue pairs that lead to no peer
        self._closed = False
        self._complaints = Complaints(log)

    def open(
        self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = limits.PEERS
    ) -> list[list[CompletionQueue]]:
        """See `Provider.open`."""
        queues = super().open(workers, queue_depth, inbox, peers)
        self._inbox = inbox
        self.watcher = Watcher()
        with ExitStack() as undo:
            undo.callback(self.watcher.close)
            self.ports: list[Port] = []
            for i, own in enumerate(self.lists):
                self.ports.append(Port(own, i, self.keys, inbox, self.watcher.trouble_fd))
                undo.callback(self.ports[-1].close)
            self._connect_ports(workers)
            undo.callback(self._end_threads)  # a signal handler may raise while this one is started
            self.background.start("mooncache-lanes", self._watch, lambda error: self.hang_up())
            undo.pop_all()
        return queues

    def _connect_ports(self, workers: int) -> None:
        self._ports = np.array([port.address for port in self.ports], np.int64)
        for port in self.ports:
            port.row.set(ports=address_of(self._ports), port_count=workers)
        self.descriptors = [[port.epoll.fileno()] for port in self.ports]

    # ------------------------------------------------------------------------------ as a target
    def describe(self, unix: str = "") -> dict[str, Any]:
        """See `Provider.describe`."""
        return {"lanes": lanes.FRAMES_VERSION}

    def serve(self, request: Request) -> Reply:
        """See `Provider.serve`: a peer asks for a lane to us, or to let go of those it took for lost."""
        if request.purpose == "retire":
            for queue, round in request.body["tickets"]:
                self._end_rounds(Ticket(int(queue), int(round)))
            return Reply({})
        if request.purpose != "lane":
            raise UsageError(f"expected a purpose of describe, lane or retire, got {request.purpose!r}")
        if request.body.get("lanes") != lanes.FRAMES_VERSION:
            raise DiscoveryError(
                f"this engine speaks frames of version {lanes.FRAMES_VERSION}, the caller "
                f"{request.body.get('lanes')!r}; use the same release on both ends"
            )
        ticket = Ticket(int(request.body["queue"]), int(request.body["round"]))
        self._end_rounds(ticket._replace(round=ticket.round - 1))  # whose bytes must not land over what is sent next
        with self._lock:
            check_lanes([lane.peer for port in self.ports for lane in port.lanes if lane.incoming], request.caller)
            arrival = Arrival(request.caller, ticket, *self._reserve())
            self._arrivals.add(arrival)
        return Reply({}, then=lambda sock: self._accept(sock, arrival), undo=lambda: self._turn_away(arrival))

    def _reserve(self) -> tuple[Port, Lane]:
        """Reserve a lane of the port that serves the fewest and has one left. Raises CapacityError."""
        ports = sorted(self.ports, key=lambda port: port.load)
        for port in ports[:-1]:
            with suppress(CapacityError):
                return port, port.reserve(1)[0]
        return ports[-1], ports[-1].reserve(1)[0]

    def _turn_away(self, arrival: Arrival) -> None:
        self._arrivals.discard(arrival)
        arrival.port.release([arrival.lane])

    def _end_rounds(self, ticket: Ticket) -> None:
        """Let nothing land any more of a peer's queue pair on connections up to a round: it took them for lost."""
        self._refuse(lambda _, known: known.queue == ticket.queue and known.round <= ticket.round, STALL_S)

    def fence(self, caller: str, limit_s: float) -> int:
        """See `Provider.fence`."""
        return self._refuse(lambda known, _: known == caller, limit_s)

    def _refuse(self, chosen: Callable[[str, Ticket], bool], limit_s: float) -> int:
        """Let nothing land any more on the chosen incoming connections, attached already or promised; how many."""
        with self._lock:
            promised = [a for a in self._arrivals if chosen(a.caller, a.ticket)]
            for arrival in promised:
                arrival.refused = True
            refused = [
                (port, lane)
                for port in self.ports
                for lane in port.lanes
                if lane.state in (LaneState.READY, LaneState.LIVE)
                and not lane.row["queue"]
                and chosen(lane.peer, lane.ticket)
            ]
            for port, lane in refused:
                cut(port.address, lane.address)
        wait_while_odd([(lane.row, "moving") for _, lane in refused], limit_s=limit_s)
        return len(promised) + len(refused)

    def _accept(self, sock: socket.socket, arrival: Arrival) -> None:
        set_lane_options(sock, ours=False)
        with self._lock:
            if self._closed or arrival.refused:
                self._turn_away(arrival)
                sock.close()
                return
            self._arrivals.discard(arrival)
            arrival.port.attach(arrival.lane, sock, None, arrival.caller, arrival.ticket)

    def unregister(self, keys: Keys) -> None:
        """See `Provider.unregister`."""
        self.keys.remove(keys.rkeys[0])
        wait_while_odd([(lane.row, "moving") for port in self.ports for lane in list(port.lanes)])

    # ------------------------------------------------------------------------------ as an initiator
    def connect(self, peer: Descriptor, link: Link) -> list[list[QueuePair]]:
        """See `Provider.connect`."""
        if not isinstance(peer.data, dict) or peer.data.get("lanes") != lanes.FRAMES_VERSION:
            raise TransportError(
                f"peer {peer.name!r} at {peer.address} uses provider {peer.provider!r}, which speaks other frames than "
                f"this engine's {self.name!r}; use tcp, shm or auto of one release on both ends"
            )
        with self._lock:
            if peer.name not in self.peers:
                self._add_queues(peer.name, self.keys)
        ours = self.queues_of(peer.name)
        if peer.name in self._parting:
            former = f"the end of the former connections to {peer.name!r}"
            wait_until(lambda: self._ended(peer.name), former, link.deadline)
            self._parting.discard(peer.name)
        if self.generations.get(peer.name, peer.generation) != peer.generation:
            self._part(peer.name, ours, link.deadline)
            self.let_go(peer.name)
        self.generations[peer.name] = peer.generation
        settler = self._settler_of(peer.name, link, ours)
        seen = settler.counters.breaks
        for queue in ours:
            queue.row.put("table", link.table.address)
        broken = [(port, queue) for port, queue in zip(self.ports, ours, strict=True) if queue.broken]
        for i, (port, queue) in enumerate(broken):
            try:
                self._open_lanes(port, queue, peer.name, link)
            except BaseException:
                self._cut(queue for _, queue in broken[:i])
                raise
        settler.counters.confirm(seen)  # by now the peer has retired whatever had ended
        return [[queue.pair._replace(push=self.push.address)] for queue in ours]

    def _settler_of(self, peer: str, link: Link, queues: Sequence[StreamQueue]) -> StreamSettler:
        """Make a settler that asks where the peer is now."""
        former = self._settlers.get(peer)
        settler = self._settlers[peer] = StreamSettler(
            peer, link, self.background, self._lock, list(zip(self.ports, queues, strict=True)), self._open_lanes
        )
        if former is not None:
            former.close()
        settler.look()
        return settler

    def connected(self, peer: str) -> bool:
        """See `Provider.connected`."""
        return not any(queue.broken for queue in self.queues_of(peer))

    def queues_of(self, peer: str) -> list[StreamQueue]:
        """Return the queue pairs to a peer, one a worker."""
        return self._queues_of(peer)

    def disconnect(self, peer: str) -> None:
        """See `Provider.disconnect`."""
        if peer in self.peers:
            self._parting.add(peer)
            for queue in self.queues_of(peer):
                give_up(queue.address)
            self.let_go(peer)
            self._cut(self.queues_of(peer))

    def _cut(self, queues: Iterable[StreamQueue]) -> None:
        """Let the connections of these end."""
        with self._lock:  # so that no lane becomes another connection's
            for queue in queues:
                for lane in queue.lanes if not queue.broken else ():
                    cut(queue.row["port"], lane.address)

    def quiet(self, peer: str) -> bool:
        """See `Provider.quiet`."""
        if peer not in self.peers:
            return True
        doubtful = peer in self._settlers and self._settlers[peer].in_doubt
        return self._ended(peer) and not doubtful and not any(queue.in_doubt for queue in self.queues_of(peer))

    def _ended(self, peer: str) -> bool:
        """Return whether all connections to a peer have ended, and workers have reported what was on them."""
        return all(queue.broken and queue.settled for queue in self.queues_of(peer))

    def forget(self, peer: str) -> None:
        """See `Provider.forget`."""
        if peer in self.peers:
            for queue in self.queues_of(peer):
                queue.row.put("table", self._nowhere.address)
        super().forget(peer)
        settler = self._settlers.pop(peer, None)
        if settler is not None:
            settler.close()
        self.generations.pop(peer, None)
        self._parting.discard(peer)

    def let_go(self, peer: str) -> None:
        """Free what a subclass holds of an engine that had a peer's name and is gone."""

    def _part(self, peer: str, queues: Sequence[StreamQueue], deadline: Deadline) -> None:
        """Another engine has a peer's name. The former may still be there, or have gone without a word: what is under
        way to it may finish, then its connections end."""
        with suppress(TransportError):
            wait_until(
                lambda: all(q.broken or q.outstanding == 0 for q in queues), f"what is under way to {peer!r}", deadline
            )
        self._cut(queues)
        wait_until(
            lambda: all(q.broken and q.settled for q in queues), f"the end of the former peer {peer!r}", deadline
        )

    def hang_up(self) -> None:
        """See `Provider.hang_up`."""
        with self._lock:
            for port in self.ports:
                for lane in port.lanes:
                    cut(port.address, lane.address)

    def _open_lanes(self, port: Port, queue: StreamQueue, peer: str, link: Link) -> None:
        """Connect a queue pair that is new or broken."""
        with queue.connecting:
            if queue.broken:
                self._connect_anew(port, queue, peer, link)

    def _connect_anew(self, port: Port, queue: StreamQueue, peer: str, link: Link) -> None:
        wait_until(lambda: queue.settled, f"what is under way to peer {peer!r}", link.deadline)
        queue.ticket = Ticket(queue.ticket.queue, queue.ticket.round + 1)
        socks: list[socket.socket] = []
        try:
            for _ in range(self.lane_count):
                asked = {"lanes": lanes.FRAMES_VERSION, **queue.ticket._asdict()}
                socks.append(link.dial("lane", asked, deadline=link.deadline).sock)
                set_lane_options(socks[-1], ours=True)
            with self._lock:
                if self._closed:
                    raise EngineClosed("the engine was closed meanwhile")
                queue.settle(queue.row["doubt"])  # the peer has retired the former connections
                queue.take(port, socks, peer)
        except BaseException as error:
            for sock in socks:
                sock.close()
            if isinstance(error, OSError):
                hung_up = f"peer {peer!r} hung up while it was connected to: {error.strerror}"
                raise none_left(error, f"no connection to peer {peer!r}") or TransportError(hung_up) from error
            raise

    def prepare(self, queue: Queue, worker: int) -> None:
        """See `SoftwareProvider.prepare`."""
        queue.row["port"] = self.ports[worker].address
        queue.row["table"] = self._nowhere.address

    # ------------------------------------------------------------------------------ the rest
    def _watch(self) -> None:
        """In a thread of its own: say why lanes broke, once each, and notice peers that hang up. Should it fail, all
        connections are cut, since nobody would have noticed their end; submits connect anew."""
        while not self._closed:
            self.watcher.wait(self.patience)
            for lane in [lane for port in self.ports for lane in port.lanes]:
                self._tell(lane)
            for settler in list(self._settlers.values()):
                settler.look()
            self.look_around()

    @property
    def unsettled(self) -> int:
        """See `Provider.unsettled`."""
        return self._left_unsettled + sum(settler.slices for settler in list(self._settlers.values()))

    def settle(self, limit_s: float) -> None:
        """See `Provider.settle`."""
        Deadline(limit_s).until(lambda: not any(s.in_doubt for s in list(self._settlers.values())))

    def look_around(self) -> None:
        """Do a subclass's work in the watching thread, after whatever woke it."""

    def _tell(self, lane: Lane) -> None:
        """Say why a lane's connection ended, once; until then nobody else gets the lane."""
        if lane.state != LaneState.BROKEN or lane.told:
            return
        reason = lane.row["reason"]
        incoming = lane.row["queue"] == 0
        if reason != Reason.SIBLING:
            quiet = reason == Reason.CUT or (reason == Reason.CLOSED and not lane.busy)
            way = "from" if incoming else "to"
            if quiet:
                log.info("connection %s peer %r ended: %s", way, lane.peer, lane.why())
            else:
                self._complaints.tell(
                    f"peer {lane.peer!r}", f"connection {way} peer %r ended: %s", lane.peer, lane.why()
                )
        lane.told = True

    def close(self) -> None:
        """See `Provider.close`."""
        self.keys.clear()
        self._end_threads()
        self._left_unsettled = self.unsettled
        self._settlers.clear()  # they hold this provider
        self._complaints.close()
        for port in self.ports:
            port.close()
        self.watcher.close()
        self.give_up_memory()
        self._inbox = self._inbox[:0].copy()
        self.keys.release()

    def _end_threads(self) -> None:
        with self._lock:
            self._closed = True
        for settler in self._settlers.values():
            settler.close()
        self.watcher.stop()
        self.background.close()
