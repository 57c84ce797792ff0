"""What Python holds of connections: the row and memory of each lane, a worker's port, a queue pair with its lanes.

The kernels here hand a lane to its worker, have it cut, and wake the worker to look.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mooncache import forks, limits
from mooncache.discovery.address import is_loopback
from mooncache.errors import CapacityError
from mooncache.kernels.arrays import MAP_NORESERVE, WORD, address_of, aligned, function_address, put
from mooncache.kernels.atomics import add, call_write, cas, fence, poke, store, u32
from mooncache.kernels.inbox import header, sender
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import (
    EPOLL_EVENT_BYTES,
    EPOLL_EVENT_DATA,
    EPOLLET,
    EPOLLIN,
    IOVEC_BYTES,
    MSGHDR_BYTES,
    epoll_add,
)
from mooncache.providers.device import Q_HEAD, Device, KeyTable, Queue
from mooncache.providers.stream import lane as lanes
from mooncache.providers.stream.frames import FRAME_SLICES, HEAD_BYTES_MAX, HEADER_BYTES, SLICE_BYTES_MAX
from mooncache.providers.stream.lane import FLIGHT_WORDS, FLIGHTS, LANE_WORDS, Broken, LaneState, Reason, word_at

STALL_S = 10.0
"""Seconds without a byte, with something under way, after which a lane counts as broken: a stopped or hung peer."""

BUFFER_BYTES = 4 << 20
"""Socket buffers that are asked for, where that gives more than the system's tuning: loopback gains nothing above."""

NET = Path("/proc/sys/net")

KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""A host that is gone without a word is noticed within 30 s, also by connections on which nothing is under way."""

ZERO_BYTES = SLICE_BYTES_MAX
LANES_MOST = 16


# ------------------------------------------------------------------------------ kernels
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


@kernel("int64(int64)")
def give_up(queue):
    """A queue pair whose connections were to be renewed is gone: what waits for it fails. Nothing else is touched."""
    if cas(queue + lanes.Q_BROKEN * WORD, lanes.Broken.RENEWING, lanes.Broken.GONE) == lanes.Broken.RENEWING:
        lanes.end_epoch(queue)
        stir(word_at(queue, lanes.Q_PORT))
    return 0


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


# ------------------------------------------------------------------------------ Python
@cache
def _zero_pages() -> np.ndarray:
    pages = mmap.mmap(-1, ZERO_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return np.frombuffer(pages, np.uint8)


def zeros() -> int:
    """Address of pages that read as zero, as long as the longest slice; they cost address space only."""
    return address_of(_zero_pages())


class Ticket(NamedTuple):
    """Which queue pair of a peer a connection belongs to, and how often that had been connected: its epoch."""

    queue: int  # random, so that nobody can name another's
    round: int


NO_TICKET = Ticket(0, 0)


class Arrival:
    """A connection that a peer was promised, and the lane that is kept for it."""

    def __init__(self, caller: str, ticket: Ticket, port: Port, lane: Lane) -> None:
        self.caller, self.ticket, self.port, self.lane = caller, ticket, port, lane
        self.refused = False


class Lane:
    """One lane's row and the memory it points to; used again for other connections."""

    def __init__(self, row: np.ndarray, port: int, note_bytes: int) -> None:
        self.row, self.peer, self.number = row, "", 0
        self.told = True  # why its latest connection ended
        self.reserved = False  # for a connection that is about to be attached
        self.ticket = NO_TICKET
        self.address = address_of(row)
        iovecs = (FRAME_SLICES + 3) * IOVEC_BYTES // WORD
        fields = {
            lanes.L_IN_HEAD: HEAD_BYTES_MAX // WORD,
            lanes.L_IN_NEXT: HEADER_BYTES // WORD,
            lanes.L_IN_IOV: iovecs,
            lanes.L_IN_STATUS: FRAME_SLICES,
            lanes.L_OUT_HEAD: HEAD_BYTES_MAX // WORD,
            lanes.L_OUT_IOV: iovecs,
            lanes.L_FLIGHTS: FLIGHTS * FLIGHT_WORDS,
            lanes.L_TRAILER: FRAME_SLICES // WORD,
            lanes.L_OUT_TRAILER: FRAME_SLICES // WORD,
        }
        self._memory = {field: aligned(words) for field, words in fields.items()}
        self._note = aligned(note_bytes // WORD)  # written to when one comes
        self._fixed = {field: address_of(words) for field, words in self._memory.items()}
        self._fixed |= {lanes.L_PORT: port, lanes.L_IN_NOTE: address_of(self._note)}

    @property
    def state(self) -> int:
        """A LaneState."""
        return int(self.row[lanes.L_STATE])

    @property
    def open(self) -> bool:
        """Whether its descriptor is."""
        return self.state in (LaneState.READY, LaneState.LIVE)

    @property
    def free(self) -> bool:
        """Whether another connection may have it: nobody's, or broken, no longer in the worker's list, and told of."""
        if self.reserved:
            return False
        if self.state == LaneState.BROKEN:
            return self.told and not self.row[lanes.L_LISTED]
        return self.state == LaneState.EMPTY

    @property
    def incoming(self) -> bool:
        """Whether a peer sends over it, now."""
        return self.state in (LaneState.READY, LaneState.LIVE) and not self.row[lanes.L_QUEUE]

    def serves(self, queue: Queue) -> bool:
        """Whether its latest connection is one of this queue pair; once free it may become another's."""
        return int(self.row[lanes.L_QUEUE]) == address_of(queue.words)

    def prepare(self, sock: socket.socket, queue: Queue | None, peer: str, ticket: Ticket) -> None:
        """Make the row describe a connection. The worker owns the socket's descriptor from `hand_over` on."""
        self.peer, self.number, self.ticket, self.reserved = peer, self.number + 1, ticket, False
        self.row[:] = 0
        self.told = False
        for words in self._memory.values():
            words[:] = 0  # heads are padded with what lies here, and another peer's keys are nobody's business
        for field, value in self._fixed.items():
            self.row[field] = value
        self.row[lanes.L_FD] = sock.detach()
        self.row[lanes.L_QUEUE] = 0 if queue is None else address_of(queue.words)
        self._sender = sender(peer)
        self.row[lanes.L_SENDER] = address_of(self._sender)

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
    Reason.EXPIRED: "a batch's deadline passed while bytes of it were under way",
}


class Port:
    """A worker's side of all its lanes."""

    def __init__(self, words: np.ndarray, index: int, keys: KeyTable, inbox: np.ndarray, trouble_fd: int) -> None:
        self.words, self.address = words, address_of(words)
        self.rows = aligned(limits.LANES * LANE_WORDS).reshape(limits.LANES, LANE_WORDS)
        self.lanes: list[Lane] = []
        self._note_bytes = int(header(inbox)["bytes"][0])
        self.nudge = -1
        self.epoll = select.epoll()
        forks.private(self)
        try:
            self.nudge = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            self.epoll.close()
            raise
        event_words = lanes.EVENTS * EPOLL_EVENT_BYTES // WORD + 1
        self._hold = [aligned(n) for n in (limits.LANES, MSGHDR_BYTES // WORD, event_words, 2, 3, 1)]
        self._hold[-1][0] = 1
        listed, message, events, timespec, poll, one = (address_of(array) for array in self._hold)
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
            lanes.P_INBOX: address_of(inbox),
            lanes.P_INDEX: index,
            lanes.P_NUDGE: self.nudge,
            lanes.P_ONE: one,
            lanes.P_POLL: poll,
        }.items():
            words[field] = value
        watch_nudge(self.address)

    @property
    def load(self) -> int:
        """Lanes that serve connections, or are about to."""
        states = self.rows[: len(self.lanes), lanes.L_STATE]
        live = np.count_nonzero((states == LaneState.READY) | (states == LaneState.LIVE))
        return int(live) + sum(lane.reserved for lane in self.lanes)

    def reserve(self, n: int) -> list[Lane]:
        """Lanes for `n` connections: `attach` them, or `release` them. Raises CapacityError, with none reserved."""
        rows = self.rows[: len(self.lanes)]
        ended = (rows[:, lanes.L_STATE] == LaneState.EMPTY) | (rows[:, lanes.L_STATE] == LaneState.BROKEN)
        found = [self.lanes[i] for i in np.flatnonzero(ended) if self.lanes[i].free][:n]
        if len(self.lanes) + n - len(found) > len(self.rows):
            raise CapacityError(
                f"a worker serves at most {len(self.rows)} connections, and all are in use: give the engine more "
                "workers, or its peers fewer workers or lanes"
            )
        new = self.rows[len(self.lanes) : len(self.lanes) + n - len(found)]
        made = [Lane(row, self.address, self._note_bytes) for row in new]
        for lane in [*found, *made]:
            lane.reserved = True
        self.lanes += made
        put(self.words, lanes.P_LANE_COUNT, len(self.lanes))
        return found + made

    @staticmethod
    def release(reserved: Sequence[Lane]) -> None:
        """Give lanes back that were reserved and not attached."""
        for lane in reserved:
            lane.reserved = False

    def attach(
        self, lane: Lane, sock: socket.socket, queue: Queue | None, peer: str, ticket: Ticket = NO_TICKET
    ) -> None:
        """Let the worker serve a connection: one of a queue pair, or (None) one that a peer sends over.

        The worker owns the descriptor from now on. `lane` was reserved.
        """
        lane.prepare(sock, queue, peer, ticket)
        hand_over(self.address, lane.address)

    def close(self) -> None:
        """Close all descriptors. The worker must have left."""
        for lane in self.lanes:
            if lane.open:
                os.close(int(lane.row[lanes.L_FD]))
                lane.row[lanes.L_STATE] = LaneState.BROKEN
        self.epoll.close()
        os.close(self.nudge)
        self.nudge = -1
        self.lanes.clear()
        self.rows, self._hold = self.rows[:0].copy(), []

    def disown(self) -> None:
        """See `forks.Holder`."""
        forks.drop([*(int(lane.row[lanes.L_FD]) for lane in self.lanes if lane.open), self.nudge])
        self.epoll.close()


class StreamQueue(Queue):
    """A queue pair with its lanes."""

    def __init__(self, device: Device, keys: KeyTable, depth: int, entry_words: int) -> None:
        self.lanes: list[Lane] = []
        self._known = 0  # slices that were in doubt, and are not any more
        super().__init__(device, keys, depth, entry_words)
        self._table = aligned(LANES_MOST)
        self.connecting = threading.Lock()  # held while the network is waited for
        self.words[[lanes.Q_LANES, lanes.Q_BROKEN]] = address_of(self._table), Broken.GONE

    @property
    def broken(self) -> bool:
        """Whether it has no connection, yet or any more."""
        return bool(self.words[lanes.Q_BROKEN] != Broken.CONNECTED)

    @property
    def renewing(self) -> bool:
        """Whether this end broke its connections and has yet to connect it anew."""
        return bool(self.words[lanes.Q_BROKEN] == Broken.RENEWING)

    @property
    def address(self) -> int:
        """Of its words, for kernels."""
        return address_of(self.words)

    @property
    def in_doubt(self) -> int:
        """Slices sent on connections that have ended, of which it is not known that they land no more."""
        return int(self.words[lanes.Q_DOUBT]) - self._known

    def settle(self, total: int) -> None:
        """Of all slices ever in doubt the first `total` land no more."""
        self._known = max(self._known, total)

    @property
    def settled(self) -> bool:
        """Whether its worker has reported all that was on it, and let its lanes go."""
        return self.outstanding == 0 and not any(lane.serves(self) and not lane.free for lane in self.lanes)

    def lead_to(self, keys: KeyTable, inbox: np.ndarray | None = None, caller: str = "") -> None:
        """See `Queue.lead_to`. It is another peer's from now on, who has heard of no connection of it."""
        super().lead_to(keys, inbox, caller)
        self.ticket = Ticket(secrets.randbits(62), 0)
        self._known = int(self.words[lanes.Q_DOUBT])

    def take(self, port: Port, socks: Sequence[socket.socket], peer: str) -> None:
        """Go on over these connections. It must be settled. Raises CapacityError, with nothing changed."""
        self.lanes = port.reserve(len(socks))
        self.words[[lanes.Q_SENT, lanes.Q_CLAIMED]] = self.words[Q_HEAD]
        put(self.words, lanes.Q_LANE_COUNT, 0)
        self._table[: len(socks)] = [lane.address for lane in self.lanes]
        # Before its worker sees a lane: it would end that of a broken queue pair, and list none of what it posts.
        put(self.words, lanes.Q_LANE_COUNT, len(socks))
        put(self.words, lanes.Q_BROKEN, 0)
        for lane, sock in zip(self.lanes, socks, strict=True):
            port.attach(lane, sock, self, peer)


class Buffers(NamedTuple):
    """What the system gives to a direction of a connection, bytes.

    Attributes:
        fixed: to who asks: twice what is asked for, or than is allowed (socket(7)).
        tuned: at most, to who does not: as much as the way turns out to hold (tcp(7)).
    """

    fixed: int
    tuned: int


def buffers(direction: str, net: Path = NET) -> Buffers:
    """For sending, "w", or receiving, "r". Raises OSError or ValueError where the system does not tell."""
    fixed = 2 * min(BUFFER_BYTES, int((net / f"core/{direction}mem_max").read_text()))
    _, start, most = map(int, (net / f"ipv4/tcp_{direction}mem").read_text().split())
    tunes = direction == "w" or (net / "ipv4/tcp_moderate_rcvbuf").read_text().strip() != "0"
    return Buffers(fixed, most if tunes else start)


def set_lane_options(sock: socket.socket, *, ours: bool) -> None:
    """Of a data connection: that the end of its host is noticed, buffers where tuning by the system gives less, and
    what congestion control suits loopback.

    A buffer that is asked for is never tuned, and over a distance is then too small by far where the limit is low.
    One of `ours`, which carries our requests, is reset when it is closed, by whomever, the end of the process
    included: what the peer has not taken yet is lost, and the peer drops what it has not put into its pages.
    """
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, seconds)
    if ours:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near = is_loopback(sock.getpeername()[0])
    for direction, option in (("w", socket.SO_SNDBUF), ("r", socket.SO_RCVBUF)):
        with suppress(OSError, ValueError):  # not told, or refused: then it is tuned
            given = buffers(direction)
            if given.fixed >= (min(given.tuned, 2 * BUFFER_BYTES) if near else given.tuned):
                sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    if near:
        with suppress(OSError):  # not in this kernel
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
