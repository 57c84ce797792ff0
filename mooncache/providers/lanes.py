"""Lanes: connected sockets that carry frames, served by a worker without ever waiting.

    outgoing lane   ours, to a peer     sends requests taken from its queue, receives answers
    incoming lane   a peer's, to us     receives requests, sends answers

A lane row is LANE_WORDS words that only the worker touches while the lane is LIVE; Python hands it over as READY and
gets it back as BROKEN. Bytes go from pages to socket and from socket to pages: each direction has one array of iovecs,
built once a frame and struck off as the kernel takes or delivers bytes. Descriptors are watched edge-triggered, so a
lane is *listed* from the edge until a short read or write says that there is nothing left to do.
"""

from enum import IntEnum

import numpy as np

from mooncache.kernels.account import raise_word
from mooncache.kernels.atomics import call_clock_gettime, call_write, copy, fence, load, peek, poke, store, u32
from mooncache.kernels.inbox import deliver
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import WORD, Opcode
from mooncache.kernels.linux import (
    EAGAIN,
    EINTR,
    EPOLL_EVENT_BYTES,
    EPOLL_EVENT_DATA,
    EPOLLERR,
    EPOLLET,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLRDHUP,
    IOV_BASE,
    IOV_LEN,
    IOVEC_BYTES,
    MSG_IOV,
    MSG_IOVLEN,
    close,
    discard,
    epoll_add,
    epoll_wait,
    errno,
    recv,
    recvmsg,
    sendmsg,
)
from mooncache.kernels.verbs import WcStatus
from mooncache.limits import PEERS
from mooncache.providers.frames import (
    DISCARD,
    FRAME_SLICES,
    H_BYTES,
    H_COUNT,
    H_KIND,
    H_SEQ,
    HEADER_BYTES,
    MAGIC,
    TRAILER_BYTES,
    Frame,
    advance,
    entry_at,
    head_bytes,
    header_holds,
    request_holds,
    set_range,
    write_entry,
    write_header,
)
from mooncache.providers.software import CQ_QUEUES, Q_HEAD, Q_MASK, Q_OWN, Q_RING, Q_TAIL, key_status

# Port words, one set a worker, behind its completion queue's list of queues
(
    P_EPOLL, P_SYSCALL, P_ERRNO, P_CLOCK, P_WRITE, P_LANES, P_LANE_COUNT, P_ADOPT, P_ADOPTED, P_LISTED, P_LIST, P_KEYS,
    P_MSGHDR, P_EVENTS, P_TROUBLE_FD, P_TIMESPEC, P_NOW, P_NEXT_CHECK, P_STALL, P_ZEROS, P_INBOX, P_TURNS,
    P_INDEX, P_ASLEEP, P_NUDGE, P_ONE, P_PORTS, P_PORT_COUNT, P_LOTS, P_LOCAL, P_REMOTE,
) = range(CQ_QUEUES + PEERS, CQ_QUEUES + PEERS + 31)  # fmt: skip
FRAMES_VERSION = 1
EVENTS = 64
CHECK_NS = 250_000_000  # how often lanes are looked over for a stall
CALLS = 4  # system calls on one lane before the next one has its turn

# Queue words of a stream's queue pair, and its ring's entries
(
    Q_SENT, Q_BROKEN, Q_GONE, Q_PORT, Q_LANES, Q_LANE_COUNT, Q_DIRECT, Q_COPIED, Q_CLAIMED, Q_MAPS,
    Q_MAP_HINT, Q_PID, Q_GUARDS,
) = range(Q_OWN, Q_OWN + 13)  # fmt: skip
E_ID, E_LOCAL, E_REMOTE, E_LENGTH, E_OPCODE, E_KEY, E_STATUS, E_ROUTE, ENTRY_WORDS = range(9)
PENDING = -1  # an entry's status until it is answered


class Route(IntEnum):
    """How an entry's bytes travel. Above these: copied, to or from this address, where the peer's memory is mapped."""

    LANE = 0
    PROCESS = 1  # by process_vm_writev and readv


class LaneState(IntEnum):
    """Who may touch a lane's row."""

    EMPTY = 0  # Python
    READY = 1  # the worker will take it
    LIVE = 2  # the worker
    BROKEN = 3  # Python; the descriptor is closed


class Reason(IntEnum):
    """Why a lane broke."""

    NONE = 0
    CLOSED = 1
    ERROR = 2  # L_ERRNO says which
    BAD_HEADER = 3
    BAD_TABLE = 4
    BAD_ANSWER = 5
    STALLED = 6
    SIBLING = 7  # another lane of the same queue pair broke
    NO_EPOLL = 8
    CUT = 9  # Python asked for it


(
    L_STATE, L_FD, L_QUEUE, L_PORT, L_LISTED, L_READABLE, L_WRITABLE, L_REASON, L_ERRNO, L_MOVING, L_PROGRESS, L_SEQ,
    L_IN_STAGE, L_IN_GOT, L_IN_HEAD, L_IN_NEXT, L_IN_NEXT_GOT, L_IN_IOV, L_IN_AT, L_IN_END, L_IN_STATUS, L_IN_NOTE,
    L_OUT_HEAD, L_OUT_IOV, L_OUT_AT, L_OUT_END, L_OUT_KIND, L_FLIGHTS, L_FLIGHT_HEAD, L_FLIGHT_TAIL, L_TRAILER,
    L_OUT_TRAILER, L_CUT, LANE_WORDS,
) = (*range(33), 40)  # fmt: skip
FLIGHTS = 16  # frames sent and not answered, on one lane
F_FIRST, F_COUNT, F_OPCODE, FLIGHT_WORDS = 0, 1, 2, 3
HEADER, TABLE, BODY = 0, 1, 2  # what an incoming frame waits for
ENDED = 2  # L_READABLE: the stream has ended, and what is left of it can be read


@kernel
def word_at(base, field):
    """A word of a lane, port or queue."""
    return peek(base + field * WORD)


@kernel
def entry_of(queue, at):
    """Address of the queue's ring entry number `at`."""
    return word_at(queue, Q_RING) + (at & word_at(queue, Q_MASK)) * ENTRY_WORDS * WORD


# ------------------------------------------------------------------------------ life of a lane
@kernel
def enlist(lane):
    """Let the next poll serve this lane."""
    if word_at(lane, L_LISTED) == 0:
        port = word_at(lane, L_PORT)
        poke(lane + L_LISTED * WORD, 1)
        poke(word_at(port, P_LIST) + word_at(port, P_LISTED) * WORD, lane)
        raise_word(port + P_LISTED * WORD, 1)


@kernel
def adopt(port):
    """Take over the lanes that Python has made ready, and end those that it wants cut."""
    poke(port + P_ADOPTED * WORD, load(port + P_ADOPT * WORD))
    for i in range(word_at(port, P_LANE_COUNT)):
        lane = word_at(port, P_LANES) + i * LANE_WORDS * WORD
        if load(lane + L_STATE * WORD) == LaneState.READY:
            queue = word_at(lane, L_QUEUE)
            if queue != 0 and word_at(queue, Q_BROKEN) != 0:  # its sibling broke before this one came
                close_lane(lane, Reason.SIBLING, 0)
                report_trouble(port)
                continue
            poke(lane + L_STATE * WORD, LaneState.LIVE)
            poke(lane + L_PROGRESS * WORD, word_at(port, P_NOW))
            event = word_at(port, P_EVENTS)
            u32(event)[0] = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
            poke(event + EPOLL_EVENT_DATA, lane)
            if epoll_add(word_at(port, P_SYSCALL), word_at(port, P_EPOLL), word_at(lane, L_FD), event) < 0:
                break_lane(lane, Reason.NO_EPOLL, errno(word_at(port, P_ERRNO)))
        if word_at(lane, L_STATE) == LaneState.LIVE and load(lane + L_CUT * WORD) != 0:
            break_lane(lane, Reason.CUT, 0)


@kernel
def close_lane(lane, reason, error):
    """Close the descriptor and give the row back to Python."""
    port = word_at(lane, L_PORT)
    close(word_at(port, P_SYSCALL), word_at(lane, L_FD))
    poke(lane + L_REASON * WORD, reason)
    poke(lane + L_ERRNO * WORD, error)
    store(lane + L_STATE * WORD, LaneState.BROKEN)


@kernel
def break_lane(lane, reason, error):
    """End a lane. An outgoing one takes its whole queue pair along: what is not answered fails as PEER_GONE."""
    port, queue = word_at(lane, L_PORT), word_at(lane, L_QUEUE)
    close_lane(lane, reason, error)
    if queue != 0:
        for i in range(word_at(port, P_LANE_COUNT)):  # not the queue's own list: that is filled after its lanes live
            other = word_at(port, P_LANES) + i * LANE_WORDS * WORD
            if load(other + L_STATE * WORD) == LaneState.LIVE and word_at(other, L_QUEUE) == queue:
                close_lane(other, Reason.SIBLING, 0)
        break_queue(queue)
    report_trouble(port)


@kernel
def report_trouble(port):
    """Let Python look at the lanes that have broken: until it has told why, nobody else gets them."""
    poke(word_at(port, P_TIMESPEC), 1)
    call_write(word_at(port, P_WRITE), word_at(port, P_TROUBLE_FD), word_at(port, P_TIMESPEC), WORD)


@kernel
def break_queue(queue):
    """Answer what was to go by lane as gone, and say so to submitters."""
    store(queue + Q_BROKEN * WORD, 1)
    poke(queue + Q_SENT * WORD, word_at(queue, Q_HEAD))
    for at in range(word_at(queue, Q_TAIL), word_at(queue, Q_HEAD)):
        entry = entry_of(queue, at)
        if word_at(entry, E_STATUS) == PENDING and word_at(entry, E_ROUTE) == Route.LANE:
            store(entry + E_STATUS * WORD, WcStatus.REM_ABORT_ERR)
    store(word_at(queue, Q_GONE), 1)  # last: whoever clears it, believing to be connected, looks at Q_BROKEN next


@kernel
def fault(lane, readiness):
    """A system call on the lane failed: wait for the next edge of `readiness`, or break the lane."""
    error = errno(word_at(word_at(lane, L_PORT), P_ERRNO))
    if error == EAGAIN:
        poke(lane + readiness * WORD, 0)
    elif error != EINTR:
        break_lane(lane, Reason.ERROR, error)


@kernel
def drained(lane):
    """A read was short, so the socket is empty; unless the stream has ended, which only another read tells."""
    if word_at(lane, L_READABLE) == 1:
        poke(lane + L_READABLE * WORD, 0)


@kernel
def has_output(lane):
    """Whether a frame is half sent, or one could be started."""
    if word_at(lane, L_OUT_AT) < word_at(lane, L_OUT_END):
        return True
    queue = word_at(lane, L_QUEUE)
    return queue != 0 and word_at(queue, Q_SENT) < word_at(queue, Q_HEAD) and flights(lane) < FLIGHTS


@kernel
def flights(lane):
    """Frames sent and not yet answered."""
    return word_at(lane, L_FLIGHT_HEAD) - word_at(lane, L_FLIGHT_TAIL)


@kernel
def check_stalls(port):
    """Break every lane on which something is under way and nothing has moved for too long."""
    now = word_at(port, P_NOW)
    poke(port + P_NEXT_CHECK * WORD, now + CHECK_NS)
    for i in range(word_at(port, P_LANE_COUNT)):
        lane = word_at(port, P_LANES) + i * LANE_WORDS * WORD
        if load(lane + L_STATE * WORD) != LaneState.LIVE:
            continue
        under_way = flights(lane) > 0 or word_at(lane, L_OUT_AT) < word_at(lane, L_OUT_END)
        if not under_way and word_at(lane, L_IN_STAGE) == HEADER and word_at(lane, L_IN_GOT) == 0:
            poke(lane + L_PROGRESS * WORD, now)
        elif now - word_at(lane, L_PROGRESS) > word_at(port, P_STALL):
            break_lane(lane, Reason.STALLED, 0)


# ------------------------------------------------------------------------------ sending
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
def guard(lane):
    """Say that pages of ours are about to be touched for a peer, or no longer are; odd in between."""
    store(lane + L_MOVING * WORD, word_at(lane, L_MOVING) + 1)
    fence()


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
            if peek(trailer) < 0:
                poke(trailer, i)
        at += 1


@kernel
def send(lane):
    """Send what there is, frame after frame, until the socket takes no more; returns system calls that moved bytes."""
    port, queue = word_at(lane, L_PORT), word_at(lane, L_QUEUE)
    message, moved = word_at(port, P_MSGHDR), 0
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
        poke(message + MSG_IOVLEN, end - at)
        n = sendmsg(word_at(port, P_SYSCALL), word_at(lane, L_FD), message)
        if serving:
            guard(lane)
        if n < 0:
            fault(lane, L_WRITABLE)
            return moved
        moved += 1
        at = advance(iov, at, n)
        poke(lane + L_OUT_AT * WORD, at)
        poke(lane + L_PROGRESS * WORD, word_at(port, P_NOW))
        if at < end:
            poke(lane + L_WRITABLE * WORD, 0)
            return moved
    return moved


# ------------------------------------------------------------------------------ receiving
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
        set_range(iov, 0, word_at(lane, L_IN_NOTE), peek(frame + H_BYTES))
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
        put = deliver(word_at(word_at(lane, L_PORT), P_INBOX), word_at(lane, L_IN_NOTE), peek(frame + H_BYTES))
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
        poke(word_at(lane, L_OUT_TRAILER), -1)
        set_range(iov, ranges, word_at(lane, L_OUT_TRAILER), TRAILER_BYTES)
        ranges += 1
    answers = np.int64(Frame.DATA if kind == Frame.READ else Frame.ACK)
    write_header(answer, answers, peek(frame + H_SEQ), failed, size)
    set_range(iov, 0, answer, head_bytes(failed))
    poke(lane + L_OUT_KIND * WORD, answers)
    poke(lane + L_OUT_AT * WORD, 0)
    poke(lane + L_OUT_END * WORD, ranges)


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
        if index < 0 or index >= count or why <= 0 or why > WcStatus.REM_ABORT_ERR:
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
        set_range(iov, ranges, word_at(lane, L_TRAILER), TRAILER_BYTES)
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
    status, untrue = word_at(lane, L_IN_STATUS), np.int64(FRAME_SLICES)
    if peek(flight + F_OPCODE * WORD) == Opcode.READ and peek(word_at(lane, L_TRAILER)) >= 0:
        untrue = peek(word_at(lane, L_TRAILER))
    for i in range(peek(flight + F_COUNT * WORD)):
        why = peek(status + i * WORD)
        if why == WcStatus.SUCCESS and i >= untrue:
            why = np.int64(WcStatus.REM_ACCESS_ERR)
        store(entry_of(queue, peek(flight + F_FIRST * WORD) + i) + E_STATUS * WORD, why)
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
def read_body(lane):
    """Read on in a frame's body, and into the next frame's header; whether the body is complete."""
    port = word_at(lane, L_PORT)
    at, end = word_at(lane, L_IN_AT), word_at(lane, L_IN_END)
    if at == end:
        return True
    iov, syscall, fd = word_at(lane, L_IN_IOV), word_at(port, P_SYSCALL), word_at(lane, L_FD)
    serving = word_at(lane, L_QUEUE) == 0 and peek(word_at(lane, L_IN_HEAD) + H_KIND) == MAGIC | Frame.WRITE
    if serving:
        guard(lane)
        drop_withdrawn(lane)
    last, asked = at, 0
    while last <= end and peek(iov + last * IOVEC_BYTES + IOV_BASE) != DISCARD:
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
    if n < 0:
        fault(lane, L_READABLE)
        return False
    if n < asked:
        drained(lane)
    poke(lane + L_PROGRESS * WORD, word_at(port, P_NOW))
    at = advance(iov, at, n)
    if at >= end:
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


@kernel
def serve(lane):
    """Move what can be moved on a lane without waiting; returns whether anything was. It may be broken afterwards."""
    moved, calls = False, 0
    while calls < CALLS and word_at(lane, L_STATE) == LaneState.LIVE:
        calls += 1
        if word_at(lane, L_QUEUE) == 0 and answering(lane):
            if word_at(lane, L_WRITABLE) == 0 or send(lane) == 0:
                return moved
            moved = True
            if word_at(lane, L_STATE) == LaneState.LIVE and word_at(lane, L_OUT_AT) == word_at(lane, L_OUT_END):
                poke(lane + L_OUT_END * WORD, 0)
                poke(lane + L_OUT_AT * WORD, 0)
                next_frame(lane)
        elif word_at(lane, L_READABLE) != 0 or has_whole_header(lane):
            if not receive(lane):
                break
            moved = True
        else:
            break
    if word_at(lane, L_STATE) == LaneState.LIVE and word_at(lane, L_QUEUE) != 0 and word_at(lane, L_WRITABLE) != 0:
        moved = send(lane) > 0 or moved
    return moved


@kernel
def answering(lane):
    """Whether an incoming lane has an answer laid out that is not all sent."""
    return word_at(lane, L_OUT_END) > 0


@kernel
def has_whole_header(lane):
    """Whether the next step needs no read: a header came along with the body before it, or there is no body to come."""
    stage = word_at(lane, L_IN_STAGE)
    if stage == HEADER:
        return word_at(lane, L_IN_GOT) == HEADER_BYTES
    if stage == TABLE:
        return word_at(lane, L_IN_GOT) >= head_bytes(peek(word_at(lane, L_IN_HEAD) + H_COUNT))
    return word_at(lane, L_IN_AT) == word_at(lane, L_IN_END)


@kernel
def wants_more(lane):
    """Whether a lane could go on at once, so that no descriptor would tell of it."""
    if word_at(lane, L_STATE) != LaneState.LIVE:
        return False
    if word_at(lane, L_WRITABLE) != 0 and has_output(lane):
        return True
    if word_at(lane, L_QUEUE) == 0 and answering(lane):
        return False
    return word_at(lane, L_READABLE) != 0 or has_whole_header(lane)


# ------------------------------------------------------------------------------ the port
@kernel
def gather_events(port):
    """Ask epoll which lanes have become readable or writable, and list them."""
    events = word_at(port, P_EVENTS)
    n = epoll_wait(word_at(port, P_SYSCALL), word_at(port, P_EPOLL), events, EVENTS, 0)
    for i in range(n):
        event = events + i * EPOLL_EVENT_BYTES
        what, lane = u32(event)[0], peek(event + EPOLL_EVENT_DATA)
        if lane == 0:
            continue  # a nudge: look at the words it came with
        if what & EPOLLOUT:
            poke(lane + L_WRITABLE * WORD, 1)
        if what & (EPOLLERR | EPOLLHUP | EPOLLRDHUP):
            poke(lane + L_READABLE * WORD, ENDED)
        elif what & EPOLLIN:
            poke(lane + L_READABLE * WORD, 1)
        enlist(lane)


@kernel
def serve_listed(port):
    """Serve every listed lane once; those that could go on stay listed. Returns whether anything moved."""
    lanes, n, kept, moved = word_at(port, P_LIST), word_at(port, P_LISTED), 0, False
    for i in range(n):
        lane = peek(lanes + i * WORD)
        moved = serve(lane) or moved
        if wants_more(lane):
            poke(lanes + kept * WORD, lane)
            kept += 1
        else:
            poke(lane + L_LISTED * WORD, 0)
    poke(port + P_LISTED * WORD, kept)
    return moved


@kernel
def tell_time(port):
    """Note the time, ns."""
    timespec = word_at(port, P_TIMESPEC)
    call_clock_gettime(word_at(port, P_CLOCK), 1, timespec)
    poke(port + P_NOW * WORD, peek(timespec) * 1_000_000_000 + peek(timespec + WORD))


@kernel
def turn_lanes(port):
    """One round over a worker's lanes; returns whether bytes moved or could move at once."""
    tell_time(port)
    if load(port + P_ADOPT * WORD) != word_at(port, P_ADOPTED):
        adopt(port)
    turns = word_at(port, P_TURNS)
    poke(port + P_TURNS * WORD, turns + 1)
    if word_at(port, P_LISTED) == 0 or turns % 8 == 0:
        gather_events(port)
    moved = serve_listed(port)
    if word_at(port, P_NOW) > word_at(port, P_NEXT_CHECK):
        check_stalls(port)
    return moved or word_at(port, P_LISTED) > 0
