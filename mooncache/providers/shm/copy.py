"""Copying straight from pages to pages: the queue pairs of `shm` do it when they are posted to and polled.

Entries that are not for the lanes are claimed in lots: by the worker that owns the queue pair, and by others of its
engine that have nothing to do. Between two writes to its guard a worker looks at the key of each slice and copies it.
"""

import numpy as np

from mooncache.kernels import regions
from mooncache.kernels.arrays import LINE
from mooncache.kernels.atomics import fence, i64, load, poke
from mooncache.kernels.copying import fetch_ahead, stream_copy
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.records.base import (
    acquire,
    address,
    behind,
    cell_at,
    compare_swap,
    fetch_add,
    missing,
    release,
    swap,
    where,
)
from mooncache.kernels.records.table import table_at
from mooncache.kernels.records.verbs import send_wr_at, sge_at
from mooncache.kernels.restartable import CHANGED, R_BANKS_BELOW, R_BANKS_FROM, copy_while
from mooncache.kernels.verbs import POLL_AGAIN, WcStatus
from mooncache.limits import WORKERS
from mooncache.providers.careful import FIRST, copier_at, move, move_one, set_pair, write_while
from mooncache.providers.device import port_of, queue_of
from mooncache.providers.keys import key_status
from mooncache.providers.stream import lane as lanes
from mooncache.providers.stream.connections import nudge
from mooncache.providers.stream.lane import PENDING, Route, entry_of
from mooncache.providers.stream.poll import push_lanes, turn_lanes
from mooncache.providers.stream.queue import answer_poll, answer_push, list_lanes, post_entry, refusal, report_all
from mooncache.providers.stream.records import port_at, queue_at

LOT, LOT_BYTES = 128, 128 << 10
"""Slices copied between two looks at anything else, and their bytes: some ten microseconds."""

GUARD_EPOCH = WORKERS * LINE
"""The place, behind the guards of all workers, of the word by which the peer says that it has withdrawn something:
by another number, or by 0 when it has fenced this engine. A copy goes on only while it is the same."""

AHEAD = 2
"""Slices whose beginnings are on their way into the caches while one is copied."""

SHARE_BYTES = 1 << 20
"""Bytes waiting to be copied that are worth waking another worker for: 100 us of copying, where waking takes 30."""

LANES_EVERY = 16
"""While there is something to copy, connections are looked at every so many lots."""


@kernel
def route_of(queue, opcode, remote, length, held):
    """Return how a work request's bytes travel: a Route, or the address at which the range is mapped here.

    Negated, that is, where the engine does not hold what keeps its own range mapped.
    """
    if opcode == Opcode.SEND:
        return np.int64(Route.LANE)
    maps = table_at(acquire(queue, "maps"))
    if not missing(maps):
        at = regions.find(maps, remote, queue.map_hint)
        if at >= 0:
            queue.map_hint = at
            base, end = i64(maps.bases)[at], i64(maps.ends)[at]
            slot = i64(maps.slots)[at]
            if length <= end - remote:
                mapped = i64(maps.keys)[slot] + (remote - base)
                if held:
                    return mapped
                permitted = copier_at(port_at(queue.port).copier).own_pid != 0
                return -mapped if permitted else np.int64(Route.LANE)
    return np.int64(Route.LANE if queue.pid == 0 else Route.PROCESS)


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Queue each work request, to be copied or for the lanes; ENOMEM when there is no room, EAGAIN while renewed.

    `posting` is odd meanwhile, for `lead`.
    """
    queue, error, size = queue_at(queue_of(qp)), np.int32(0), np.int64(0)
    posting = queue.posting
    release(queue, "posting", posting + 1)
    fence()
    step_over(queue)
    direct, by_lane, wr = np.int64(0), False, send_wr_at(wr)
    while not missing(wr) and error == 0:
        length = np.int64(sge_at(wr.sg_list).length)
        held = sge_at(wr.sg_list).lkey != 0
        route = route_of(queue, np.int64(wr.opcode), wr.remote_addr, length, held)
        if post_entry(queue, wr, route):
            if route == Route.LANE:
                by_lane = True
            elif queue.broken == 0:
                direct += 1
                size += length
            wr = send_wr_at(wr.next)
        else:
            poke(bad_wr, address(wr))
            error = refusal(queue)
    queue.direct += direct
    release(queue, "posting", posting + 2)
    if direct > 0:
        waiting = queue.direct - acquire(queue, "copied")  # of as many bytes as these, for all that is known
        if size * waiting >= SHARE_BYTES * direct:
            call_helpers(port_at(queue.port))
    if by_lane:
        list_lanes(queue)
    return error


@kernel
def step_over(queue):
    """Before entries are posted: claims go on at the oldest that is left, lest helpers take new ones for older."""
    at, tail = acquire(queue, "claimed"), queue.tail
    if at < tail:
        compare_swap(queue, "claimed", at, tail)


@kernel
def call_helpers(port):
    """Wake the other workers of this engine that sleep: there is enough to copy for them, too."""
    fence()
    for i in range(port.port_count):
        other = port_at(i64(port.ports)[i])
        if other.index != port.index and acquire(other, "asleep") != 0:
            if swap(other, "asleep", 0) != 0:
                nudge(other)


@kernel
def claim(queue, own):
    """Take the next lot of entries to copy: where it starts and how many; 0 when there is none.

    A lot is a run of entries of the direct routes: these stay where they are until they are copied. Entries for the
    lanes may be gone any moment, so only the queue's own worker steps over them.
    """
    at, head = acquire(queue, "claimed"), acquire(queue, "head")
    if own:
        start = at
        while start < head and not is_direct(entry_of(queue, start)):
            start += 1
        if start != at:
            compare_swap(queue, "claimed", at, start)
            at = acquire(queue, "claimed")
    n, size = np.int64(0), np.int64(0)
    while n < LOT and size < LOT_BYTES and at + n < head and is_direct(entry_of(queue, at + n)):
        size += entry_of(queue, at + n).length
        n += 1
    if n == 0 or compare_swap(queue, "claimed", at, at + n) != at:
        return at, np.int64(0)
    return at, n


@kernel
def is_direct(entry):
    """Return whether an entry waits to be copied."""
    return entry.route != Route.LANE and entry.status == PENDING


@kernel
def copy_lot(port, queue, own):
    """Copy one lot of a queue; returns how many entries."""
    at, n = claim(queue, own)
    if n == 0:
        return n
    guard = cell_at(queue.guards + port.index * LINE)
    release(guard, "value", guard.value + 1)
    fence()
    while not copy_while_permitted(port, queue, at, n):
        pass  # the peer has withdrawn something meanwhile: look at each key again
    fence()
    release(guard, "value", guard.value + 1)
    for i in range(at, at + n):
        entry = entry_of(queue, i)
        release(entry, "status", ~entry.key)
    fetch_add(queue, "copied", n)
    return n


@kernel
def copy_while_permitted(port, queue, at, n):
    """Copy what of a lot is undecided. False when the epoch changed, so that each key is to be looked at again.

    The outcome of an entry, complemented, takes the place of its key, which is above 0. It becomes the entry's status
    once all bytes are visible.
    """
    word, copier = queue.guards + GUARD_EPOCH, copier_at(port.copier)
    epoch, keys, others = load(word), queue.keys, False
    if epoch == 0:
        lanes.end_epoch(queue)
    restart = where(copier, "restart")
    banks_from, banks_below = i64(restart)[R_BANKS_FROM], i64(restart)[R_BANKS_BELOW]
    for i in range(at, at + n):
        entry = entry_of(queue, i)
        if i + AHEAD < at + n:
            fetch_source(entry_of(queue, i + AHEAD))
        if entry.key < 0:
            continue
        local, remote = entry.local, entry.remote
        length, opcode = entry.length, entry.opcode
        route = entry.route
        status = np.int64(WcStatus.REM_ABORT_ERR)
        if epoch != 0:
            status = key_status(keys, entry.key, remote, length, opcode)
        if status == WcStatus.SUCCESS:
            if route == Route.PROCESS or route < 0:
                others = True
                continue
            if opcode == Opcode.READ:
                stream_copy(local, route, length, banks_from, banks_below)
            elif not copy_while(route, local, length, word, epoch, restart):
                return False
        entry.key = ~status
    if others:
        write_while(copier, word, epoch)
        for opcode in (np.int64(Opcode.WRITE), np.int64(Opcode.READ)):
            for mapped in (False, True):
                if not copy_by_kernel(port, queue, at, n, opcode, mapped):
                    return False
    return True


@kernel
def fetch_source(entry):
    """Let the caches fetch the beginning of an entry's bytes where they come from."""
    if entry.route > Route.PROCESS:
        fetch_ahead(entry.route if entry.opcode == Opcode.READ else entry.local, entry.length)


@kernel
def is_left(entry, opcode, mapped):
    """Return whether the kernel is left to copy an entry of a lot: to where it is `mapped`, or another process."""
    undecided = entry.key >= 0 and entry.opcode == opcode
    return undecided and (entry.route < 0) == mapped


@kernel
def copy_by_kernel(port, queue, at, n, opcode, mapped):
    """Copy what is left of a lot, all at once, or one by one if that fails. False when the epoch changed meanwhile."""
    copier, count, total = copier_at(port.copier), 0, 0
    pid = copier.own_pid if mapped else queue.pid
    for i in range(at, at + n):
        entry = entry_of(queue, i)
        if is_left(entry, opcode, mapped):
            remote = -entry.route if mapped else entry.remote
            set_pair(copier, FIRST + count, entry.local, remote, entry.length)
            total += entry.length
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
            entry.key = ~status
            k += 1
    return True


@kernel
def copy_own(port):
    """Copy one lot of each queue of this worker; returns whether there is or was something to copy."""
    busy = False
    for i in range(port.count):
        queue = queue_at(i64(behind(port))[i])
        if queue.direct != acquire(queue, "copied"):
            copy_lot(port, queue, True)
            busy = True
    return busy


@kernel
def help_others(port):
    """Copy one lot for another worker of this engine; returns whether there was one."""
    for i in range(port.port_count):
        other = port_at(i64(port.ports)[i])
        if other.index != port.index:
            for k in range(other.count):
                queue = queue_at(i64(behind(other))[k])
                if not missing(queue) and copy_lot(port, queue, False) > 0:
                    return True
    return False


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Copy a lot, look at the lanes now and then, report what is answered."""
    port = port_at(port_of(cq))
    release(port, "asleep", 0)
    moved = copy_own(port)
    lots = port.lots
    port.lots += 1
    if not moved or lots % LANES_EVERY == 0:
        moved = turn_lanes(port) or moved
    if not moved and port.port_count > 1:
        moved = help_others(port)
        if not moved:
            release(port, "asleep", 1)
            fence()
            moved = help_others(port)
    return answer_poll(report_all(port, np.int64(entries), wc), moved)


@kernel("int64(int64, int64)")
def lead(queue, maps):
    """Let entries go by these maps from now on; 0: by none. Return the former ones.

    A `post_send` under way may still go by them: wait until `posting`, looked at after this, is even or changes.
    """
    former = swap(queue_at(queue), "maps", maps)
    fence()
    return former


@callback("int32(int64, int32, int64)")
def push(qp, posted, wc):
    """Copy what was posted last, and send what is for the lanes. See `verbs.push`."""
    queue = queue_at(queue_of(qp))
    port = port_at(queue.port)
    waiting = queue.direct - acquire(queue, "copied")
    if waiting > posted:
        return np.int32(POLL_AGAIN)
    copied = np.int64(1)
    while copied > 0 and queue.direct != acquire(queue, "copied"):
        copied = copy_lot(port, queue, True)  # none: another worker of the engine is at it
    alone = queue.head - queue.tail == posted
    told = copied > 0 and (alone or waiting == 0)  # no descriptor tells of what was copied
    return answer_push(queue, posted, wc, push_lanes(queue, posted) and told)
