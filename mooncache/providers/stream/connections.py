"""Connections as Python holds them: the row and memory of each lane, a worker's port, a queue pair with its lanes.

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
from mooncache.kernels.arrays import MAP_NORESERVE, WORD, Row, address_of, aligned, function_address, rows_of
from mooncache.kernels.atomics import call_write, fence
from mooncache.kernels.inbox import header, sender
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import EPOLLET, EPOLLIN, epoll_add
from mooncache.kernels.records.base import compare_swap, fetch_add, release, where
from mooncache.kernels.records.linux import EPOLL_EVENT, IOVEC, epoll_event_at
from mooncache.providers.device import Device, PortRow, Queue
from mooncache.providers.keys import KeyTable
from mooncache.providers.stream import lane as lanes
from mooncache.providers.stream.frames import FRAME_SLICES, HEAD_BYTES_MAX, HEADER_BYTES, SLICE_BYTES_MAX
from mooncache.providers.stream.lane import FLIGHTS, Broken, LaneState, Reason
from mooncache.providers.stream.records import FLIGHT, LANE, lane_at, port_at, queue_at

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
    release(lane_at(lane), "state", LaneState.READY)
    return stir(port_at(port))


@kernel("int64(int64, int64)")
def cut(port, lane):
    """Let the worker of `port` end a lane."""
    release(lane_at(lane), "cut", 1)
    return stir(port_at(port))


@kernel("int64(int64)")
def give_up(queue):
    """Fail what waits for a queue pair that is gone before its connections were renewed. Nothing else is touched."""
    queue = queue_at(queue)
    if compare_swap(queue, "broken", lanes.Broken.RENEWING, lanes.Broken.GONE) == lanes.Broken.RENEWING:
        lanes.end_epoch(queue)
        stir(port_at(queue.port))
    return 0


@kernel
def stir(port):
    """Let the worker of `port` look at all its lanes."""
    fetch_add(port, "adopt", 1)
    fence()
    return nudge(port)


@kernel
def nudge(port):
    """Wake the worker of `port`, if it sleeps."""
    return call_write(port.write, port.nudge, where(port, "one"), WORD)


@kernel("int64(int64)")
def watch_nudge(port):
    """Let the port's epoll set watch its eventfd, under data 0, which is no lane; 0, or -1."""
    port = port_at(port)
    event = epoll_event_at(port.events)
    event.events = EPOLLIN | EPOLLET
    event.data = 0
    return epoll_add(port.syscall, port.epoll, port.nudge, port.events)


# ------------------------------------------------------------------------------ Python
@cache
def _zero_pages() -> np.ndarray:
    pages = mmap.mmap(-1, ZERO_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return np.frombuffer(pages, np.uint8)


def zeros() -> int:
    """Return the address of pages that read as zero, as long as the longest slice; they cost address space only."""
    return address_of(_zero_pages())


class Ticket(NamedTuple):
    """The queue pair of a peer that a connection belongs to, and how often that had been connected: its epoch."""

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

    def __init__(self, row: Row, port: int, note_bytes: int) -> None:
        self.row, self.peer, self.number = row, "", 0
        self.told = True  # why its latest connection ended
        self.reserved = False  # for a connection that is about to be attached
        self.ticket = NO_TICKET
        self.address = row.address
        self._memory = {
            "in_head": aligned(HEAD_BYTES_MAX // WORD),
            "in_next": aligned(HEADER_BYTES // WORD),
            "in_iov": rows_of(IOVEC, FRAME_SLICES + 3),
            "in_status": aligned(FRAME_SLICES),
            "out_head": aligned(HEAD_BYTES_MAX // WORD),
            "out_iov": rows_of(IOVEC, FRAME_SLICES + 3),
            "flights": rows_of(FLIGHT, FLIGHTS),
            "trailer": aligned(FRAME_SLICES // WORD),
            "out_trailer": aligned(FRAME_SLICES // WORD),
        }
        self._note = aligned(note_bytes // WORD)  # written to when one comes
        self._fixed = {field: address_of(array) for field, array in self._memory.items()}
        self._fixed |= {"port": port, "in_note": address_of(self._note)}

    @property
    def state(self) -> int:
        """The lane's LaneState."""
        return self.row["state"]

    @property
    def open(self) -> bool:
        """True while its descriptor is open."""
        return self.state in (LaneState.READY, LaneState.LIVE)

    @property
    def free(self) -> bool:
        """True if another connection may have it: nobody's, or broken, no longer in the worker's list, and told of."""
        if self.reserved:
            return False
        if self.state == LaneState.BROKEN:
            return self.told and not self.row["listed"]
        return self.state == LaneState.EMPTY

    @property
    def incoming(self) -> bool:
        """True while a peer sends over it."""
        return self.state in (LaneState.READY, LaneState.LIVE) and not self.row["queue"]

    def serves(self, queue: Queue) -> bool:
        """Return whether its latest connection is one of this queue pair; once free it may become another's."""
        return self.row["queue"] == queue.address

    def prepare(self, sock: socket.socket, queue: Queue | None, peer: str, ticket: Ticket) -> None:
        """Make the row describe a connection. The worker owns the socket's descriptor from `hand_over` on."""
        self.peer, self.number, self.ticket, self.reserved = peer, self.number + 1, ticket, False
        self.row.clear()
        self.told = False
        for array in self._memory.values():
            array[:] = 0  # heads are padded with what lies here, and another peer's keys are nobody's business
        self.row.set(**self._fixed)
        self.row["fd"] = sock.detach()
        self.row["queue"] = 0 if queue is None else queue.address
        self._sender = sender(peer)
        self.row["sender"] = address_of(self._sender)

    @property
    def busy(self) -> bool:
        """True if something was under way on it: requests not answered, or a frame not complete."""
        row = self.row
        open_frames = row["flight_head"] != row["flight_tail"] or row["out_at"] < row["out_end"]
        return bool(open_frames or row["in_stage"] != lanes.HEADER or row["in_got"])

    def why(self) -> str:
        """Explain why it broke."""
        reason, number = Reason(self.row["reason"]), self.row["errno"]
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

    def __init__(self, own: PortRow, index: int, keys: KeyTable, inbox: np.ndarray, trouble_fd: int) -> None:
        self.row, self.address, self._queues = own.row, own.row.address, own.queues
        self.rows = rows_of(LANE, limits.LANES)
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
        self._list, self._events = aligned(limits.LANES), rows_of(EPOLL_EVENT, lanes.EVENTS)
        self.row.set(
            index=index,
            epoll=self.epoll.fileno(),
            syscall=function_address("syscall"),
            errno=function_address("__errno_location"),
            clock=function_address("clock_gettime"),
            write=function_address("write"),
            lanes=address_of(self.rows),
            list=address_of(self._list),
            keys=keys.address,
            inbox=address_of(inbox),
            zeros=zeros(),
            events=address_of(self._events),
            trouble_fd=trouble_fd,
            nudge=self.nudge,
            one=1,
            stall=round(STALL_S * 1e9),
        )
        watch_nudge(self.address)

    @property
    def load(self) -> int:
        """The lanes that serve connections, or are about to."""
        states = self.rows["state"][: len(self.lanes)]
        live = np.count_nonzero((states == LaneState.READY) | (states == LaneState.LIVE))
        return int(live) + sum(lane.reserved for lane in self.lanes)

    def reserve(self, n: int) -> list[Lane]:
        """Reserve lanes for `n` connections: `attach` them, or `release` them.

        Raises CapacityError, with none reserved.
        """
        states = self.rows["state"][: len(self.lanes)]
        ended = (states == LaneState.EMPTY) | (states == LaneState.BROKEN)
        found = [self.lanes[i] for i in np.flatnonzero(ended) if self.lanes[i].free][:n]
        if len(self.lanes) + n - len(found) > len(self.rows):
            raise CapacityError(
                f"a worker serves at most {len(self.rows)} connections, and all are in use: give the engine more "
                "workers, or its peers fewer workers or lanes"
            )
        new = range(len(self.lanes), len(self.lanes) + n - len(found))
        made = [Lane(Row(self.rows, i), self.address, self._note_bytes) for i in new]
        for lane in [*found, *made]:
            lane.reserved = True
        self.lanes += made
        self.row.put("lane_count", len(self.lanes))
        return found + made

    @staticmethod
    def release(reserved: Sequence[Lane]) -> None:
        """Release lanes that were reserved and not attached."""
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
                lane.row["state"] = LaneState.BROKEN
                os.close(lane.row["fd"])
        self.epoll.close()
        descriptor, self.nudge = self.nudge, -1
        forks.drop([descriptor])
        self.lanes.clear()
        self.rows = self.rows[:0].copy()
        self._list, self._events = self._list[:0].copy(), self._events[:0].copy()

    def disown(self) -> None:
        """Close the descriptors in a forked child; see `forks.Holder`."""
        forks.drop([*(lane.row["fd"] for lane in self.lanes if lane.open), self.nudge])
        self.epoll.close()


class StreamQueue(Queue):
    """A queue pair with its lanes."""

    def __init__(self, device: Device, keys: KeyTable, depth: int, record: np.dtype, entry: np.dtype) -> None:
        self.lanes: list[Lane] = []
        self._known = 0  # slices that were in doubt, and are not any more
        super().__init__(device, keys, depth, record, entry)
        self._table = aligned(LANES_MOST)
        self.connecting = threading.Lock()  # held while the network is waited for
        self.row.set(lanes=address_of(self._table), broken=Broken.GONE)

    @property
    def broken(self) -> bool:
        """True while it has no connection."""
        return bool(self.row["broken"] != Broken.CONNECTED)

    @property
    def renewing(self) -> bool:
        """True while this end broke its connections and has yet to connect it anew."""
        return bool(self.row["broken"] == Broken.RENEWING)

    @property
    def in_doubt(self) -> int:
        """The slices sent on connections that have ended, of which it is not known that they land no more."""
        return self.row["doubt"] - self._known

    def settle(self, total: int) -> None:
        """Note that of all slices ever in doubt the first `total` land no more."""
        self._known = max(self._known, total)

    @property
    def settled(self) -> bool:
        """True once its worker has reported all that was on it, and let its lanes go."""
        return self.outstanding == 0 and not any(lane.serves(self) and not lane.free for lane in self.lanes)

    def lead_to(self, keys: KeyTable, inbox: np.ndarray | None = None, caller: str = "") -> None:
        """Lead to another peer from now on, which has heard of no connection of it; see `Queue.lead_to`."""
        super().lead_to(keys, inbox, caller)
        self.ticket = Ticket(secrets.randbits(62), 0)
        self._known = self.row["doubt"]

    def take(self, port: Port, socks: Sequence[socket.socket], peer: str) -> None:
        """Go on over these connections. It must be settled. Raises CapacityError, with nothing changed."""
        self.lanes = port.reserve(len(socks))
        self.row.set(sent=self.row["head"], claimed=self.row["head"])
        self.row.put("lane_count", 0)
        self._table[: len(socks)] = [lane.address for lane in self.lanes]
        # Before its worker sees a lane: it would end that of a broken queue pair, and list none of what it posts.
        self.row.put("lane_count", len(socks))
        self.row.put("broken", 0)
        for lane, sock in zip(self.lanes, socks, strict=True):
            port.attach(lane, sock, self, peer)


class Buffers(NamedTuple):
    """The buffer sizes that the system gives to a direction of a connection, bytes.

    Attributes:
        fixed: to who asks: twice what is asked for, or than is allowed (socket(7)).
        tuned: at most, to who does not: as much as the way turns out to hold (tcp(7)).
    """

    fixed: int
    tuned: int


def buffers(direction: str, net: Path = NET) -> Buffers:
    """Read the sizes for sending, "w", or receiving, "r".

    Raises OSError or ValueError where the system does not tell.
    """
    fixed = 2 * min(BUFFER_BYTES, int((net / f"core/{direction}mem_max").read_text()))
    _, start, most = map(int, (net / f"ipv4/tcp_{direction}mem").read_text().split())
    tunes = direction == "w" or (net / "ipv4/tcp_moderate_rcvbuf").read_text().strip() != "0"
    return Buffers(fixed, most if tunes else start)


def set_lane_options(sock: socket.socket, *, ours: bool) -> None:
    """Set a data connection's options: an end of its host is noticed, buffers and congestion control suit it.

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
