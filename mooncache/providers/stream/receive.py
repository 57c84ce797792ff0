"""Receiving on a lane: a frame's head, then its body, straight into pages.

An incoming lane checks each range of a request and lays out its answer; an outgoing one settles its request's entries.
"""

import numpy as np

from mooncache.kernels.atomics import copy, fill_bytes, i8, i64
from mooncache.kernels.enums import Opcode
from mooncache.kernels.inbox import deliver
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import POLLIN, discard, recv, recvmsg
from mooncache.kernels.records.base import address, release, where
from mooncache.kernels.records.inbox import inbox_at
from mooncache.kernels.records.linux import iovec_at
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.keys import key_status
from mooncache.providers.stream.frames import (
    DISCARD,
    HEADER_BYTES,
    MAGIC,
    Frame,
    advance,
    head_bytes,
    header_holds,
    request_holds,
    set_range,
    slice_in,
    trailer_bytes,
    write_entry,
    write_header,
)
from mooncache.providers.stream.lane import (
    BODY,
    FLIGHTS,
    HEADER,
    LOST,
    TABLE,
    LaneState,
    Reason,
    break_lane,
    drained,
    entry_of,
    fault,
    flights,
    guard,
    is_open_for,
    is_unreachable,
    may_land,
    slice_of,
)
from mooncache.providers.stream.records import flight_at, frame_at, port_at, queue_at


@kernel
def begin_in(lane, ranges):
    """Begin a frame's body: behind its `ranges` iovecs comes the next frame's header."""
    set_range(lane.in_iov, ranges, lane.in_next, HEADER_BYTES)
    lane.in_at = 0
    lane.in_end = ranges
    lane.in_next_got = 0
    lane.in_stage = BODY


@kernel
def open_request(lane):
    """Check every range of a peer's request, which is there with its table, and lay out where its bytes go."""
    frame, iov, status = frame_at(lane.in_head), lane.in_iov, i64(lane.in_status)
    keys = port_at(lane.port).keys
    if not request_holds(frame):
        break_lane(lane, Reason.BAD_TABLE, 0)
        return
    kind, count = frame.kind - MAGIC, frame.count
    if kind == Frame.NOTE:
        takes = frame.bytes <= inbox_at(port_at(lane.port).inbox).bytes
        set_range(iov, 0, lane.in_note if takes else np.int64(DISCARD), frame.bytes)
        begin_in(lane, 1)
        return
    opcode = Opcode.READ if kind == Frame.READ else Opcode.WRITE
    for i in range(count):
        asked = slice_in(frame, i)
        status[i] = key_status(keys, asked.third, asked.first, asked.second, opcode)
        set_range(iov, i, asked.first if status[i] == WcStatus.SUCCESS else np.int64(DISCARD), asked.second)
    begin_in(lane, 0 if kind == Frame.READ else count)


@kernel
def drop_withdrawn(lane):
    """Drop what lies in a region withdrawn meanwhile, before more of a WRITE is received."""
    frame, iov, status = frame_at(lane.in_head), lane.in_iov, i64(lane.in_status)
    keys = port_at(lane.port).keys
    for i in range(lane.in_at, lane.in_end):
        asked = slice_in(frame, i)
        if status[i] == WcStatus.SUCCESS:
            status[i] = key_status(keys, asked.third, asked.first, asked.second, Opcode.WRITE)
            if status[i] != WcStatus.SUCCESS:
                iovec_at(iov, i).base = DISCARD


@kernel
def answer_request(lane):
    """Lay out the answer to a request that has been received whole."""
    frame, status = frame_at(lane.in_head), i64(lane.in_status)
    answer, iov = frame_at(lane.out_head), lane.out_iov
    kind, count = frame.kind - MAGIC, frame.count
    if kind == Frame.NOTE:
        inbox, who = port_at(lane.port).inbox, lane.sender
        put = deliver(inbox, who, lane.in_note, frame.bytes)
        status[0] = WcStatus.SUCCESS if put else WcStatus.RNR_RETRY_EXC_ERR
    failed, ranges, size = 0, 1, 0
    for i in range(count):
        if status[i] != WcStatus.SUCCESS:
            write_entry(answer, failed, i, status[i], 0)
            failed += 1
        elif kind == Frame.READ:
            asked = slice_in(frame, i)
            set_range(iov, ranges, asked.first, asked.second)
            ranges += 1
            size += asked.second
    if kind == Frame.READ:
        fill_bytes(lane.out_trailer, 0, trailer_bytes(count))
        set_range(iov, ranges, lane.out_trailer, trailer_bytes(count))
        ranges += 1
    answers = np.int64(Frame.DATA if kind == Frame.READ else Frame.ACK)
    write_header(answer, answers, frame.seq, failed, size)
    set_range(iov, 0, lane.out_head, head_bytes(failed))
    lane.out_kind = answers
    lane.out_at = 0
    lane.out_end = ranges


@kernel
def may_be_said(why):
    """Return whether a target may give this answer for a slice: its own fault, never one here or on the way."""
    return (
        why == WcStatus.REM_ACCESS_ERR
        or why == WcStatus.REM_INV_REQ_ERR
        or why == WcStatus.REM_OP_ERR
        or why == WcStatus.RNR_RETRY_EXC_ERR
    )


@kernel
def open_answer(lane):
    """Match an answer, which is there with its table, with the oldest request, and lay out where its bytes go."""
    frame, iov, status = frame_at(lane.in_head), lane.in_iov, i64(lane.in_status)
    queue, oldest = queue_at(lane.queue), lane.flight_tail
    flight = flight_at(lane.flights, oldest % FLIGHTS)
    count, reads = flight.count, flight.opcode == Opcode.READ
    expected = MAGIC | (Frame.DATA if reads else Frame.ACK)
    half_sent = oldest == lane.flight_head - 1 and lane.out_at < lane.out_end
    if flights(lane) == 0 or half_sent or frame.seq != oldest or frame.kind != expected:
        break_lane(lane, Reason.BAD_ANSWER, 0)
        return
    for i in range(count):
        status[i] = WcStatus.SUCCESS
    for i in range(frame.count):
        index, why = slice_in(frame, i).first, slice_in(frame, i).second
        if index < 0 or index >= count or not may_be_said(why):
            break_lane(lane, Reason.BAD_ANSWER, 0)
            return
        status[index] = why
    ranges, size = 0, 0
    if reads:
        for i in range(count):
            if status[i] == WcStatus.SUCCESS:
                entry = entry_of(queue, flight.first + i)
                set_range(iov, ranges, entry.local, entry.length)
                size += entry.length
                ranges += 1
        set_range(iov, ranges, lane.trailer, trailer_bytes(count))
        ranges += 1
    if frame.bytes != size:
        break_lane(lane, Reason.BAD_ANSWER, 0)
        return
    begin_in(lane, ranges)


@kernel
def settle_flight(lane):
    """Write the statuses of a request's entries, whose answer has been received whole."""
    queue, oldest = queue_at(lane.queue), lane.flight_tail
    flight = flight_at(lane.flights, oldest % FLIGHTS)
    status, told = i64(lane.in_status), i8(lane.trailer)
    reads = flight.opcode == Opcode.READ
    for i in range(flight.count):
        entry = entry_of(queue, flight.first + i)
        why = status[i]
        if reads and why == WcStatus.SUCCESS and told[i] != 0:
            why = np.int64(told[i]) if may_be_said(told[i]) else np.int64(WcStatus.REM_OP_ERR)
        if entry.local == LOST:
            why = np.int64(WcStatus.LOC_PROT_ERR)
        release(entry, "status", why)
    lane.flight_tail = oldest + 1


@kernel
def read_head(lane, buffer, length):
    """Read on in a frame's head; return whether it is complete. The lane may be broken afterwards."""
    port, got = port_at(lane.port), lane.in_got
    if got < length:
        n = recv(port.syscall, lane.fd, buffer + got, length - got)
        if n == 0:
            break_lane(lane, Reason.CLOSED, 0)
            return False
        if n < 0:
            fault(lane, True)
            return False
        got += n
        lane.in_got = got
        lane.progress = port.now
        if got < length:
            drained(lane)
    return got >= length


@kernel
def lose_target(lane, at):
    """Drop the bytes for range `at` of the frame coming in, which cannot be written; its slice fails."""
    status = i64(lane.in_status)
    iovec_at(lane.in_iov, at).base = DISCARD
    lane.in_single = 0
    if lane.queue == 0:
        status[at] = WcStatus.REM_OP_ERR
    else:
        status[slice_of(lane, at)] = WcStatus.LOC_PROT_ERR


@kernel
def read_body(lane):
    """Read on in a frame's body, and into the next frame's header; return whether the body is complete."""
    port = port_at(lane.port)
    at, end = lane.in_at, lane.in_end
    if at == end:
        return True
    iov, syscall, fd = lane.in_iov, port.syscall, lane.fd
    serving = lane.queue == 0
    if serving:
        guard(lane)
        if not may_land(lane):
            guard(lane)
            break_lane(lane, Reason.CLOSED, 0)
            return False
        if frame_at(lane.in_head).kind == MAGIC | Frame.WRITE:
            drop_withdrawn(lane)
    last, asked, most = at, 0, at if lane.in_single != 0 else end
    while last <= most and iovec_at(iov, last).base != DISCARD:
        asked += iovec_at(iov, last).length
        last += 1
    if last == at:
        asked = iovec_at(iov, at).length
        n = discard(syscall, fd, asked)
    else:
        port.message.iov = address(iovec_at(iov, at))
        port.message.iovlen = last - at
        n = recvmsg(syscall, fd, where(port, "message"))
    if serving:
        guard(lane)
    if n == 0:
        break_lane(lane, Reason.CLOSED, 0)
        return False
    if n < 0 and is_unreachable(lane):
        if last == at + 1:
            lose_target(lane, at)
        else:
            lane.in_single = 1
        return False
    if n < 0:
        fault(lane, True)
        return False
    lane.progress = port.now
    at = advance(iov, at, n)
    if n < asked and (at >= end or not is_open_for(lane, POLLIN)):
        drained(lane)
    if at >= end:
        lane.in_single = 0
        lane.in_next_got = HEADER_BYTES - iovec_at(iov, end).length
        at = end
    lane.in_at = at
    return at == end


@kernel
def next_frame(lane):
    """Turn to the frame whose header was read along with the last one's body."""
    got = lane.in_next_got
    copy(lane.in_head, lane.in_next, got)
    lane.in_got = got
    lane.in_next_got = 0
    lane.in_stage = HEADER


@kernel
def receive(lane):
    """Do one step of receiving: a head, or a piece of a body. Return whether anything moved."""
    frame, incoming = frame_at(lane.in_head), lane.queue == 0
    before = lane.in_got
    if lane.in_stage == HEADER:
        if not read_head(lane, lane.in_head, np.int64(HEADER_BYTES)):
            return lane.in_got > before
        if not header_holds(frame, incoming):
            break_lane(lane, Reason.BAD_HEADER, 0)
            return False
        lane.in_stage = TABLE
    if lane.in_stage == TABLE:
        if not read_head(lane, lane.in_head, head_bytes(frame.count)):
            return lane.in_got > before
        if incoming:
            open_request(lane)
        else:
            open_answer(lane)
        if lane.state != LaneState.LIVE:
            return False
    if not read_body(lane):
        return True
    if incoming:
        answer_request(lane)
    else:
        settle_flight(lane)
    if incoming:
        # The request's table is still needed while its answer's bytes go out: `serve` turns to the next frame after.
        return True
    next_frame(lane)
    return True
