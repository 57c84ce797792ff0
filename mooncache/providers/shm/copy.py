"""Copying straight from pages to pages: what the queue pairs of `shm` do when they are posted to and polled.

Entries that are not for the lanes are claimed in lots: by the worker that owns the queue pair, and by others of its
engine that have nothing to do. Between two writes to its guard a worker looks at the key of each slice and copies it.
"""

import numpy as np

from mooncache.kernels import regions
from mooncache.kernels.arrays import LINE, WORD
from mooncache.kernels.atomics import add, cas, exchange, fence, i64, load, peek, poke, store, stream_copy, u32
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.records.base import missing
from mooncache.kernels.records.table import table_at
from mooncache.kernels.restart import CHANGED, copy_while
from mooncache.kernels.verbs import (
    CQ_CQ_CONTEXT,
    POLL_AGAIN,
    SGE_LENGTH,
    SGE_LKEY,
    WR_NEXT,
    WR_OPCODE,
    WR_REMOTE_ADDR,
    WR_SG_LIST,
    WcStatus,
)
from mooncache.limits import WORKERS
from mooncache.providers.careful import C_RESTART, C_SELF, FIRST, move, move_one, set_pair, write_while
from mooncache.providers.device import CQ_COUNT, CQ_QUEUES, Q_HEAD, Q_KEYS, Q_TAIL, key_status, queue_of
from mooncache.providers.stream import lane as lanes
from mooncache.providers.stream.connections import nudge
from mooncache.providers.stream.lane import PENDING, Route, entry_of, word_at
from mooncache.providers.stream.poll import push_lanes, turn_lanes
from mooncache.providers.stream.provider import answer_poll, answer_push, list_lanes, post_entry, refusal, report_all

LOT = 32
"""Slices copied between two looks at anything else: 2 MiB of the largest, some hundred microseconds."""

GUARD_EPOCH = WORKERS * LINE
"""Where, behind the guards of all workers, the word lies at which the peer says that it has withdrawn something since:
by another number, or by 0 when it has fenced this engine. A copy goes on only while it is the same."""

SHARE_BYTES = 1 << 20
"""A chain this long is worth waking another worker for: it takes 200 us to copy, waking 30."""

LANES_EVERY = 16
"""While there is something to copy, connections are looked at every so many lots."""


@kernel
def route_of(queue, opcode, remote, length, held):
    """How a work request's bytes travel: a Route, or the address at which the range is mapped here.

    Negated, that is, where the engine does not hold what keeps its own range mapped.
    """
    if opcode == Opcode.SEND:
        return np.int64(Route.LANE)
    maps = table_at(load(queue + lanes.Q_MAPS * WORD))
    if not missing(maps):
        at = regions.find(maps, remote, word_at(queue, lanes.Q_MAP_HINT))
        if at >= 0:
            poke(queue + lanes.Q_MAP_HINT * WORD, at)
            base, end = i64(maps.bases)[at], i64(maps.ends)[at]
            slot = i64(maps.slots)[at]
            if length <= end - remote:
                mapped = i64(maps.keys)[slot] + (remote - base)
                if held:
                    return mapped
                permitted = word_at(word_at(word_at(queue, lanes.Q_PORT), lanes.P_COPIER), C_SELF) != 0
                return -mapped if permitted else np.int64(Route.LANE)
    return np.int64(Route.LANE if word_at(queue, lanes.Q_PID) == 0 else Route.PROCESS)


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Queue each work request, to be copied or for the lanes; ENOMEM when there is no room, EAGAIN while renewed.

    Q_POSTING is odd meanwhile, for `lead`.
    """
    queue, error, size = queue_of(qp), np.int32(0), np.int64(0)
    posting = word_at(queue, lanes.Q_POSTING)
    store(queue + lanes.Q_POSTING * WORD, posting + 1)
    fence()
    step_over(queue)
    direct, by_lane = np.int64(0), False
    while wr != 0 and error == 0:
        length = np.int64(u32(peek(wr + WR_SG_LIST) + SGE_LENGTH)[0])
        held = u32(peek(wr + WR_SG_LIST) + SGE_LKEY)[0] != 0
        route = route_of(queue, np.int64(u32(wr + WR_OPCODE)[0]), peek(wr + WR_REMOTE_ADDR), length, held)
        if post_entry(queue, wr, route):
            if route == Route.LANE:
                by_lane = True
            elif word_at(queue, lanes.Q_BROKEN) == 0:
                direct += 1
                size += length
            wr = peek(wr + WR_NEXT)
        else:
            poke(bad_wr, wr)
            error = refusal(queue)
    if direct > 0:
        poke(queue + lanes.Q_DIRECT * WORD, word_at(queue, lanes.Q_DIRECT) + direct)
    store(queue + lanes.Q_POSTING * WORD, posting + 2)
    if direct > 0:
        if size >= SHARE_BYTES:
            call_helpers(word_at(queue, lanes.Q_PORT))
    if by_lane:
        list_lanes(queue)
    return error


@kernel
def step_over(queue):
    """Before entries are posted: claims go on at the oldest that is left, lest helpers take new ones for older."""
    at, tail = load(queue + lanes.Q_CLAIMED * WORD), word_at(queue, Q_TAIL)
    if at < tail:
        cas(queue + lanes.Q_CLAIMED * WORD, at, tail)


@kernel
def call_helpers(port):
    """Wake the other workers of this engine that sleep: there is enough to copy for them, too."""
    fence()
    for i in range(word_at(port, lanes.P_PORT_COUNT)):
        other = peek(word_at(port, lanes.P_PORTS) + i * WORD)
        if other != port and load(other + lanes.P_ASLEEP * WORD) != 0:
            if exchange(other + lanes.P_ASLEEP * WORD, 0) != 0:
                nudge(other)


@kernel
def claim(queue, own):
    """Take the next lot of entries to copy: where it starts and how many; 0 when there is none.

    A lot is a run of entries of the direct routes: these stay where they are until they are copied. Entries for the
    lanes may be gone any moment, so only the queue's own worker steps over them.
    """
    at, head = load(queue + lanes.Q_CLAIMED * WORD), load(queue + Q_HEAD * WORD)
    if own:
        start = at
        while start < head and not is_direct(entry_of(queue, start)):
            start += 1
        if start != at:
            cas(queue + lanes.Q_CLAIMED * WORD, at, start)
            at = load(queue + lanes.Q_CLAIMED * WORD)
    n = np.int64(0)
    while n < LOT and at + n < head and is_direct(entry_of(queue, at + n)):
        n += 1
    if n == 0 or cas(queue + lanes.Q_CLAIMED * WORD, at, at + n) != at:
        return at, np.int64(0)
    return at, n


@kernel
def is_direct(entry):
    """Whether an entry waits to be copied."""
    return word_at(entry, lanes.E_ROUTE) != Route.LANE and word_at(entry, lanes.E_STATUS) == PENDING


@kernel
def copy_lot(port, queue, own):
    """Copy one lot of a queue; returns how many entries."""
    at, n = claim(queue, own)
    if n == 0:
        return n
    guard = word_at(queue, lanes.Q_GUARDS) + word_at(port, lanes.P_INDEX) * LINE
    store(guard, peek(guard) + 1)
    fence()
    while not copy_while_permitted(port, queue, at, n):
        pass  # the peer has withdrawn something meanwhile: look at each key again
    fence()
    store(guard, peek(guard) + 1)
    for i in range(at, at + n):
        entry = entry_of(queue, i)
        store(entry + lanes.E_STATUS * WORD, ~word_at(entry, lanes.E_KEY))
    add(queue + lanes.Q_COPIED * WORD, n)
    return n


@kernel
def copy_while_permitted(port, queue, at, n):
    """Copy what of a lot is undecided. False when the epoch changed, so that each key is to be looked at again.

    The outcome of an entry, complemented, takes the place of its key, which is above 0. It becomes the entry's status
    once all bytes are visible.
    """
    word, copier = word_at(queue, lanes.Q_GUARDS) + GUARD_EPOCH, word_at(port, lanes.P_COPIER)
    epoch, keys, others = load(word), word_at(queue, Q_KEYS), False
    if epoch == 0:
        lanes.end_epoch(queue)
    for i in range(at, at + n):
        entry = entry_of(queue, i)
        if word_at(entry, lanes.E_KEY) < 0:
            continue
        local, remote = word_at(entry, lanes.E_LOCAL), word_at(entry, lanes.E_REMOTE)
        length, opcode = word_at(entry, lanes.E_LENGTH), word_at(entry, lanes.E_OPCODE)
        route = word_at(entry, lanes.E_ROUTE)
        status = np.int64(WcStatus.REM_ABORT_ERR)
        if epoch != 0:
            status = key_status(keys, word_at(entry, lanes.E_KEY), remote, length, opcode)
        if status == WcStatus.SUCCESS:
            if route == Route.PROCESS or route < 0:
                others = True
                continue
            if opcode == Opcode.READ:
                stream_copy(local, route, length)
            elif not copy_while(route, local, length, word, epoch, copier + C_RESTART * WORD):
                return False
        poke(entry + lanes.E_KEY * WORD, ~status)
    if others:
        write_while(copier, word, epoch)
        for opcode in (np.int64(Opcode.WRITE), np.int64(Opcode.READ)):
            for mapped in (False, True):
                if not copy_by_kernel(port, queue, at, n, opcode, mapped):
                    return False
    return True


@kernel
def is_left(entry, opcode, mapped):
    """Whether an entry of a lot is left for the kernel to copy, to where it is `mapped` here, or to another process."""
    undecided = word_at(entry, lanes.E_KEY) >= 0 and word_at(entry, lanes.E_OPCODE) == opcode
    return undecided and (word_at(entry, lanes.E_ROUTE) < 0) == mapped


@kernel
def copy_by_kernel(port, queue, at, n, opcode, mapped):
    """Copy what is left of a lot, all at once, or one by one if that fails. False when the epoch changed meanwhile."""
    copier, count, total = word_at(port, lanes.P_COPIER), 0, 0
    pid = word_at(copier, C_SELF) if mapped else word_at(queue, lanes.Q_PID)
    for i in range(at, at + n):
        entry = entry_of(queue, i)
        if is_left(entry, opcode, mapped):
            remote = -word_at(entry, lanes.E_ROUTE) if mapped else word_at(entry, lanes.E_REMOTE)
            set_pair(copier, FIRST + count, word_at(entry, lanes.E_LOCAL), remote, word_at(entry, lanes.E_LENGTH))
            total += word_at(entry, lanes.E_LENGTH)
            count += 1
    if count == 0:
        return True
    moved, k, status = move(copier, pid, opcode, FIRST, count), FIRST, np.int64(WcStatus.SUCCESS)
    if moved == CHANGED:
        return False
    for i in range(at, at + n):
        entry = entry_of(queue, i)
        if is_left(entry, opcode, mapped):
            if moved != total:
                status = move_one(copier, pid, opcode, k)
                if status == CHANGED:
                    return False
            poke(entry + lanes.E_KEY * WORD, ~status)
            k += 1
    return True


@kernel
def copy_own(port):
    """Copy one lot of each queue of this worker; returns whether there is or was something to copy."""
    busy = False
    for i in range(word_at(port, CQ_COUNT)):
        queue = word_at(port, CQ_QUEUES + i)
        if word_at(queue, lanes.Q_DIRECT) != load(queue + lanes.Q_COPIED * WORD):
            copy_lot(port, queue, True)
            busy = True
    return busy


@kernel
def help_others(port):
    """Copy one lot for another worker of this engine; returns whether there was one."""
    for i in range(word_at(port, lanes.P_PORT_COUNT)):
        other = peek(word_at(port, lanes.P_PORTS) + i * WORD)
        if other != port:
            for k in range(word_at(other, CQ_COUNT)):
                queue = word_at(other, CQ_QUEUES + k)
                if queue != 0 and copy_lot(port, queue, False) > 0:
                    return True
    return False


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Copy a lot, look at the lanes now and then, report what is answered."""
    port = peek(cq + CQ_CQ_CONTEXT)
    store(port + lanes.P_ASLEEP * WORD, 0)
    moved = copy_own(port)
    lots = word_at(port, lanes.P_LOTS)
    poke(port + lanes.P_LOTS * WORD, lots + 1)
    if not moved or lots % LANES_EVERY == 0:
        moved = turn_lanes(port) or moved
    if not moved and word_at(port, lanes.P_PORT_COUNT) > 1:
        moved = help_others(port)
        if not moved:
            store(port + lanes.P_ASLEEP * WORD, 1)
            fence()
            moved = help_others(port)
    return answer_poll(report_all(port, np.int64(entries), wc), moved)


@kernel("int64(int64, int64)")
def lead(queue, maps):
    """From now on entries go by these maps; 0: by none. Returns the former ones.

    A `post_send` under way may still go by them: wait until Q_POSTING, looked at after this, is even or changes.
    """
    former = exchange(queue + lanes.Q_MAPS * WORD, maps)
    fence()
    return former


@callback("int32(int64, int32, int64)")
def push(qp, posted, wc):
    """Copy what was posted last, and send what is for the lanes. See `verbs.push`."""
    queue = queue_of(qp)
    port = word_at(queue, lanes.Q_PORT)
    waiting = word_at(queue, lanes.Q_DIRECT) - load(queue + lanes.Q_COPIED * WORD)
    if waiting > posted:
        return np.int32(POLL_AGAIN)
    copied = np.int64(1)
    while copied > 0 and word_at(queue, lanes.Q_DIRECT) != load(queue + lanes.Q_COPIED * WORD):
        copied = copy_lot(port, queue, True)  # none: another worker of the engine is at it
    alone = word_at(queue, Q_HEAD) - word_at(queue, Q_TAIL) == posted
    told = copied > 0 and (alone or waiting == 0)  # no descriptor tells of what was copied
    return answer_push(queue, posted, wc, push_lanes(queue, posted) and told)
