"""Lanes: connected sockets that carry frames, served by a worker without ever waiting.

    outgoing lane   ours, to a peer     sends requests taken from its queue, receives answers
    incoming lane   a peer's, to us     receives requests, sends answers

A lane row is LANE_WORDS words that only the worker touches while the lane is LIVE; Python hands it over as READY and
gets it back as BROKEN. Bytes go from pages to socket and from socket to pages: each direction has one array of iovecs,
built once a frame and struck off as the kernel takes or delivers bytes. Where that finds memory gone (EFAULT), ranges
go one by one until the one at fault is known: its slice fails, zeros or nothing take its place, and the stream goes on.
Descriptors are watched edge-triggered, so a lane is *listed* from the edge until nothing is left to do: a read or write
was short, and not because memory is gone, which poll tells.

Here are the words of lanes, ports and queue pairs, and how a lane begins and ends. `send` and `receive` move its
bytes, `poll` says when.
"""

from enum import IntEnum

import numpy as np

from mooncache.kernels.account import raise_word
from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import add, call_write, fence, load, peek, poke, store, u32
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import (
    EAGAIN,
    EFAULT,
    EINTR,
    EPOLL_EVENT_DATA,
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
from mooncache.kernels.records.base import fetch_add, release
from mooncache.kernels.records.table import table_at
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.device import CQ_OWN, Q_CUT, Q_HEAD, Q_MASK, Q_OWN, Q_RING, Q_TAIL

# Port words, one set a worker, in front of its completion queue's list of queues
(
    P_EPOLL, P_SYSCALL, P_ERRNO, P_CLOCK, P_WRITE, P_LANES, P_LANE_COUNT, P_ADOPT, P_ADOPTED, P_LISTED, P_LIST, P_KEYS,
    P_MSGHDR, P_EVENTS, P_TROUBLE_FD, P_TIMESPEC, P_NOW, P_NEXT_CHECK, P_STALL, P_ZEROS, P_INBOX, P_TURNS,
    P_INDEX, P_ASLEEP, P_NUDGE, P_ONE, P_PORTS, P_PORT_COUNT, P_LOTS, P_COPIER, P_POLL,
    P_FRESH,
) = range(CQ_OWN, CQ_OWN + 32)  # fmt: skip
FRAMES_VERSION = 2
EVENTS = 64
CHECK_NS = 250_000_000  # how often lanes are looked over for a stall
CALLS = 4  # system calls on one lane before the next one has its turn

# Queue words of a stream's queue pair, and its ring's entries
(
    Q_SENT, Q_BROKEN, Q_TABLE, Q_PORT, Q_LANES, Q_LANE_COUNT, Q_DIRECT, Q_COPIED, Q_CLAIMED, Q_MAPS,
    Q_MAP_HINT, Q_PID, Q_GUARDS, Q_POSTING, Q_DOUBT,
) = range(Q_OWN, Q_OWN + 15)  # fmt: skip
E_ID, E_LOCAL, E_REMOTE, E_LENGTH, E_OPCODE, E_KEY, E_STATUS, E_ROUTE, ENTRY_WORDS = range(9)
PENDING = -1  # an entry's status until it is answered


class Route(IntEnum):
    """How an entry's bytes travel. Above these: copied, to or from this address, where the peer's memory is mapped.

    Below: the same, negated, but by the kernel, since our own range may be gone.
    """

    LANE = 0
    PROCESS = 1  # by process_vm_writev and readv


class Broken(IntEnum):
    """Whether a queue pair is connected: its word Q_BROKEN."""

    CONNECTED = 0
    GONE = 1  # not yet, or no more: what is posted fails, until a submit connects anew
    RENEWING = 2  # this end broke it, and connects it anew by itself: nothing is taken meanwhile


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
    EXPIRED = 10  # a batch's deadline passed while frames of it were in flight


(
    L_STATE, L_FD, L_QUEUE, L_PORT, L_LISTED, L_READABLE, L_WRITABLE, L_REASON, L_ERRNO, L_MOVING, L_PROGRESS, L_SEQ,
    L_IN_STAGE, L_IN_GOT, L_IN_HEAD, L_IN_NEXT, L_IN_NEXT_GOT, L_IN_IOV, L_IN_AT, L_IN_END, L_IN_STATUS, L_IN_NOTE,
    L_OUT_HEAD, L_OUT_IOV, L_OUT_AT, L_OUT_END, L_OUT_KIND, L_FLIGHTS, L_FLIGHT_HEAD, L_FLIGHT_TAIL, L_TRAILER,
    L_OUT_TRAILER, L_CUT, L_SENDER, L_IN_SINGLE, L_OUT_SINGLE, LANE_WORDS,
) = (*range(36), 40)  # fmt: skip
FLIGHTS = 16  # frames sent and not answered, on one lane
F_FIRST, F_COUNT, F_OPCODE, FLIGHT_WORDS = 0, 1, 2, 3
HEADER, TABLE, BODY = 0, 1, 2  # what an incoming frame waits for
LOST = 0  # E_LOCAL of a write whose source could not be read
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
        for i in range(word_at(port, P_LANE_COUNT)):
            other = word_at(port, P_LANES) + i * LANE_WORDS * WORD
            if load(other + L_STATE * WORD) == LaneState.LIVE and word_at(other, L_QUEUE) == queue:
                close_lane(other, Reason.SIBLING, 0)
        break_queue(queue, reason == Reason.EXPIRED)
    report_trouble(port)


@kernel
def report_trouble(port):
    """Let Python look at the lanes that have broken: until it has told why, nobody else gets them."""
    poke(word_at(port, P_TIMESPEC), 1)
    call_write(word_at(port, P_WRITE), word_at(port, P_TROUBLE_FD), word_at(port, P_TIMESPEC), WORD)


@kernel
def break_queue(queue, expired):
    """Answer what was to go by lane, and say so to submitters.

    As gone; but if this end broke the connection because a batch has `expired`, as flushed, so that the others' slices
    are posted again once it is renewed. Not a notification that was sent: it must not come twice. What was sent is in
    doubt until the peer confirms, or is connected to anew: it may still lie in the peer's socket.
    """
    store(queue + Q_BROKEN * WORD, Broken.RENEWING if expired else Broken.GONE)
    sent, doubtful = word_at(queue, Q_SENT), np.int64(0)
    for at in range(word_at(queue, Q_TAIL), sent):
        if waits_for_lane(entry_of(queue, at)):
            doubtful += word_at(entry_of(queue, at), E_OPCODE) != Opcode.READ
    if doubtful > 0:
        add(queue + Q_DOUBT * WORD, doubtful)
        fetch_add(table_at(word_at(queue, Q_TABLE)), "breaks", 1)
    poke(queue + Q_SENT * WORD, word_at(queue, Q_HEAD))
    for at in range(word_at(queue, Q_TAIL), word_at(queue, Q_HEAD)):
        entry = entry_of(queue, at)
        if waits_for_lane(entry):
            again = expired and (at >= sent or word_at(entry, E_OPCODE) != Opcode.SEND)
            store(entry + E_STATUS * WORD, WcStatus.WR_FLUSH_ERR if again else WcStatus.REM_ABORT_ERR)
    if not expired:
        end_epoch(queue)  # last: whoever believes to be connected then looks at Q_BROKEN next


@kernel
def waits_for_lane(entry):
    """Whether an entry that goes by lane is not answered."""
    return word_at(entry, E_STATUS) == PENDING and word_at(entry, E_ROUTE) == Route.LANE


@kernel
def end_epoch(queue):
    """What was submitted to this queue pair's peer so far is posted no more, and submitters connect anew."""
    table = table_at(word_at(queue, Q_TABLE))
    fetch_add(table, "epoch", 1)
    release(table, "gone", 1)


@kernel
def fault(lane, readiness):
    """A system call on the lane failed: wait for the next edge of `readiness`, or break the lane."""
    error = errno(word_at(word_at(lane, L_PORT), P_ERRNO))
    if error == EAGAIN:
        poke(lane + readiness * WORD, 0)
    elif error != EINTR:
        break_lane(lane, Reason.ERROR, error)


@kernel
def is_unreachable(lane):
    """Whether a system call on the lane failed because memory that it was given is gone, or may not be touched."""
    return errno(word_at(word_at(lane, L_PORT), P_ERRNO)) == EFAULT


@kernel
def is_open_for(lane, events):
    """Whether more can be read or written at once: what was short then was so because of memory."""
    port = word_at(lane, L_PORT)
    return is_ready(word_at(port, P_SYSCALL), word_at(lane, L_FD), events, word_at(port, P_POLL))


@kernel
def slice_of(lane, nth):
    """Which slice of a READ the `nth` range of its answer is: those that the answer's table calls failed have none."""
    status, i = word_at(lane, L_IN_STATUS), np.int64(0)
    while True:
        why = peek(status + i * WORD)
        if why == WcStatus.SUCCESS or why == WcStatus.LOC_PROT_ERR:  # the latter: lost here, while it came in
            if nth == 0:
                return i
            nth -= 1
        i += 1


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
def guard(lane):
    """Say that pages of ours are about to be touched for a peer, or no longer are; odd in between."""
    store(lane + L_MOVING * WORD, word_at(lane, L_MOVING) + 1)
    fence()


@kernel
def may_land(lane):
    """Whether bytes of an incoming lane may still be put into our pages; called between `guard` and `guard`.

    Not if this engine has cut it, nor if its peer has reset or closed it: whoever did that took them for lost. The
    kernel is asked for the latter unless epoll has been asked just before.
    """
    port = word_at(lane, L_PORT)
    fresh = word_at(port, P_FRESH) != 0
    poke(port + P_FRESH * WORD, 0)
    return load(lane + L_CUT * WORD) == 0 and (fresh or not is_open_for(lane, POLLRDHUP))


@kernel
def drop_incoming(port):
    """End every incoming lane: this process was suspended for so long that peers took it for gone."""
    for i in range(word_at(port, P_LANE_COUNT)):
        lane = word_at(port, P_LANES) + i * LANE_WORDS * WORD
        if load(lane + L_STATE * WORD) == LaneState.LIVE and word_at(lane, L_QUEUE) == 0:
            break_lane(lane, Reason.STALLED, 0)


@kernel
def end_overdue(port, queue):
    """Break a queue pair's connections, if frames are in flight on them, so that a batch past its deadline ends."""
    store(queue + Q_CUT * WORD, 0)
    if word_at(queue, Q_BROKEN) != 0:
        return
    for i in range(word_at(port, P_LANE_COUNT)):
        lane = word_at(port, P_LANES) + i * LANE_WORDS * WORD
        if load(lane + L_STATE * WORD) == LaneState.LIVE and word_at(lane, L_QUEUE) == queue and flights(lane) > 0:
            break_lane(lane, Reason.EXPIRED, 0)
            return


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
