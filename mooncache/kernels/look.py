"""Slices that a peer refused, until somebody has asked it what it has registered by now.

    refused --> kept --the peer was asked--> posted again, under the key that its region has now --refused--> fails
                      \\--nothing is new--> fails

Memory that is registered anew, at the same address, has another key than its peers know. A worker cannot ask: it keeps
the slice, once each, and writes to the eventfd that the engine's looker sleeps on. Looks at a peer are numbered; a
batch waits for one that began after its refusal.
"""

import numpy as np

from mooncache.kernels.account import word
from mooncache.kernels.atomics import add, call_write, exchange, i8, i16, i32, i64, load, peek, poke, store
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_LOOK,
    BATCH_PEER,
    BATCH_RENEWALS,
    LOOK_FD,
    PEER_TABLES,
    SCRATCH,
    SLICE_ATTEMPTS,
    SLICE_NEXT,
    SLICE_REMOTE,
    SLICE_STATE,
    TABLE_ASKED,
    TABLE_BEGUN,
    TABLE_LOOKED,
    TABLE_RENEWALS,
    WORD,
    WORKER_KEPT_FIRST,
    WORKER_LOOKED,
    WORKER_RETRY_FIRST,
    WORKERS,
    WRITE,
    Slice,
)
from mooncache.kernels.worker import ring_bell, worker_row

NOWHERE = -1  # region of what goes to none, a notification
WAITING = int(Slice.WAITING)


# ------------------------------------------------------------------------------ attempts: n, or ~n once it was kept
@kernel
def was_kept(ctl, slot):
    """Whether the peer has been asked for this slice's sake."""
    return i8(word(ctl, SLICE_ATTEMPTS))[slot] < 0


@kernel
def attempts_of(ctl, slot):
    """How often a slice was posted again because of an error that it may have caused."""
    attempts = np.int64(i8(word(ctl, SLICE_ATTEMPTS))[slot])
    return attempts if attempts >= 0 else ~attempts


@kernel
def count_attempt(ctl, slot):
    """One more."""
    i8(word(ctl, SLICE_ATTEMPTS))[slot] += -1 if was_kept(ctl, slot) else 1


# ------------------------------------------------------------------------------ in the worker
@kernel
def may_keep(ctl, slot):
    """Whether asking the peer may help a refused slice: there is a looker, and it was not asked for this one yet."""
    return word(ctl, LOOK_FD) >= 0 and i16(word(ctl, SLICE_REMOTE))[slot] != NOWHERE and not was_kept(ctl, slot)


@kernel
def append_slice(ctl, ends, slot):
    """Append a slice to a list; `ends`: the address of the words first, -1 when the list is empty, and last."""
    next_ = i32(word(ctl, SLICE_NEXT))
    next_[slot] = -1
    if peek(ends) < 0:
        poke(ends, slot)
    else:
        next_[peek(ends + WORD)] = slot
    poke(ends + WORD, slot)


@kernel
def keep(ctl, worker, slot):
    """Put a slice with those that wait for a look."""
    append_slice(ctl, worker + WORKER_KEPT_FIRST * WORD, slot)


@kernel
def keep_refused(ctl, worker, row, slot):
    """Keep a slice that its peer has refused, and have the peer asked."""
    attempts, table = i8(word(ctl, SLICE_ATTEMPTS)), i64(word(ctl, PEER_TABLES))[peek(row + BATCH_PEER * WORD)]
    attempts[slot] = ~attempts[slot]
    i16(word(ctl, SLICE_STATE))[slot] = WAITING
    poke(row + BATCH_LOOK * WORD, load(table + TABLE_BEGUN * WORD) + 1)  # before it is asked for: one that begins later
    keep(ctl, worker, slot)
    if exchange(table + TABLE_ASKED * WORD, 1) == 0:
        poke(ctl + SCRATCH * WORD, 1)
        call_write(word(ctl, WRITE), word(ctl, LOOK_FD), ctl + SCRATCH * WORD, WORD)


@kernel
def look_is_due(ctl, row, slot):
    """Whether a slice was kept, and the look that its batch waits for has not ended."""
    table = i64(word(ctl, PEER_TABLES))[peek(row + BATCH_PEER * WORD)]
    return was_kept(ctl, slot) and load(table + TABLE_LOOKED * WORD) < peek(row + BATCH_LOOK * WORD)


@kernel
def in_vain(ctl, row, slot):
    """Whether the peer was asked for a slice's sake and nothing has taken the place of any region since."""
    table = i64(word(ctl, PEER_TABLES))[peek(row + BATCH_PEER * WORD)]
    return was_kept(ctl, slot) and peek(table + TABLE_RENEWALS * WORD) == peek(row + BATCH_RENEWALS * WORD)


@kernel
def resume(ctl, worker):
    """Let all that is kept be looked at like slices to post again. O(1)."""
    kept, retried = worker + WORKER_KEPT_FIRST * WORD, worker + WORKER_RETRY_FIRST * WORD
    if peek(kept) < 0:
        return
    if peek(retried) < 0:
        poke(retried, peek(kept))
    else:
        i32(word(ctl, SLICE_NEXT))[peek(retried + WORD)] = peek(kept)
    poke(retried + WORD, peek(kept + WORD))
    poke(kept, -1)


# ------------------------------------------------------------------------------ in the looker
@kernel("int64(int64)")
def begin(table):
    """Begin a look at the peer with this region table, if one was asked for; its number, or 0."""
    if exchange(table + TABLE_ASKED * WORD, 0) == 0:
        return np.int64(0)
    return add(table + TABLE_BEGUN * WORD, 1) + 1


@kernel("int64(int64, int64, int64)")
def end(ctl, table, number):
    """Look number `number` has ended, well or not: let the workers post again what waits for it."""
    store(table + TABLE_LOOKED * WORD, max(number, load(table + TABLE_LOOKED * WORD)))
    for i in range(word(ctl, WORKERS)):
        worker = worker_row(ctl, i)
        store(worker + WORKER_LOOKED * WORD, 1)
        ring_bell(ctl, worker)
    return np.int64(0)
