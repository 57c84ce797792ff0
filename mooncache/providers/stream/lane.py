"""Lanes: connected sockets that carry frames, served by a worker without ever waiting.

    outgoing lane   ours, to a peer     sends requests taken from its queue, receives answers
    incoming lane   a peer's, to us     receives requests, sends answers

A lane's row is a record that only the worker touches while the lane is LIVE; Python hands it over as READY and
gets it back as BROKEN. Bytes go from pages to socket and from socket to pages: each direction has one array of iovecs,
built once a frame and struck off as the kernel takes or delivers bytes. Where that finds memory gone (EFAULT), ranges
go one by one until the one at fault is known: its slice fails, zeros or nothing take its place, and the stream goes on.
Descriptors are watched edge-triggered, so a lane is *listed* from the edge until nothing is left to do: a read or write
was short, and not because memory is gone, which poll tells.

Here is how a lane begins and ends; `records` has the rows. `send` and `receive` move its
bytes, `poll` says when.
"""

from enum import IntEnum

import numpy as np

from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import call_write, fence, i64
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import (
    EAGAIN,
    EFAULT,
    EINTR,
    EPOLLET,
    EPOLLIN,
    EPOLLOUT,
    EPOLLRDHUP,
    POLLRDHUP,
    close,
    epoll_add,
    errno,
    is_ready,
)
from mooncache.kernels.records.base import acquire, address, fetch_add, missing, release, where
from mooncache.kernels.records.linux import epoll_event_at
from mooncache.kernels.records.table import table_at
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.stream.records import entry_at, lane_at, port_at, queue_at

FRAMES_VERSION = 2
EVENTS = 64
CHECK_NS = 250_000_000  # how often lanes are looked over for a stall
CALLS = 4  # system calls on one lane before the next one has its turn

PENDING = -1  # an entry's status until it is answered


class Route(IntEnum):
    """The way of an entry's bytes. Above these: copied, to or from this address, where the peer's memory is mapped.

    Below: the same, negated, but by the kernel, since our own range may be gone.
    """

    LANE = 0
    PROCESS = 1  # by process_vm_writev and readv


class Broken(IntEnum):
    """The connectedness of a queue pair: its `broken`."""

    CONNECTED = 0
    GONE = 1  # not yet, or no more: what is posted fails, until a submit connects anew
    RENEWING = 2  # this end broke it, and connects it anew by itself: nothing is taken meanwhile


class LaneState(IntEnum):
    """The owner of a lane's row at this moment."""

    EMPTY = 0  # Python
    READY = 1  # the worker will take it
    LIVE = 2  # the worker
    BROKEN = 3  # Python; the descriptor is closed


class Reason(IntEnum):
    """The reason for which a lane broke."""

    NONE = 0
    CLOSED = 1
    ERROR = 2  # `errno` says which
    BAD_HEADER = 3
    BAD_TABLE = 4
    BAD_ANSWER = 5
    STALLED = 6
    SIBLING = 7  # another lane of the same queue pair broke
    NO_EPOLL = 8
    CUT = 9  # Python asked for it
    EXPIRED = 10  # a batch's deadline passed while frames of it were in flight


FLIGHTS = 16  # frames sent and not answered, on one lane
HEADER, TABLE, BODY = 0, 1, 2  # what an incoming frame waits for
LOST = 0  # `local` of a write whose source could not be read
ENDED = 2  # `readable`: the stream has ended, and what is left of it can be read


@kernel
def entry_of(queue, at):
    """Return the queue's ring entry number `at`."""
    return entry_at(queue.ring, at & queue.mask)


# ------------------------------------------------------------------------------ life of a lane
@kernel
def enlist(lane):
    """Let the next poll serve this lane."""
    if lane.listed == 0:
        port = port_at(lane.port)
        lane.listed = 1
        i64(port.list)[port.listed] = address(lane)
        port.listed += 1


@kernel
def adopt(port):
    """Take over the lanes that Python has made ready, and end those that it wants cut."""
    port.adopted = acquire(port, "adopt")
    for i in range(port.lane_count):
        lane = lane_at(port.lanes, i)
        if acquire(lane, "state") == LaneState.READY:
            queue = queue_at(lane.queue)
            if not missing(queue) and queue.broken != 0:  # its sibling broke before this one came
                close_lane(lane, Reason.SIBLING, 0)
                report_trouble(port)
                continue
            lane.state = LaneState.LIVE
            lane.progress = port.now
            event = epoll_event_at(port.events)
            event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
            event.data = address(lane)
            if epoll_add(port.syscall, port.epoll, lane.fd, port.events) < 0:
                break_lane(lane, Reason.NO_EPOLL, errno(port.errno))
        if lane.state == LaneState.LIVE and acquire(lane, "cut") != 0:
            break_lane(lane, Reason.CUT, 0)


@kernel
def close_lane(lane, reason, error):
    """Close the descriptor and give the row back to Python."""
    port = port_at(lane.port)
    close(port.syscall, lane.fd)
    lane.reason = reason
    lane.errno = error
    release(lane, "state", LaneState.BROKEN)


@kernel
def break_lane(lane, reason, error):
    """End a lane. An outgoing one takes its whole queue pair along: what is not answered fails as PEER_GONE."""
    port, queue = port_at(lane.port), queue_at(lane.queue)
    close_lane(lane, reason, error)
    if not missing(queue):
        for i in range(port.lane_count):
            other = lane_at(port.lanes, i)
            if acquire(other, "state") == LaneState.LIVE and other.queue == address(queue):
                close_lane(other, Reason.SIBLING, 0)
        break_queue(queue, reason == Reason.EXPIRED)
    report_trouble(port)


@kernel
def report_trouble(port):
    """Let Python look at the lanes that have broken: until it has told why, nobody else gets them."""
    call_write(port.write, port.trouble_fd, where(port, "one"), WORD)


@kernel
def break_queue(queue, expired):
    """Fail what was to go by lane, and tell submitters.

    As gone; but if this end broke the connection because a batch has `expired`, as flushed, so that the others' slices
    are posted again once it is renewed. Not a notification that was sent: it must not come twice. What was sent is in
    doubt until the peer confirms, or is connected to anew: it may still lie in the peer's socket.
    """
    release(queue, "broken", Broken.RENEWING if expired else Broken.GONE)
    sent, doubtful = queue.sent, np.int64(0)
    for at in range(queue.tail, sent):
        if waits_for_lane(entry_of(queue, at)):
            doubtful += entry_of(queue, at).opcode != Opcode.READ
    if doubtful > 0:
        fetch_add(queue, "doubt", doubtful)
        fetch_add(table_at(queue.table), "breaks", 1)
    queue.sent = queue.head
    for at in range(queue.tail, queue.head):
        entry = entry_of(queue, at)
        if waits_for_lane(entry):
            again = expired and (at >= sent or entry.opcode != Opcode.SEND)
            release(entry, "status", WcStatus.WR_FLUSH_ERR if again else WcStatus.REM_ABORT_ERR)
    if not expired:
        end_epoch(queue)  # last: whoever believes to be connected then looks at `broken` next


@kernel
def waits_for_lane(entry):
    """Return whether an entry that goes by lane is not answered."""
    return entry.status == PENDING and entry.route == Route.LANE


@kernel
def end_epoch(queue):
    """End the epoch: what was submitted to this queue pair's peer so far is posted no more; submitters connect anew."""
    table = table_at(queue.table)
    fetch_add(table, "epoch", 1)
    release(table, "gone", 1)


@kernel
def fault(lane, reading):
    """Deal with a failed system call on the lane: wait until it can be read, or written, again; or break the lane."""
    error = errno(port_at(lane.port).errno)
    if error == EAGAIN:
        if reading:
            lane.readable = 0
        else:
            lane.writable = 0
    elif error != EINTR:
        break_lane(lane, Reason.ERROR, error)


@kernel
def is_unreachable(lane):
    """Return whether a system call failed because memory that it was given is gone, or may not be touched."""
    return errno(port_at(lane.port).errno) == EFAULT


@kernel
def is_open_for(lane, events):
    """Return whether more can be read or written at once: what was short then was so because of memory."""
    port = port_at(lane.port)
    return is_ready(port.syscall, lane.fd, events, where(port, "poll"))


@kernel
def slice_of(lane, nth):
    """Return which slice of a READ the `nth` range of its answer is: those that its table calls failed have none."""
    status, i = i64(lane.in_status), np.int64(0)
    while True:
        why = status[i]
        if why == WcStatus.SUCCESS or why == WcStatus.LOC_PROT_ERR:  # the latter: lost here, while it came in
            if nth == 0:
                return i
            nth -= 1
        i += 1


@kernel
def drained(lane):
    """Note that the socket is empty, as a read was short; unless the stream has ended: only another read tells."""
    if lane.readable == 1:
        lane.readable = 0


@kernel
def has_output(lane):
    """Return whether a frame is half sent, or one could be started."""
    if lane.out_at < lane.out_end:
        return True
    queue = queue_at(lane.queue)
    return not missing(queue) and queue.sent < queue.head and flights(lane) < FLIGHTS


@kernel
def flights(lane):
    """Count the frames sent and not yet answered."""
    return lane.flight_head - lane.flight_tail


@kernel
def guard(lane):
    """Mark that pages of ours are about to be touched for a peer, or no longer are; odd in between."""
    release(lane, "moving", lane.moving + 1)
    fence()


@kernel
def may_land(lane):
    """Return whether bytes of an incoming lane may still be put into our pages; called between two `guard`s.

    Not if this engine has cut it, nor if its peer has reset or closed it: whoever did that took them for lost. The
    kernel is asked for the latter unless epoll has been asked just before.
    """
    port = port_at(lane.port)
    fresh = port.fresh != 0
    port.fresh = 0
    return acquire(lane, "cut") == 0 and (fresh or not is_open_for(lane, POLLRDHUP))


@kernel
def drop_incoming(port):
    """End every incoming lane: this process was suspended for so long that peers took it for gone."""
    for i in range(port.lane_count):
        lane = lane_at(port.lanes, i)
        if acquire(lane, "state") == LaneState.LIVE and lane.queue == 0:
            break_lane(lane, Reason.STALLED, 0)


@kernel
def end_overdue(port, queue):
    """Break a queue pair's connections, if frames are in flight on them, so that a batch past its deadline ends."""
    release(queue, "cut", 0)
    if queue.broken != 0:
        return
    for i in range(port.lane_count):
        lane = lane_at(port.lanes, i)
        if acquire(lane, "state") == LaneState.LIVE and lane.queue == address(queue) and flights(lane) > 0:
            break_lane(lane, Reason.EXPIRED, 0)
            return


@kernel
def check_stalls(port):
    """Break every lane on which something is under way and nothing has moved for too long."""
    now = port.now
    port.next_check = now + CHECK_NS
    for i in range(port.lane_count):
        lane = lane_at(port.lanes, i)
        if acquire(lane, "state") != LaneState.LIVE:
            continue
        under_way = flights(lane) > 0 or lane.out_at < lane.out_end
        if not under_way and lane.in_stage == HEADER and lane.in_got == 0:
            lane.progress = now
        elif now - lane.progress > port.stall:
            break_lane(lane, Reason.STALLED, 0)
