"""Sending on a lane: requests built from its queue pair's entries, or the answer that a peer's request was given."""

from mooncache.kernels.account import raise_word
from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import i8, peek, poke
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import IOV_BASE, IOVEC_BYTES, MSG_IOV, MSG_IOVLEN, POLLOUT, sendmsg
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.device import Q_HEAD, Q_TAIL, key_status
from mooncache.providers.stream.frames import (
    FRAME_SLICES,
    H_COUNT,
    Frame,
    advance,
    entry_at,
    head_bytes,
    set_range,
    write_entry,
    write_header,
)
from mooncache.providers.stream.lane import (
    CALLS,
    E_KEY,
    E_LENGTH,
    E_LOCAL,
    E_OPCODE,
    E_REMOTE,
    E_ROUTE,
    F_COUNT,
    F_FIRST,
    F_OPCODE,
    FLIGHT_WORDS,
    FLIGHTS,
    L_FD,
    L_FLIGHT_HEAD,
    L_FLIGHTS,
    L_IN_HEAD,
    L_IN_STATUS,
    L_OUT_AT,
    L_OUT_END,
    L_OUT_HEAD,
    L_OUT_IOV,
    L_OUT_KIND,
    L_OUT_SINGLE,
    L_OUT_TRAILER,
    L_PORT,
    L_PROGRESS,
    L_QUEUE,
    L_SEQ,
    L_WRITABLE,
    LOST,
    P_FRESH,
    P_KEYS,
    P_MSGHDR,
    P_NOW,
    P_SYSCALL,
    P_ZEROS,
    Q_SENT,
    Route,
    entry_of,
    fault,
    flights,
    guard,
    is_open_for,
    is_unreachable,
    slice_of,
    word_at,
)


@kernel
def next_request(lane):
    """Build the next request frame from the queue's entries; False when there is none, or too many are in flight."""
    queue = word_at(lane, L_QUEUE)
    # What was copied and reported meanwhile has moved the tail past what no lane has looked at.
    at, head = max(word_at(queue, Q_SENT), word_at(queue, Q_TAIL)), word_at(queue, Q_HEAD)
    while at < head and word_at(entry_of(queue, at), E_ROUTE) != Route.LANE:
        at += 1
    poke(queue + Q_SENT * WORD, at)
    if at == head or flights(lane) == FLIGHTS:
        return False
    frame, iov = word_at(lane, L_OUT_HEAD), word_at(lane, L_OUT_IOV)
    opcode = word_at(entry_of(queue, at), E_OPCODE)
    most = 1 if opcode == Opcode.SEND else FRAME_SLICES
    n, size = 0, 0
    while n < most and at + n < head:
        entry = entry_of(queue, at + n)
        if word_at(entry, E_OPCODE) != opcode or word_at(entry, E_ROUTE) != Route.LANE:
            break
        length = word_at(entry, E_LENGTH)
        write_entry(frame, n, word_at(entry, E_REMOTE), length, word_at(entry, E_KEY))
        set_range(iov, n + 1, word_at(entry, E_LOCAL), length)
        size += length
        n += 1
    if opcode == Opcode.READ:
        size = 0
    write_header(frame, opcode, word_at(lane, L_SEQ), n, size)
    set_range(iov, 0, frame, head_bytes(n))
    poke(lane + L_OUT_AT * WORD, 0)
    poke(lane + L_OUT_END * WORD, 1 if opcode == Opcode.READ else n + 1)
    flight = word_at(lane, L_FLIGHTS) + word_at(lane, L_FLIGHT_HEAD) % FLIGHTS * FLIGHT_WORDS * WORD
    poke(flight + F_FIRST * WORD, at)
    poke(flight + F_COUNT * WORD, n)
    poke(flight + F_OPCODE * WORD, opcode)
    raise_word(lane + L_FLIGHT_HEAD * WORD, 1)
    raise_word(lane + L_SEQ * WORD, 1)
    poke(queue + Q_SENT * WORD, at + n)
    return True


@kernel
def spoil_withdrawn(lane):
    """Before more of a DATA frame is sent: what lies in a region withdrawn meanwhile goes out as zeros."""
    keys, frame, iov = word_at(word_at(lane, L_PORT), P_KEYS), word_at(lane, L_IN_HEAD), word_at(lane, L_OUT_IOV)
    status, trailer = word_at(lane, L_IN_STATUS), word_at(lane, L_OUT_TRAILER)
    at = 1
    for i in range(peek(frame + H_COUNT)):
        if peek(status + i * WORD) != WcStatus.SUCCESS:
            continue
        entry = entry_at(frame, i)
        length = peek(entry + WORD)
        if at >= word_at(lane, L_OUT_AT) and key_status(keys, peek(entry + 2 * WORD), peek(entry), length, Opcode.READ):
            poke(iov + at * IOVEC_BYTES + IOV_BASE, word_at(word_at(lane, L_PORT), P_ZEROS))
            i8(trailer)[i] = WcStatus.REM_ACCESS_ERR
        at += 1


@kernel
def lose_source(lane, at):
    """What range `at` of the frame under way names cannot be read: zeros go in its place, and its slice fails."""
    queue = word_at(lane, L_QUEUE)
    poke(word_at(lane, L_OUT_IOV) + at * IOVEC_BYTES + IOV_BASE, word_at(word_at(lane, L_PORT), P_ZEROS))
    poke(lane + L_OUT_SINGLE * WORD, 0)
    if queue == 0:
        i8(word_at(lane, L_OUT_TRAILER))[slice_of(lane, at - 1)] = WcStatus.REM_OP_ERR
    else:
        flight = word_at(lane, L_FLIGHTS) + (word_at(lane, L_FLIGHT_HEAD) - 1) % FLIGHTS * FLIGHT_WORDS * WORD
        poke(entry_of(queue, word_at(flight, F_FIRST) + at - 1) + E_LOCAL * WORD, LOST)


@kernel
def send(lane):
    """Send what there is, frame after frame, until the socket takes no more; returns system calls that moved bytes."""
    port, queue = word_at(lane, L_PORT), word_at(lane, L_QUEUE)
    message, moved = word_at(port, P_MSGHDR), 0
    poke(port + P_FRESH * WORD, 0)
    while moved < CALLS:
        at, end = word_at(lane, L_OUT_AT), word_at(lane, L_OUT_END)
        if at == end:
            if queue == 0 or not next_request(lane):
                return moved
            at, end = word_at(lane, L_OUT_AT), word_at(lane, L_OUT_END)
        serving = queue == 0 and word_at(lane, L_OUT_KIND) == Frame.DATA
        if serving:
            guard(lane)
            spoil_withdrawn(lane)
        iov = word_at(lane, L_OUT_IOV)
        poke(message + MSG_IOV, iov + at * IOVEC_BYTES)
        ranges = 1 if word_at(lane, L_OUT_SINGLE) != 0 else end - at
        poke(message + MSG_IOVLEN, ranges)
        n = sendmsg(word_at(port, P_SYSCALL), word_at(lane, L_FD), message)
        if serving:
            guard(lane)
        if n < 0 and is_unreachable(lane):
            if ranges == 1:
                lose_source(lane, at)
            else:
                poke(lane + L_OUT_SINGLE * WORD, 1)
            continue
        if n < 0:
            fault(lane, L_WRITABLE)
            return moved
        moved += 1
        before, at = at, advance(iov, at, n)
        poke(lane + L_OUT_AT * WORD, at)
        poke(lane + L_PROGRESS * WORD, word_at(port, P_NOW))
        if at == end:
            poke(lane + L_OUT_SINGLE * WORD, 0)
        elif at < before + ranges and not is_open_for(lane, POLLOUT):
            poke(lane + L_WRITABLE * WORD, 0)
            return moved
    return moved
