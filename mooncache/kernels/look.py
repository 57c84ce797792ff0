"""Slices that a peer refused wait here until it was asked what it has registered by now.

    refused --> kept --the peer was asked--> posted again, under the key that its region has now --refused--> fails
                      \\--nothing is new--> fails

Memory that is registered anew, at the same address, has another key than its peers know. A worker cannot ask: it keeps
the slice, once each, and writes to the eventfd that the engine's looker sleeps on. Looks at a peer are numbered; a
batch waits for one that began after its refusal.
"""

import numpy as np

from mooncache.kernels.atomics import i8, i16, i32
from mooncache.kernels.enums import Slice
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import acquire, fetch_add, release, swap
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.table import table_at
from mooncache.kernels.worker import peer_table, ring_bell, worker_row, write_one

NOWHERE = -1  # region of what goes to none, a notification
WAITING = int(Slice.WAITING)


# ------------------------------------------------------------------------------ attempts: n, or ~n once it was kept
@kernel
def was_kept(ctl, slot):
    """Return whether the peer has been asked for this slice's sake."""
    return i8(ctl.slice_attempts)[slot] < 0


@kernel
def attempts_of(ctl, slot):
    """Return how often a slice was posted again because of an error that it may have caused."""
    attempts = np.int64(i8(ctl.slice_attempts)[slot])
    return attempts if attempts >= 0 else ~attempts


@kernel
def count_attempt(ctl, slot):
    """Count one more attempt of a slice."""
    i8(ctl.slice_attempts)[slot] += -1 if was_kept(ctl, slot) else 1


# ------------------------------------------------------------------------------ in the worker
@kernel
def may_keep(ctl, slot):
    """Return whether a refused slice may wait for a look: there is a looker, and none was made for it yet."""
    return ctl.look_fd >= 0 and i16(ctl.slice_remote)[slot] != NOWHERE and not was_kept(ctl, slot)


@kernel
def append_slice(ctl, ends, slot):
    """Append a slice to the list with these ENDS."""
    next_ = i32(ctl.slice_next)
    next_[slot] = -1
    if ends.first < 0:
        ends.first = slot
    else:
        next_[ends.last] = slot
    ends.last = slot


@kernel
def keep(ctl, worker, slot):
    """Append a slice to those that wait for a look."""
    append_slice(ctl, worker.kept, slot)


@kernel
def keep_refused(ctl, worker, batch, slot):
    """Keep a slice that its peer has refused, and have the peer asked."""
    attempts, table = i8(ctl.slice_attempts), peer_table(ctl, batch.peer)
    attempts[slot] = ~attempts[slot]
    i16(ctl.slice_state)[slot] = WAITING
    batch.look = acquire(table, "begun") + 1  # before it is asked for: one that begins later
    keep(ctl, worker, slot)
    if swap(table, "asked", 1) == 0:
        write_one(ctl, ctl.look_fd)


@kernel
def look_is_due(ctl, batch, slot):
    """Return whether a slice was kept, and the look that its batch waits for has not ended."""
    table = peer_table(ctl, batch.peer)
    return was_kept(ctl, slot) and acquire(table, "looked") < batch.look


@kernel
def in_vain(ctl, batch, slot):
    """Return whether the peer was asked for a slice's sake and nothing has replaced any region since."""
    table = peer_table(ctl, batch.peer)
    return was_kept(ctl, slot) and table.renewals == batch.renewals


@kernel
def resume(ctl, worker):
    """Move all that is kept to the slices to post again. O(1)."""
    kept, retried = worker.kept, worker.retry
    if kept.first < 0:
        return
    if retried.first < 0:
        retried.first = kept.first
    else:
        i32(ctl.slice_next)[retried.last] = kept.first
    retried.last = kept.last
    kept.first = -1


# ------------------------------------------------------------------------------ in the looker
@kernel("int64(int64)")
def begin(table):
    """Begin a look at the peer with this region table, if one was asked for; return its number, or 0."""
    table = table_at(table)
    if swap(table, "asked", 0) == 0:
        return np.int64(0)
    return fetch_add(table, "begun", 1) + 1


@kernel("int64(int64, int64, int64)")
def end(ctl, table, number):
    """End look number `number`, well or not: workers post again what waits for it."""
    ctl = control_at(ctl)
    table = table_at(table)
    release(table, "looked", max(number, acquire(table, "looked")))
    for i in range(ctl.workers):
        worker = worker_row(ctl, i)
        release(worker, "looked", 1)
        ring_bell(ctl, worker)
    return np.int64(0)
