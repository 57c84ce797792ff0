"""The poll of a worker serves all connections of its port, each for a few system calls."""

from mooncache.kernels.account import CLOCK_MONOTONIC, NS_PER_S
from mooncache.kernels.atomics import call_clock_gettime, i64
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, epoll_wait
from mooncache.kernels.records.base import acquire, address, missing, where
from mooncache.kernels.records.linux import epoll_event_at
from mooncache.providers.stream.frames import HEADER_BYTES, head_bytes
from mooncache.providers.stream.lane import (
    CALLS,
    ENDED,
    EVENTS,
    HEADER,
    TABLE,
    LaneState,
    Reason,
    Route,
    adopt,
    break_lane,
    check_stalls,
    drop_incoming,
    enlist,
    entry_of,
    has_output,
)
from mooncache.providers.stream.receive import next_frame, receive
from mooncache.providers.stream.records import frame_at, lane_at, port_at
from mooncache.providers.stream.send import send


@kernel
def serve(lane):
    """Move what can be moved on a lane without waiting; return whether anything was. It may be broken afterwards."""
    moved, calls = False, 0
    while calls < CALLS and lane.state == LaneState.LIVE:
        calls += 1
        if lane.queue == 0 and answering(lane):
            if lane.writable == 0 or send(lane) == 0:
                return moved
            moved = True
            if lane.state == LaneState.LIVE and lane.out_at == lane.out_end:
                lane.out_end = 0
                lane.out_at = 0
                next_frame(lane)
        elif lane.readable != 0 or has_whole_header(lane):
            if not receive(lane):
                break
            moved = True
        else:
            break
    if lane.state == LaneState.LIVE and lane.queue != 0 and lane.writable != 0:
        moved = send(lane) > 0 or moved
    return moved


@kernel
def answering(lane):
    """Return whether an incoming lane has an answer laid out that is not all sent."""
    return lane.out_end > 0


@kernel
def has_whole_header(lane):
    """Return whether the next step needs no read: its header came with the body before it, or no body is to come."""
    stage = lane.in_stage
    if stage == HEADER:
        return lane.in_got == HEADER_BYTES
    if stage == TABLE:
        return lane.in_got >= head_bytes(frame_at(lane.in_head).count)
    return lane.in_at == lane.in_end


@kernel
def wants_more(lane):
    """Return whether a lane could go on at once, so that no descriptor would tell of it."""
    if lane.state != LaneState.LIVE:
        return False
    if lane.writable != 0 and has_output(lane):
        return True
    if lane.queue == 0 and answering(lane):
        return False
    return lane.readable != 0 or has_whole_header(lane)


# ------------------------------------------------------------------------------ what was posted just now
@kernel
def push_lanes(queue, posted):
    """Send what is for the lanes of the `posted` newest entries of a queue, on a lane that is free for it.

    Returns whether descriptors tell of the rest. False, with nothing sent, where others wait in front or no lane is.
    """
    port, head = port_at(queue.port), queue.head
    at = max(queue.sent, queue.tail)
    if head - at > posted:
        return False
    while at < head and entry_of(queue, at).route != Route.LANE:
        at += 1
    if at == head:
        return True
    for i in range(queue.lane_count):
        lane = lane_at(i64(queue.lanes)[i])
        free = lane.writable != 0 and lane.out_at == lane.out_end
        if lane.state == LaneState.LIVE and free:
            tell_time(port)
            send(lane)
            strike_off(port, queue)
            return not wants_more(lane)
    return False


@kernel
def strike_off(port, queue):
    """Take a queue's lanes that need nothing more off the end of the port's list, where posting has put them."""
    while port.listed > 0:
        lane = lane_at(i64(port.list)[port.listed - 1])
        if lane.queue != address(queue) or wants_more(lane):
            return
        lane.listed = 0
        port.listed -= 1


# ------------------------------------------------------------------------------ the port
@kernel
def gather_events(port):
    """Ask epoll which lanes have become readable or writable, and list them."""
    events = port.events
    n = epoll_wait(port.syscall, port.epoll, events, EVENTS, 0)
    for i in range(n):
        event = epoll_event_at(events, i)
        what, lane = event.events, lane_at(event.data)
        if missing(lane):
            continue  # a nudge: look at the words it came with
        if what & EPOLLOUT:
            lane.writable = 1
        if what & (EPOLLERR | EPOLLHUP | EPOLLRDHUP):
            if lane.queue == 0:  # what is left of a peer that is gone is not read
                if acquire(lane, "state") == LaneState.LIVE:
                    break_lane(lane, Reason.CLOSED, 0)
                continue
            lane.readable = ENDED
        elif what & EPOLLIN:
            lane.readable = 1
        enlist(lane)
    port.fresh = n < EVENTS


@kernel
def serve_listed(port):
    """Serve every listed lane once; those that could go on stay listed. Return whether anything moved."""
    listed, n, kept, moved = i64(port.list), port.listed, 0, False
    for i in range(n):
        lane = lane_at(listed[i])
        moved = serve(lane) or moved
        if wants_more(lane):
            listed[kept] = address(lane)
            kept += 1
        else:
            lane.listed = 0
    port.listed = kept
    return moved


@kernel
def tell_time(port):
    """Note the time, ns."""
    call_clock_gettime(port.clock, CLOCK_MONOTONIC, where(port, "timespec"))
    port.now = port.timespec.seconds * NS_PER_S + port.timespec.ns


@kernel
def turn_lanes(port):
    """Run one round over a worker's lanes; return whether bytes moved or could move at once."""
    before = port.now
    tell_time(port)
    if before != 0 and port.now - before > port.stall:
        drop_incoming(port)
    if acquire(port, "adopt") != port.adopted:
        adopt(port)
    turns = port.turns
    port.turns = turns + 1
    port.fresh = 0
    if port.listed == 0 or turns % 8 == 0:
        gather_events(port)
    moved = serve_listed(port)
    if port.now > port.next_check:
        check_stalls(port)
    return moved or port.listed > 0
