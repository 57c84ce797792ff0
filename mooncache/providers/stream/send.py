"""Sending on a lane: requests built from its queue pair's entries, or the answer that a peer's request was given."""

from mooncache.kernels.atomics import i8, i64
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import POLLOUT, sendmsg
from mooncache.kernels.records.base import address, missing, where
from mooncache.kernels.records.linux import iovec_at
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.keys import key_status
from mooncache.providers.stream.frames import (
    FRAME_SLICES,
    Frame,
    advance,
    head_bytes,
    set_range,
    slice_in,
    write_entry,
    write_header,
)
from mooncache.providers.stream.lane import (
    CALLS,
    FLIGHTS,
    LOST,
    Route,
    entry_of,
    fault,
    flights,
    guard,
    is_open_for,
    is_unreachable,
    slice_of,
)
from mooncache.providers.stream.records import flight_at, frame_at, port_at, queue_at


@kernel
def next_request(lane):
    """Build the next request frame from the queue's entries; False when there is none, or too many are in flight."""
    queue = queue_at(lane.queue)
    # What was copied and reported meanwhile has moved the tail past what no lane has looked at.
    at, head = max(queue.sent, queue.tail), queue.head
    while at < head and entry_of(queue, at).route != Route.LANE:
        at += 1
    queue.sent = at
    if at == head or flights(lane) == FLIGHTS:
        return False
    frame, iov = frame_at(lane.out_head), lane.out_iov
    opcode = entry_of(queue, at).opcode
    most = 1 if opcode == Opcode.SEND else FRAME_SLICES
    n, size = 0, 0
    while n < most and at + n < head:
        entry = entry_of(queue, at + n)
        if entry.opcode != opcode or entry.route != Route.LANE:
            break
        length = entry.length
        write_entry(frame, n, entry.remote, length, entry.key)
        set_range(iov, n + 1, entry.local, length)
        size += length
        n += 1
    if opcode == Opcode.READ:
        size = 0
    write_header(frame, opcode, lane.seq, n, size)
    set_range(iov, 0, lane.out_head, head_bytes(n))
    lane.out_at = 0
    lane.out_end = 1 if opcode == Opcode.READ else n + 1
    flight = flight_at(lane.flights, lane.flight_head % FLIGHTS)
    flight.first = at
    flight.count = n
    flight.opcode = opcode
    lane.flight_head += 1
    lane.seq += 1
    queue.sent = at + n
    return True


@kernel
def spoil_withdrawn(lane):
    """Send zeros for what lies in a region withdrawn meanwhile, before more of a DATA frame is sent."""
    keys, frame, iov = port_at(lane.port).keys, frame_at(lane.in_head), lane.out_iov
    status, trailer = i64(lane.in_status), lane.out_trailer
    at = 1
    for i in range(frame.count):
        if status[i] != WcStatus.SUCCESS:
            continue
        asked = slice_in(frame, i)
        if at >= lane.out_at and key_status(keys, asked.third, asked.first, asked.second, Opcode.READ):
            iovec_at(iov, at).base = port_at(lane.port).zeros
            i8(trailer)[i] = WcStatus.REM_ACCESS_ERR
        at += 1


@kernel
def lose_source(lane, at):
    """Send zeros for range `at` of the frame under way, which cannot be read; its slice fails."""
    queue = queue_at(lane.queue)
    iovec_at(lane.out_iov, at).base = port_at(lane.port).zeros
    lane.out_single = 0
    if missing(queue):
        i8(lane.out_trailer)[slice_of(lane, at - 1)] = WcStatus.REM_OP_ERR
    else:
        flight = flight_at(lane.flights, (lane.flight_head - 1) % FLIGHTS)
        entry_of(queue, flight.first + at - 1).local = LOST


@kernel
def send(lane):
    """Send what there is, frame after frame, until the socket takes no more; return system calls that moved bytes."""
    port, queue = port_at(lane.port), queue_at(lane.queue)
    message, moved = port.message, 0
    port.fresh = 0
    while moved < CALLS:
        at, end = lane.out_at, lane.out_end
        if at == end:
            if missing(queue) or not next_request(lane):
                return moved
            at, end = lane.out_at, lane.out_end
        serving = missing(queue) and lane.out_kind == Frame.DATA
        if serving:
            guard(lane)
            spoil_withdrawn(lane)
        iov = lane.out_iov
        message.iov = address(iovec_at(iov, at))
        ranges = 1 if lane.out_single != 0 else end - at
        message.iovlen = ranges
        n = sendmsg(port.syscall, lane.fd, where(port, "message"))
        if serving:
            guard(lane)
        if n < 0 and is_unreachable(lane):
            if ranges == 1:
                lose_source(lane, at)
            else:
                lane.out_single = 1
            continue
        if n < 0:
            fault(lane, False)
            return moved
        moved += 1
        before, at = at, advance(iov, at, n)
        lane.out_at = at
        lane.progress = port.now
        if at == end:
            lane.out_single = 0
        elif at < before + ranges and not is_open_for(lane, POLLOUT):
            lane.writable = 0
            return moved
    return moved
