"""Serving lanes: what a worker's poll does with all connections of its port, each for a few system calls."""

from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import call_clock_gettime, load, peek, poke, u32
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import (
    EPOLL_EVENT_BYTES,
    EPOLL_EVENT_DATA,
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLRDHUP,
    epoll_wait,
)
from mooncache.providers.device import Q_HEAD, Q_TAIL
from mooncache.providers.stream.frames import H_COUNT, HEADER_BYTES, head_bytes
from mooncache.providers.stream.lane import (
    CALLS,
    E_ROUTE,
    ENDED,
    EVENTS,
    HEADER,
    L_IN_AT,
    L_IN_END,
    L_IN_GOT,
    L_IN_HEAD,
    L_IN_STAGE,
    L_LISTED,
    L_OUT_AT,
    L_OUT_END,
    L_QUEUE,
    L_READABLE,
    L_STATE,
    L_WRITABLE,
    P_ADOPT,
    P_ADOPTED,
    P_CLOCK,
    P_EPOLL,
    P_EVENTS,
    P_FRESH,
    P_LIST,
    P_LISTED,
    P_NEXT_CHECK,
    P_NOW,
    P_STALL,
    P_SYSCALL,
    P_TIMESPEC,
    P_TURNS,
    Q_LANE_COUNT,
    Q_LANES,
    Q_PORT,
    Q_SENT,
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
    word_at,
)
from mooncache.providers.stream.receive import next_frame, receive
from mooncache.providers.stream.send import send


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


# ------------------------------------------------------------------------------ what was posted just now
@kernel
def push_lanes(queue, posted):
    """Send what is for the lanes of the `posted` newest entries of a queue, on a lane that is free for it.

    Returns whether descriptors tell of the rest. False, with nothing sent, where others wait in front or no lane is.
    """
    port, head = word_at(queue, Q_PORT), word_at(queue, Q_HEAD)
    at = max(word_at(queue, Q_SENT), word_at(queue, Q_TAIL))
    if head - at > posted:
        return False
    while at < head and word_at(entry_of(queue, at), E_ROUTE) != Route.LANE:
        at += 1
    if at == head:
        return True
    for i in range(word_at(queue, Q_LANE_COUNT)):
        lane = peek(word_at(queue, Q_LANES) + i * WORD)
        free = word_at(lane, L_WRITABLE) != 0 and word_at(lane, L_OUT_AT) == word_at(lane, L_OUT_END)
        if word_at(lane, L_STATE) == LaneState.LIVE and free:
            tell_time(port)
            send(lane)
            strike_off(port, queue)
            return not wants_more(lane)
    return False


@kernel
def strike_off(port, queue):
    """Take a queue's lanes that need nothing more off the end of the port's list, where posting has put them."""
    while word_at(port, P_LISTED) > 0:
        lane = peek(word_at(port, P_LIST) + (word_at(port, P_LISTED) - 1) * WORD)
        if word_at(lane, L_QUEUE) != queue or wants_more(lane):
            return
        poke(lane + L_LISTED * WORD, 0)
        poke(port + P_LISTED * WORD, word_at(port, P_LISTED) - 1)


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
            if word_at(lane, L_QUEUE) == 0:  # what is left of a peer that is gone is not read
                if load(lane + L_STATE * WORD) == LaneState.LIVE:
                    break_lane(lane, Reason.CLOSED, 0)
                continue
            poke(lane + L_READABLE * WORD, ENDED)
        elif what & EPOLLIN:
            poke(lane + L_READABLE * WORD, 1)
        enlist(lane)
    poke(port + P_FRESH * WORD, n < EVENTS)


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
    before = word_at(port, P_NOW)
    tell_time(port)
    if before != 0 and word_at(port, P_NOW) - before > word_at(port, P_STALL):
        drop_incoming(port)
    if load(port + P_ADOPT * WORD) != word_at(port, P_ADOPTED):
        adopt(port)
    turns = word_at(port, P_TURNS)
    poke(port + P_TURNS * WORD, turns + 1)
    poke(port + P_FRESH * WORD, 0)
    if word_at(port, P_LISTED) == 0 or turns % 8 == 0:
        gather_events(port)
    moved = serve_listed(port)
    if word_at(port, P_NOW) > word_at(port, P_NEXT_CHECK):
        check_stalls(port)
    return moved or word_at(port, P_LISTED) > 0
