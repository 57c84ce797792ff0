"""What providers over connected sockets share: queue pairs whose entries travel in lanes, and the lanes' Python side.

    engine A                                                engine B
    queue pair of worker 0 for B  ==lane==>  a lane of some worker of B   -->  B's pages, under B's keys
    a lane of some worker of A    <==lane==  queue pair of B's worker 0 for A

Each side's queue pairs send requests over lanes of their own; a peer's requests come in over the peer's lanes. Python
opens and closes, the workers' kernels do the rest (see `lanes`).
"""

from __future__ import annotations

import ipaddress
import logging
import mmap
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from mooncache import limits
from mooncache.discovery.listener import Reply, Request
from mooncache.errors import CapacityError, DiscoveryError, EngineClosed, TransportError, UsageError
from mooncache.kernels.atomics import add, call_write, fence, load, peek, poke, store, u32
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import WORD, aligned
from mooncache.kernels.linux import (
    EPOLL_EVENT_BYTES,
    EPOLL_EVENT_DATA,
    EPOLLET,
    EPOLLIN,
    IOVEC_BYTES,
    MSGHDR_BYTES,
    epoll_add,
)
from mooncache.kernels.state import CompletionQueue, QueuePair, address_of, function_address
from mooncache.kernels.verbs import (
    POLL_AGAIN,
    SGE_ADDR,
    SGE_LENGTH,
    WC_BYTES,
    WR_ID,
    WR_OPCODE,
    WR_REMOTE_ADDR,
    WR_RKEY,
    WR_SG_LIST,
    WcStatus,
)
from mooncache.providers import lanes
from mooncache.providers.base import Descriptor, Keys, Link
from mooncache.providers.frames import FRAME_SLICES, HEAD_BYTES_MAX, HEADER_BYTES, SLICE_BYTES_MAX
from mooncache.providers.lanes import (
    ENTRY_WORDS,
    FLIGHT_WORDS,
    FLIGHTS,
    LANE_WORDS,
    PENDING,
    LaneState,
    Reason,
    enlist,
    entry_of,
    word_at,
)
from mooncache.providers.software import (
    CQ_COUNT,
    CQ_QUEUES,
    CQ_TURN,
    Q_HEAD,
    Q_LIMIT,
    Q_TAIL,
    Device,
    KeyTable,
    Queue,
    SoftwareProvider,
    write_completion,
)

log = logging.getLogger("mooncache")

STALL_S = 10.0
"""Seconds without a byte, with something under way, after which a lane counts as broken: a stopped or hung peer."""

SETTLE_S = 5.0
"""Seconds for workers to answer what was on a broken queue pair, before it is connected again."""

BUFFER_BYTES = 4 << 20
"""Socket buffers, if the system allows: two frames of 64 KiB slices would be more, but loopback gains nothing above."""

ZERO_BYTES = SLICE_BYTES_MAX
MAP_NORESERVE = 0x4000
LANES_MOST = 16


# ------------------------------------------------------------------------------ kernels
@kernel
def post_entry(queue, wr, route):
    """Append one work request to the queue's ring; False when the queue is full."""
    head = word_at(queue, Q_HEAD)
    if head - word_at(queue, Q_TAIL) >= word_at(queue, Q_LIMIT):
        return False
    sge, entry = peek(wr + WR_SG_LIST), entry_of(queue, head)
    gone = word_at(queue, lanes.Q_BROKEN) != 0
    poke(entry + lanes.E_ID * WORD, peek(wr + WR_ID))
    poke(entry + lanes.E_LOCAL * WORD, peek(sge + SGE_ADDR))
    poke(entry + lanes.E_REMOTE * WORD, peek(wr + WR_REMOTE_ADDR))
    poke(entry + lanes.E_LENGTH * WORD, np.int64(u32(sge + SGE_LENGTH)[0]))
    poke(entry + lanes.E_OPCODE * WORD, np.int64(u32(wr + WR_OPCODE)[0]))
    poke(entry + lanes.E_KEY * WORD, peek(wr + WR_RKEY))
    poke(entry + lanes.E_ROUTE * WORD, route)
    poke(entry + lanes.E_STATUS * WORD, np.int64(WcStatus.REM_ABORT_ERR) if gone else np.int64(PENDING))
    store(queue + Q_HEAD * WORD, head + 1)
    return True


@kernel
def list_lanes(queue):
    """Let the next poll look at what was posted to this queue."""
    for i in range(word_at(queue, lanes.Q_LANE_COUNT)):
        lane = peek(word_at(queue, lanes.Q_LANES) + i * WORD)
        if word_at(lane, lanes.L_STATE) == LaneState.LIVE:
            enlist(lane)


@kernel
def report(queue, entries, wc):
    """Write up to `entries` completions, in the order of posting, as far as they are answered; returns how many."""
    head, tail = word_at(queue, Q_HEAD), word_at(queue, Q_TAIL)
    n = np.int64(0)
    while n < entries and tail < head:
        entry = entry_of(queue, tail)
        status = load(entry + lanes.E_STATUS * WORD)
        if status == PENDING:
            break
        wc = write_completion(wc, word_at(entry, lanes.E_ID), status)
        tail += 1
        n += 1
    poke(queue + Q_TAIL * WORD, tail)
    return n


@kernel
def report_all(port, entries, wc):
    """`report` over all queues of a worker; each poll starts at the next, so that none starves."""
    count, turn, taken = word_at(port, CQ_COUNT), word_at(port, CQ_TURN), np.int64(0)
    for i in range(count):
        queue = word_at(port, CQ_QUEUES + (turn + i) % count)
        if word_at(queue, Q_HEAD) > word_at(queue, Q_TAIL):
            taken += report(queue, entries - taken, wc + taken * WC_BYTES)
    poke(port + CQ_TURN * WORD, turn + 1)
    return taken


@kernel
def answer_poll(taken, moved):
    """What poll_cq returns: completions, or whether to call again soon."""
    if taken == 0 and moved:
        return np.int32(POLL_AGAIN)
    return np.int32(taken)


@kernel("int64(int64, int64)")
def hand_over(port, lane):
    """Let the worker of `port` take a lane over."""
    store(lane + lanes.L_STATE * WORD, LaneState.READY)
    return stir(port)


@kernel("int64(int64, int64)")
def cut(port, lane):
    """Let the worker of `port` end a lane."""
    store(lane + lanes.L_CUT * WORD, 1)
    return stir(port)


@kernel
def stir(port):
    """Let the worker of `port` look at all its lanes."""
    add(port + lanes.P_ADOPT * WORD, 1)
    fence()
    return nudge(port)


@kernel
def nudge(port):
    """Wake the worker of `port`, if it sleeps."""
    return call_write(word_at(port, lanes.P_WRITE), word_at(port, lanes.P_NUDGE), word_at(port, lanes.P_ONE), WORD)


@kernel("int64(int64)")
def watch_nudge(port):
    """Let the port's epoll set watch its eventfd, under data 0, which is no lane; 0, or -1."""
    event = word_at(port, lanes.P_EVENTS)
    u32(event)[0] = EPOLLIN | EPOLLET
    poke(event + EPOLL_EVENT_DATA, 0)
    return epoll_add(word_at(port, lanes.P_SYSCALL), word_at(port, lanes.P_EPOLL), word_at(port, lanes.P_NUDGE), event)


# ------------------------------------------------------------------------------ the provider
@cache
def _zero_pages() -> np.ndarray:
    pages = mmap.mmap(-1, ZERO_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return np.frombuffer(pages, np.uint8)


def zeros() -> int:
    """Address of pages that read as zero, as long as the longest slice; they cost address space only."""
    return address_of(_zero_pages())


class Ticket(NamedTuple):
    """Which queue pair of a peer a connection belongs to, and how often that had been connected."""

    queue: int  # random, so that nobody can name another's
    round: int


NO_TICKET = Ticket(0, 0)


class Lane:
    """One lane's row and the memory it points to; used again for other connections."""

    def __init__(self, row: np.ndarray, port: int) -> None:
        self.row, self.peer, self.number = row, "", 0
        self.told = True  # why its latest connection ended
        self.ticket = NO_TICKET
        self.address = address_of(row)
        iovecs = (FRAME_SLICES + 3) * IOVEC_BYTES // WORD
        fields = {
            lanes.L_IN_HEAD: HEAD_BYTES_MAX // WORD,
            lanes.L_IN_NEXT: HEADER_BYTES // WORD,
            lanes.L_IN_IOV: iovecs,
            lanes.L_IN_STATUS: FRAME_SLICES,
            lanes.L_IN_NOTE: limits.NOTE_BYTES // WORD,
            lanes.L_OUT_HEAD: HEAD_BYTES_MAX // WORD,
            lanes.L_OUT_IOV: iovecs,
            lanes.L_FLIGHTS: FLIGHTS * FLIGHT_WORDS,
            lanes.L_TRAILER: 1,
            lanes.L_OUT_TRAILER: 1,
        }
        self._memory = {field: aligned(words) for field, words in fields.items()}
        self._fixed = {field: address_of(words) for field, words in self._memory.items()} | {lanes.L_PORT: port}

    @property
    def state(self) -> int:
        """A LaneState."""
        return int(self.row[lanes.L_STATE])

    @property
    def free(self) -> bool:
        """Whether another connection may have it: nobody's, or broken, no longer in the worker's list, and told of."""
        if self.state == LaneState.BROKEN:
            return self.told and not self.row[lanes.L_LISTED]
        return self.state == LaneState.EMPTY

    def serves(self, queue: Queue) -> bool:
        """Whether its latest connection is one of this queue pair; once free it may become another's."""
        return int(self.row[lanes.L_QUEUE]) == address_of(queue.words)

    def prepare(self, sock: socket.socket, queue: Queue | None, peer: str) -> None:
        """Make the row describe a connection. The worker owns the socket's descriptor from `hand_over` on."""
        self.peer, self.number, self.ticket = peer, self.number + 1, NO_TICKET
        self.row[:] = 0
        self.told = False
        for words in self._memory.values():
            words[:] = 0  # heads are padded with what lies here, and another peer's keys are nobody's business
        for field, value in self._fixed.items():
            self.row[field] = value
        self.row[lanes.L_FD] = sock.detach()
        self.row[lanes.L_QUEUE] = 0 if queue is None else address_of(queue.words)

    @property
    def busy(self) -> bool:
        """Whether something was under way on it: requests not answered, or a frame not complete."""
        row = self.row
        open_frames = row[lanes.L_FLIGHT_HEAD] != row[lanes.L_FLIGHT_TAIL] or row[lanes.L_OUT_AT] < row[lanes.L_OUT_END]
        return bool(open_frames or row[lanes.L_IN_STAGE] != lanes.HEADER or row[lanes.L_IN_GOT])

    def why(self) -> str:
        """Why it broke."""
        reason, number = Reason(int(self.row[lanes.L_REASON])), int(self.row[lanes.L_ERRNO])
        return os.strerror(number) if number else REASONS[reason]


REASONS = {
    Reason.NONE: "it was closed here",
    Reason.CLOSED: "the peer closed it",
    Reason.ERROR: "it failed",
    Reason.BAD_HEADER: "what came is no frame of this version",
    Reason.BAD_TABLE: "a frame's table does not hold: count, lengths or their sum",
    Reason.BAD_ANSWER: "an answer matches no request",
    Reason.STALLED: f"nothing moved for {STALL_S:.0f} s",
    Reason.SIBLING: "another connection to this peer broke",
    Reason.NO_EPOLL: "it could not be watched",
    Reason.CUT: "this engine ended it",
}


class Port:
    """A worker's side of all its lanes."""

    def __init__(self, words: np.ndarray, index: int, keys: KeyTable, inbox: int, trouble_fd: int) -> None:
        self.words, self.address = words, address_of(words)
        self.rows = aligned(limits.LANES * LANE_WORDS).reshape(limits.LANES, LANE_WORDS)
        self.lanes: list[Lane] = []
        self.epoll = select.epoll()
        self.nudge = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        event_words = lanes.EVENTS * EPOLL_EVENT_BYTES // WORD + 1
        self._hold = [aligned(n) for n in (limits.LANES, MSGHDR_BYTES // WORD, event_words, 2, 1)]
        self._hold[-1][0] = 1
        listed, message, events, timespec, one = (address_of(array) for array in self._hold)
        for field, value in {
            lanes.P_EPOLL: self.epoll.fileno(),
            lanes.P_SYSCALL: function_address("syscall"),
            lanes.P_ERRNO: function_address("__errno_location"),
            lanes.P_CLOCK: function_address("clock_gettime"),
            lanes.P_WRITE: function_address("write"),
            lanes.P_LANES: address_of(self.rows),
            lanes.P_LIST: listed,
            lanes.P_KEYS: keys.address,
            lanes.P_MSGHDR: message,
            lanes.P_EVENTS: events,
            lanes.P_TROUBLE_FD: trouble_fd,
            lanes.P_TIMESPEC: timespec,
            lanes.P_STALL: round(STALL_S * 1e9),
            lanes.P_ZEROS: zeros(),
            lanes.P_INBOX: inbox,
            lanes.P_INDEX: index,
            lanes.P_NUDGE: self.nudge,
            lanes.P_ONE: one,
        }.items():
            words[field] = value
        watch_nudge(self.address)

    def attach(self, sock: socket.socket, queue: Queue | None, peer: str) -> Lane:
        """Let the worker serve a connection: one of a queue pair, or (None) one that a peer sends over.

        The worker owns the descriptor from now on. Raises CapacityError, with the socket untouched.
        """
        lane = next((lane for lane in self.lanes if lane.free), None)
        if lane is None:
            if len(self.lanes) == limits.LANES:
                raise CapacityError(f"a worker serves {limits.LANES} connections, as many as it may")
            lane = Lane(self.rows[len(self.lanes)], self.address)
            self.lanes.append(lane)
            self.words[lanes.P_LANE_COUNT] = len(self.lanes)
        lane.prepare(sock, queue, peer)
        hand_over(self.address, lane.address)
        return lane

    def close(self) -> None:
        """Close all descriptors. The worker must have left."""
        for lane in self.lanes:
            if lane.state in (LaneState.READY, LaneState.LIVE):
                os.close(int(lane.row[lanes.L_FD]))
                lane.row[lanes.L_STATE] = LaneState.BROKEN
        self.epoll.close()
        os.close(self.nudge)


class StreamQueue(Queue):
    """A queue pair with its lanes."""

    def __init__(self, device: Device, keys: KeyTable, depth: int, entry_words: int) -> None:
        super().__init__(device, keys, depth, entry_words)
        self.lanes: list[Lane] = []
        self.ticket = Ticket(secrets.randbits(62), 0)
        self._table = aligned(LANES_MOST)
        self.words[[lanes.Q_LANES, lanes.Q_BROKEN]] = address_of(self._table), 1

    @property
    def broken(self) -> bool:
        """Whether it has no connection, yet or any more."""
        return bool(self.words[lanes.Q_BROKEN])

    @property
    def settled(self) -> bool:
        """Whether its worker has reported all that was on it, and let its lanes go."""
        return self.outstanding == 0 and not any(lane.serves(self) and not lane.free for lane in self.lanes)

    def take(self, port: Port, socks: Sequence[socket.socket], peer: str) -> None:
        """Go on over these connections. It must be settled."""
        self.words[[lanes.Q_SENT, lanes.Q_CLAIMED]] = self.words[Q_HEAD]
        self.words[lanes.Q_LANE_COUNT] = 0
        self.words[lanes.Q_BROKEN] = 0
        self.lanes = [port.attach(sock, self, peer) for sock in socks]
        self._table[: len(socks)] = [lane.address for lane in self.lanes]
        self.words[lanes.Q_LANE_COUNT] = len(socks)


class StreamProvider(SoftwareProvider):
    """A provider whose peers are reached over connections. Subclasses say how entries travel.

    Args:
        lanes: connections of each worker to each peer.
    """

    entry_words = ENTRY_WORDS
    queue_type = StreamQueue
    spins = False

    def __init__(self, lanes: int = 1) -> None:
        super().__init__()
        if not 1 <= lanes <= LANES_MOST:
            raise UsageError(f"expected 1 to {LANES_MOST} lanes, got {lanes!r}")
        self.lane_count = lanes
        self._lock = threading.Lock()
        self._turn = 0
        self.generations: dict[str, int] = {}
        self._closed = False

    def open(self, workers: int, queue_depth: int, inbox: np.ndarray) -> list[list[CompletionQueue]]:
        """See `Provider.open`."""
        queues = super().open(workers, queue_depth, inbox)
        self._inbox = inbox
        with ExitStack() as undo:
            self._trouble_fd = os.eventfd(0, os.EFD_CLOEXEC)
            undo.callback(os.close, self._trouble_fd)
            self.ports: list[Port] = []
            for i, words in enumerate(self.lists):
                self.ports.append(Port(words, i, self.keys, address_of(inbox), self._trouble_fd))
                undo.callback(self.ports[-1].close)
            self._watched = select.epoll()
            undo.pop_all()
        self._ports = np.array([port.address for port in self.ports], np.int64)
        for port in self.ports:
            port.words[[lanes.P_PORTS, lanes.P_PORT_COUNT]] = address_of(self._ports), workers
        self.descriptors = [[port.epoll.fileno()] for port in self.ports]
        self._watched.register(self._trouble_fd, select.EPOLLIN)
        self._watcher = threading.Thread(target=self._watch, name="mooncache-lanes", daemon=True)
        self._watcher.start()
        return queues

    # ------------------------------------------------------------------------------ as a target
    def describe(self, unix: str = "") -> dict[str, Any]:
        """See `Provider.describe`."""
        return {"lanes": lanes.FRAMES_VERSION}

    def serve(self, request: Request) -> Reply:
        """See `Provider.serve`: a peer asks for a lane to us."""
        if request.purpose != "lane":
            raise UsageError(f"expected a purpose of describe or lane, got {request.purpose!r}")
        if request.body.get("lanes") != lanes.FRAMES_VERSION:
            raise DiscoveryError(
                f"this engine speaks frames of version {lanes.FRAMES_VERSION}, the caller "
                f"{request.body.get('lanes')!r}; use the same release on both ends"
            )
        ticket = Ticket(int(request.body["queue"]), int(request.body["round"]))
        self._end_former(ticket)
        return Reply({}, then=lambda sock: self._accept(sock, request.caller, ticket))

    def _end_former(self, ticket: Ticket) -> None:
        """Before a peer connects a queue pair anew: cut its former connections. They may still hold bytes that the peer
        took for lost, and that must not be written over what it sends next."""
        with self._lock:
            former = [
                (port, lane, lane.number)
                for port in self.ports
                for lane in port.lanes
                if lane.ticket.queue == ticket.queue and lane.ticket.round < ticket.round and not lane.free
            ]
            for port, lane, _ in former:
                cut(port.address, lane.address)
        wait_until(lambda: all(lane.free or lane.number != n for _, lane, n in former), "the end of former connections")

    def _accept(self, sock: socket.socket, peer: str, ticket: Ticket) -> None:
        set_lane_options(sock)
        with self._lock:
            if self._closed:
                sock.close()
                return
            self._turn += 1
            self.ports[self._turn % len(self.ports)].attach(sock, None, peer).ticket = ticket

    def unregister(self, keys: Keys) -> None:
        """See `Provider.unregister`."""
        self.keys.remove(keys.rkeys[0])
        wait_while_odd([(lane.row, lanes.L_MOVING) for port in self.ports for lane in list(port.lanes)])

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
        if self.generations.get(peer.name, peer.generation) != peer.generation:
            self._part(peer.name, ours)
            self.forget(peer.name)
        self.generations[peer.name] = peer.generation
        for port, queue in zip(self.ports, ours, strict=True):
            queue.words[lanes.Q_GONE] = link.gone
            if queue.broken:
                self._open_lanes(port, queue, peer.name, link)
        return [[queue.pair] for queue in ours]

    def connected(self, peer: str) -> bool:
        """See `Provider.connected`."""
        return not any(queue.broken for queue in self.queues_of(peer))

    def queues_of(self, peer: str) -> list[StreamQueue]:
        """The queue pairs to a peer, one a worker."""
        return [queues[self.peers[peer]] for queues in self.queues]

    def forget(self, peer: str) -> None:
        """For subclasses: another engine has a peer's name now, and nothing is under way to the former."""

    def _part(self, peer: str, queues: Sequence[StreamQueue]) -> None:
        """Another engine has a peer's name. The former may still be there, or have gone without a word: what is under
        way to it may finish, then its connections end."""
        with suppress(TransportError):
            wait_until(lambda: all(q.broken or q.outstanding == 0 for q in queues), f"what is under way to {peer!r}")
        with self._lock:  # so that no lane becomes another connection's
            for port, queue in zip(self.ports, queues, strict=True):
                for lane in queue.lanes if not queue.broken else ():
                    cut(port.address, lane.address)
        wait_until(lambda: all(q.broken and q.settled for q in queues), f"the end of the former peer {peer!r}")

    def hang_up(self) -> None:
        """See `Provider.hang_up`."""
        with self._lock:
            for port in self.ports:
                for lane in port.lanes:
                    cut(port.address, lane.address)

    def _open_lanes(self, port: Port, queue: StreamQueue, peer: str, link: Link) -> None:
        """Connect a queue pair that is new or broken."""
        wait_until(lambda: queue.settled, f"what is under way to peer {peer!r}")
        queue.ticket = Ticket(queue.ticket.queue, queue.ticket.round + 1)
        socks: list[socket.socket] = []
        try:
            for _ in range(self.lane_count):
                socks.append(link.dial("lane", {"lanes": lanes.FRAMES_VERSION, **queue.ticket._asdict()}).sock)
                set_lane_options(socks[-1])
            with self._lock:
                if self._closed:
                    raise EngineClosed("the engine was closed meanwhile")
                queue.take(port, socks, peer)
        except BaseException as error:
            for sock in socks:
                sock.close()
            if isinstance(error, OSError):
                raise TransportError(f"peer {peer!r} hung up while it was connected to: {error.strerror}") from error
            raise

    def prepare(self, queue: Queue, worker: int) -> None:
        """See `SoftwareProvider.prepare`."""
        queue.words[lanes.Q_PORT] = self.ports[worker].address

    # ------------------------------------------------------------------------------ the rest
    def _watch(self) -> None:
        """In a thread of its own: say why lanes broke, once each, and notice peers that hang up."""
        while not self._closed:
            for descriptor, _ in self._watched.poll():
                if descriptor == self._trouble_fd:
                    os.eventfd_read(descriptor)
                    for port in self.ports:
                        for lane in list(port.lanes):
                            self._tell(lane)
                else:
                    self.hung_up(descriptor)

    def hung_up(self, descriptor: int) -> None:
        """For subclasses: a watched connection has ended."""

    def _tell(self, lane: Lane) -> None:
        """Say why a lane's connection ended, once; until then nobody else gets the lane."""
        if lane.state != LaneState.BROKEN or lane.told:
            return
        reason = int(lane.row[lanes.L_REASON])
        incoming = lane.row[lanes.L_QUEUE] == 0
        if reason != Reason.SIBLING:
            quiet = reason == Reason.CUT or (reason == Reason.CLOSED and not lane.busy)
            way = "from" if incoming else "to"
            level = logging.INFO if quiet else logging.WARNING
            log.log(level, "connection %s peer %r ended: %s", way, lane.peer, lane.why())
        lane.told = True

    def close(self) -> None:
        """See `Provider.close`."""
        self.keys.clear()
        with self._lock:
            self._closed = True
        os.eventfd_write(self._trouble_fd, 1)
        if threading.current_thread() is not self._watcher:  # it may be the one that collects a forgotten engine
            self._watcher.join()
        for port in self.ports:
            port.close()
        self._watched.close()
        os.close(self._trouble_fd)


def set_lane_options(sock: socket.socket) -> None:
    """Of a data connection: buffers, and the congestion control that suits loopback."""
    sock.setblocking(False)
    with suppress(OSError):  # the system's limit is taken instead
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    if ipaddress.ip_address(sock.getpeername()[0].partition("%")[0]).is_loopback:
        with suppress(OSError):  # not in this kernel
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return once a worker has made the condition true. Raises TransportError, naming `what`, after SETTLE_S."""
    deadline = time.monotonic() + SETTLE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TransportError(f"{what} did not come within {SETTLE_S:.0f} s; try again")
        time.sleep(1e-3)


class Copier(Protocol):
    """Whose guards are waited for."""

    peer: str
    ended: bool


def wait_while_odd(words: Sequence[tuple[np.ndarray, int]], whose: Copier | None = None) -> None:
    """Return when each word that is odd now has changed, or its owner has ended.

    Whoever made it odd is copying, which takes microseconds. Raises TransportError after STALL_S: it was stopped.
    """
    deadline = time.monotonic() + STALL_S
    for array, index in words:
        seen = int(array[index])
        while seen % 2 == 1 and int(array[index]) == seen and not (whose and whose.ended):
            if time.monotonic() > deadline:
                raise TransportError(
                    f"peer {whose.peer if whose else 'unknown'!r} was stopped in the middle of a copy and may go on "
                    "with it at any time: end that process before this memory is used for anything else"
                )
            time.sleep(0)
