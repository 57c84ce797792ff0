"""Receiving on a lane: a frame's head, then its body, straight into pages.

An incoming lane checks each range of a request and lays out its answer; an outgoing one settles its request's entries.
"""

import numpy as np

from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import copy, i8, peek, poke, store
from mooncache.kernels.enums import Opcode
from mooncache.kernels.inbox import deliver
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import IOV_BASE, IOV_LEN, IOVEC_BYTES, MSG_IOV, MSG_IOVLEN, POLLIN, discard, recv, recvmsg
from mooncache.kernels.records.inbox import inbox_at
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.device import key_status
from mooncache.providers.stream.frames import (
    DISCARD,
    H_BYTES,
    H_COUNT,
    H_KIND,
    H_SEQ,
    HEADER_BYTES,
    MAGIC,
    Frame,
    advance,
    entry_at,
    head_bytes,
    header_holds,
    request_holds,
    set_range,
    trailer_bytes,
    write_entry,
    write_header,
)
from mooncache.providers.stream.lane import (
    BODY,
    E_LENGTH,
    E_LOCAL,
    E_STATUS,
    F_COUNT,
    F_FIRST,
    F_OPCODE,
    FLIGHT_WORDS,
    FLIGHTS,
    HEADER,
    L_FD,
    L_FLIGHT_HEAD,
    L_FLIGHT_TAIL,
    L_FLIGHTS,
    L_IN_AT,
    L_IN_END,
    L_IN_GOT,
    L_IN_HEAD,
    L_IN_IOV,
    L_IN_NEXT,
    L_IN_NEXT_GOT,
    L_IN_NOTE,
    L_IN_SINGLE,
    L_IN_STAGE,
    L_IN_STATUS,
    L_OUT_AT,
    L_OUT_END,
    L_OUT_HEAD,
    L_OUT_IOV,
    L_OUT_KIND,
    L_OUT_TRAILER,
    L_PORT,
    L_PROGRESS,
    L_QUEUE,
    L_READABLE,
    L_SENDER,
    L_STATE,
    L_TRAILER,
    LOST,
    P_INBOX,
    P_KEYS,
    P_MSGHDR,
    P_NOW,
    P_SYSCALL,
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
    word_at,
)


@kernel
def begin_in(lane, ranges):
    """The head of a frame has been read: behind `ranges` iovecs of its body comes the next frame's header."""
    set_range(word_at(lane, L_IN_IOV), ranges, word_at(lane, L_IN_NEXT), HEADER_BYTES)
    poke(lane + L_IN_AT * WORD, 0)
    poke(lane + L_IN_END * WORD, ranges)
    poke(lane + L_IN_NEXT_GOT * WORD, 0)
    poke(lane + L_IN_STAGE * WORD, BODY)


@kernel
def open_request(lane):
    """A peer's request is there with its table: check every range, and lay out where its bytes go."""
    frame, iov, status = word_at(lane, L_IN_HEAD), word_at(lane, L_IN_IOV), word_at(lane, L_IN_STATUS)
    keys = word_at(word_at(lane, L_PORT), P_KEYS)
    if not request_holds(frame):
        break_lane(lane, Reason.BAD_TABLE, 0)
        return
    kind, count = peek(frame + H_KIND) - MAGIC, peek(frame + H_COUNT)
    if kind == Frame.NOTE:
        takes = peek(frame + H_BYTES) <= inbox_at(word_at(word_at(lane, L_PORT), P_INBOX)).bytes
        set_range(iov, 0, word_at(lane, L_IN_NOTE) if takes else np.int64(DISCARD), peek(frame + H_BYTES))
        begin_in(lane, 1)
        return
    opcode = Opcode.READ if kind == Frame.READ else Opcode.WRITE
    for i in range(count):
        entry = entry_at(frame, i)
        address, length, key = peek(entry), peek(entry + WORD), peek(entry + 2 * WORD)
        answer = key_status(keys, key, address, length, opcode)
        poke(status + i * WORD, answer)
        set_range(iov, i, address if answer == WcStatus.SUCCESS else np.int64(DISCARD), length)
    begin_in(lane, 0 if kind == Frame.READ else count)


@kernel
def drop_withdrawn(lane):
    """Before more of a WRITE is received: what lies in a region withdrawn meanwhile is dropped."""
    frame, iov, status = word_at(lane, L_IN_HEAD), word_at(lane, L_IN_IOV), word_at(lane, L_IN_STATUS)
    keys = word_at(word_at(lane, L_PORT), P_KEYS)
    for i in range(word_at(lane, L_IN_AT), word_at(lane, L_IN_END)):
        entry = entry_at(frame, i)
        if peek(status + i * WORD) == WcStatus.SUCCESS:
            answer = key_status(keys, peek(entry + 2 * WORD), peek(entry), peek(entry + WORD), Opcode.WRITE)
            if answer != WcStatus.SUCCESS:
                poke(status + i * WORD, answer)
                poke(iov + i * IOVEC_BYTES + IOV_BASE, DISCARD)


@kernel
def answer_request(lane):
    """All of a request has been received: lay out its answer."""
    frame, status = word_at(lane, L_IN_HEAD), word_at(lane, L_IN_STATUS)
    answer, iov = word_at(lane, L_OUT_HEAD), word_at(lane, L_OUT_IOV)
    kind, count = peek(frame + H_KIND) - MAGIC, peek(frame + H_COUNT)
    if kind == Frame.NOTE:
        inbox, who = word_at(word_at(lane, L_PORT), P_INBOX), word_at(lane, L_SENDER)
        put = deliver(inbox, who, word_at(lane, L_IN_NOTE), peek(frame + H_BYTES))
        poke(status, WcStatus.SUCCESS if put else WcStatus.RNR_RETRY_EXC_ERR)
    failed, ranges, size = 0, 1, 0
    for i in range(count):
        if peek(status + i * WORD) != WcStatus.SUCCESS:
            write_entry(answer, failed, i, peek(status + i * WORD), 0)
            failed += 1
        elif kind == Frame.READ:
            length = peek(entry_at(frame, i) + WORD)
            set_range(iov, ranges, peek(entry_at(frame, i)), length)
            ranges += 1
            size += length
    if kind == Frame.READ:
        for at in range(0, trailer_bytes(count), WORD):
            poke(word_at(lane, L_OUT_TRAILER) + at, 0)
        set_range(iov, ranges, word_at(lane, L_OUT_TRAILER), trailer_bytes(count))
        ranges += 1
    answers = np.int64(Frame.DATA if kind == Frame.READ else Frame.ACK)
    write_header(answer, answers, peek(frame + H_SEQ), failed, size)
    set_range(iov, 0, answer, head_bytes(failed))
    poke(lane + L_OUT_KIND * WORD, answers)
    poke(lane + L_OUT_AT * WORD, 0)
    poke(lane + L_OUT_END * WORD, ranges)


@kernel
def may_be_said(why):
    """Whether a target may answer this for a slice: what went wrong with itself, never here or on the way."""
    return (
        why == WcStatus.REM_ACCESS_ERR
        or why == WcStatus.REM_INV_REQ_ERR
        or why == WcStatus.REM_OP_ERR
        or why == WcStatus.RNR_RETRY_EXC_ERR
    )


@kernel
def open_answer(lane):
    """An answer is there with its table: match it with the oldest request, and lay out where its bytes go."""
    frame, iov, status = word_at(lane, L_IN_HEAD), word_at(lane, L_IN_IOV), word_at(lane, L_IN_STATUS)
    queue, oldest = word_at(lane, L_QUEUE), word_at(lane, L_FLIGHT_TAIL)
    flight = word_at(lane, L_FLIGHTS) + oldest % FLIGHTS * FLIGHT_WORDS * WORD
    count, reads = peek(flight + F_COUNT * WORD), peek(flight + F_OPCODE * WORD) == Opcode.READ
    expected = MAGIC | (Frame.DATA if reads else Frame.ACK)
    half_sent = oldest == word_at(lane, L_FLIGHT_HEAD) - 1 and word_at(lane, L_OUT_AT) < word_at(lane, L_OUT_END)
    if flights(lane) == 0 or half_sent or peek(frame + H_SEQ) != oldest or peek(frame + H_KIND) != expected:
        break_lane(lane, Reason.BAD_ANSWER, 0)
        return
    for i in range(count):
        poke(status + i * WORD, WcStatus.SUCCESS)
    for i in range(peek(frame + H_COUNT)):
        index, why = peek(entry_at(frame, i)), peek(entry_at(frame, i) + WORD)
        if index < 0 or index >= count or not may_be_said(why):
            break_lane(lane, Reason.BAD_ANSWER, 0)
            return
        poke(status + index * WORD, why)
    ranges, size = 0, 0
    if reads:
        for i in range(count):
            if peek(status + i * WORD) == WcStatus.SUCCESS:
                entry = entry_of(queue, peek(flight + F_FIRST * WORD) + i)
                set_range(iov, ranges, word_at(entry, E_LOCAL), word_at(entry, E_LENGTH))
                size += word_at(entry, E_LENGTH)
                ranges += 1
        set_range(iov, ranges, word_at(lane, L_TRAILER), trailer_bytes(count))
        ranges += 1
    if peek(frame + H_BYTES) != size:
        break_lane(lane, Reason.BAD_ANSWER, 0)
        return
    begin_in(lane, ranges)


@kernel
def settle_flight(lane):
    """All of an answer has been received: write the statuses of its request's entries."""
    queue, oldest = word_at(lane, L_QUEUE), word_at(lane, L_FLIGHT_TAIL)
    flight = word_at(lane, L_FLIGHTS) + oldest % FLIGHTS * FLIGHT_WORDS * WORD
    status, told = word_at(lane, L_IN_STATUS), i8(word_at(lane, L_TRAILER))
    reads = peek(flight + F_OPCODE * WORD) == Opcode.READ
    for i in range(peek(flight + F_COUNT * WORD)):
        entry = entry_of(queue, peek(flight + F_FIRST * WORD) + i)
        why = peek(status + i * WORD)
        if reads and why == WcStatus.SUCCESS and told[i] != 0:
            why = np.int64(told[i]) if may_be_said(told[i]) else np.int64(WcStatus.REM_OP_ERR)
        if word_at(entry, E_LOCAL) == LOST:
            why = np.int64(WcStatus.LOC_PROT_ERR)
        store(entry + E_STATUS * WORD, why)
    poke(lane + L_FLIGHT_TAIL * WORD, oldest + 1)


@kernel
def read_head(lane, buffer, length):
    """Read on in a frame's head; whether it is complete. The lane may be broken afterwards."""
    port, got = word_at(lane, L_PORT), word_at(lane, L_IN_GOT)
    if got < length:
        n = recv(word_at(port, P_SYSCALL), word_at(lane, L_FD), buffer + got, length - got)
        if n == 0:
            break_lane(lane, Reason.CLOSED, 0)
            return False
        if n < 0:
            fault(lane, L_READABLE)
            return False
        got += n
        poke(lane + L_IN_GOT * WORD, got)
        poke(lane + L_PROGRESS * WORD, word_at(port, P_NOW))
        if got < length:
            drained(lane)
    return got >= length


@kernel
def lose_target(lane, at):
    """What range `at` of the frame coming in names cannot be written: its bytes are dropped, and its slice fails."""
    status = word_at(lane, L_IN_STATUS)
    poke(word_at(lane, L_IN_IOV) + at * IOVEC_BYTES + IOV_BASE, DISCARD)
    poke(lane + L_IN_SINGLE * WORD, 0)
    if word_at(lane, L_QUEUE) == 0:
        poke(status + at * WORD, WcStatus.REM_OP_ERR)
    else:
        poke(status + slice_of(lane, at) * WORD, WcStatus.LOC_PROT_ERR)


@kernel
def read_body(lane):
    """Read on in a frame's body, and into the next frame's header; whether the body is complete."""
    port = word_at(lane, L_PORT)
    at, end = word_at(lane, L_IN_AT), word_at(lane, L_IN_END)
    if at == end:
        return True
    iov, syscall, fd = word_at(lane, L_IN_IOV), word_at(port, P_SYSCALL), word_at(lane, L_FD)
    serving = word_at(lane, L_QUEUE) == 0
    if serving:
        guard(lane)
        if not may_land(lane):
            guard(lane)
            break_lane(lane, Reason.CLOSED, 0)
            return False
        if peek(word_at(lane, L_IN_HEAD) + H_KIND) == MAGIC | Frame.WRITE:
            drop_withdrawn(lane)
    last, asked, most = at, 0, at if word_at(lane, L_IN_SINGLE) != 0 else end
    while last <= most and peek(iov + last * IOVEC_BYTES + IOV_BASE) != DISCARD:
        asked += peek(iov + last * IOVEC_BYTES + IOV_LEN)
        last += 1
    if last == at:
        asked = peek(iov + at * IOVEC_BYTES + IOV_LEN)
        n = discard(syscall, fd, asked)
    else:
        message = word_at(port, P_MSGHDR)
        poke(message + MSG_IOV, iov + at * IOVEC_BYTES)
        poke(message + MSG_IOVLEN, last - at)
        n = recvmsg(syscall, fd, message)
    if serving:
        guard(lane)
    if n == 0:
        break_lane(lane, Reason.CLOSED, 0)
        return False
    if n < 0 and is_unreachable(lane):
        if last == at + 1:
            lose_target(lane, at)
        else:
            poke(lane + L_IN_SINGLE * WORD, 1)
        return False
    if n < 0:
        fault(lane, L_READABLE)
        return False
    poke(lane + L_PROGRESS * WORD, word_at(port, P_NOW))
    at = advance(iov, at, n)
    if n < asked and (at >= end or not is_open_for(lane, POLLIN)):
        drained(lane)
    if at >= end:
        poke(lane + L_IN_SINGLE * WORD, 0)
        poke(lane + L_IN_NEXT_GOT * WORD, HEADER_BYTES - peek(iov + end * IOVEC_BYTES + IOV_LEN))
        at = end
    poke(lane + L_IN_AT * WORD, at)
    return at == end


@kernel
def next_frame(lane):
    """Turn to the frame whose header was read along with the last one's body."""
    got = word_at(lane, L_IN_NEXT_GOT)
    copy(word_at(lane, L_IN_HEAD), word_at(lane, L_IN_NEXT), got)
    poke(lane + L_IN_GOT * WORD, got)
    poke(lane + L_IN_NEXT_GOT * WORD, 0)
    poke(lane + L_IN_STAGE * WORD, HEADER)


@kernel
def receive(lane):
    """One step of receiving: a head, or a piece of a body. Returns whether anything moved."""
    frame, incoming = word_at(lane, L_IN_HEAD), word_at(lane, L_QUEUE) == 0
    before = word_at(lane, L_IN_GOT)
    if word_at(lane, L_IN_STAGE) == HEADER:
        if not read_head(lane, frame, np.int64(HEADER_BYTES)):
            return word_at(lane, L_IN_GOT) > before
        if not header_holds(frame, incoming):
            break_lane(lane, Reason.BAD_HEADER, 0)
            return False
        poke(lane + L_IN_STAGE * WORD, TABLE)
    if word_at(lane, L_IN_STAGE) == TABLE:
        if not read_head(lane, frame, head_bytes(peek(frame + H_COUNT))):
            return word_at(lane, L_IN_GOT) > before
        if incoming:
            open_request(lane)
        else:
            open_answer(lane)
        if word_at(lane, L_STATE) != LaneState.LIVE:
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
