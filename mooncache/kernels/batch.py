"""Batches: rows of words, moved through their life by one transition table.

                 SEAL            FINISH                CLOSE             RECLAIM
    FREE -> OPEN ----> SEALED ----------> RECLAIMABLE -------> DRAINING ---------> FREE
              |           |     all slices answered               ^  |
              |           +-- CLOSE: detached, the worker --------+  +-- FINISH: the NIC has answered
              +-------------- CLOSE: nothing was posted ----------+      for the last slice

`close` is accepted wherever a caller can hold a handle, and always ends in FREE. Whoever finds, by its own move, that
it is the last to need the batch reclaims it: the caller that closes a finished batch, or the worker that finishes a
closed one. The row's state word is also the futex that waiting threads sleep on.
"""

from enum import IntEnum

import numpy as np

from mooncache.kernels.account import account, clock, word
from mooncache.kernels.atomics import add, call_write, cas, fence, futex_wake, load, peek, poke, store
from mooncache.kernels.handle import batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_AWAITED,
    BATCH_CANCEL_ASKED,
    BATCH_CANCELLED,
    BATCH_DEADLINE,
    BATCH_FAILED,
    BATCH_FINISHED_AT,
    BATCH_FIRST,
    BATCH_GENERATION,
    BATCH_LAST,
    BATCH_LINK,
    BATCH_NEXT,
    BATCH_NOTE,
    BATCH_POSTED,
    BATCH_ROWS,
    BATCH_STATE,
    BATCH_TAKEN,
    BATCH_WAITERS,
    BATCH_WORDS,
    EVENT_FD,
    SCRATCH,
    SHARED,
    SHARED_FREE_BATCHES,
    SYSCALL,
    WORD,
    WRITE,
    BatchState,
    Kind,
)
from mooncache.kernels.pool import EVERY_THREAD, pop_chain, push_chain, wake_waiters


class Event(IntEnum):
    """What moves it on."""

    ACQUIRE = 0
    SEAL = 1
    FINISH = 2
    CLOSE = 3
    RECLAIM = 4


REFUSED = -1
NEXT = np.full((len(BatchState), len(Event)), REFUSED, np.int64)
NEXT[BatchState.FREE, Event.ACQUIRE] = BatchState.OPEN
NEXT[BatchState.OPEN, Event.SEAL] = BatchState.SEALED
NEXT[BatchState.OPEN, Event.CLOSE] = BatchState.DRAINING
NEXT[BatchState.SEALED, Event.FINISH] = BatchState.RECLAIMABLE
NEXT[BatchState.SEALED, Event.CLOSE] = BatchState.DRAINING
NEXT[BatchState.RECLAIMABLE, Event.CLOSE] = BatchState.DRAINING
NEXT[BatchState.DRAINING, Event.FINISH] = BatchState.DRAINING
NEXT[BatchState.DRAINING, Event.RECLAIM] = BatchState.FREE

FREE, OPEN, SEALED, DRAINING, RECLAIMABLE = (int(state) for state in BatchState)
ACQUIRE, SEAL, FINISH, CLOSE, RECLAIM = (int(event) for event in Event)


@kernel
def move(row, event):
    """Apply one event to the batch; returns the state before it, or REFUSED with nothing changed."""
    address = row + BATCH_STATE * WORD
    state = load(address)
    while True:
        after = NEXT[state, event]
        if after == REFUSED:
            return np.int64(REFUSED)
        seen = cas(address, state, after)
        if seen == state:
            return state
        state = seen


@kernel
def slot_of(ctl, row):
    """The slot number of a batch row."""
    return (row - word(ctl, BATCH_ROWS)) // (BATCH_WORDS * WORD)


@kernel
def append(ctl, ends, link, row):
    """Append a batch to a queue: `ends` is the address of the words first and last, `link` the rows' word for next."""
    slot, last = slot_of(ctl, row), peek(ends + WORD)
    if last < 0:
        poke(ends, slot)
    else:
        poke(batch_row(ctl, last) + link * WORD, slot)
    poke(ends + WORD, slot)
    poke(row + link * WORD, -1)


@kernel
def remove(ctl, ends, link, row):
    """Take a batch out of such a queue, wherever in it."""
    slot, after = slot_of(ctl, row), peek(row + link * WORD)
    at, before = peek(ends), np.int64(-1)
    while at != slot:
        before = at
        at = peek(batch_row(ctl, at) + link * WORD)
    if before < 0:
        poke(ends, after)
    else:
        poke(batch_row(ctl, before) + link * WORD, after)
    if after < 0:
        poke(ends + WORD, before)


@kernel
def acquire_row(ctl):
    """A batch row in state OPEN under a new generation, or 0 when all are in use."""
    first, _ = pop_chain(word(ctl, SHARED) + SHARED_FREE_BATCHES * WORD, word(ctl, BATCH_LINK), 1)
    if first < 0:
        return np.int64(0)
    row = batch_row(ctl, first)
    poke(row + BATCH_FIRST * WORD, -1)
    poke(row + BATCH_LAST * WORD, -1)
    poke(row + BATCH_NEXT * WORD, -1)
    poke(row + BATCH_POSTED * WORD, 0)
    poke(row + BATCH_FAILED * WORD, 0)
    poke(row + BATCH_DEADLINE * WORD, 0)
    poke(row + BATCH_CANCELLED * WORD, 0)
    poke(row + BATCH_AWAITED * WORD, 0)
    poke(row + BATCH_CANCEL_ASKED * WORD, 0)
    poke(row + BATCH_FINISHED_AT * WORD, 0)
    poke(row + BATCH_NOTE * WORD, -1)
    poke(row + BATCH_TAKEN * WORD, 0)
    add(row + BATCH_GENERATION * WORD, 1)
    move(row, ACQUIRE)
    return row


@kernel
def return_row(ctl, row):
    """Give a draining batch's row back without a word; its slices must be gone from it."""
    move(row, RECLAIM)
    slot = slot_of(ctl, row)
    push_chain(word(ctl, SHARED) + SHARED_FREE_BATCHES * WORD, word(ctl, BATCH_LINK), slot, slot)


@kernel
def release_row(ctl, row):
    """Give a draining batch's row back, and tell those who wait for one."""
    return_row(ctl, row)
    wake_waiters(ctl)


@kernel
def announce(ctl, row):
    """Wake whoever waits for this batch: threads on its futex, event loops on the engine's eventfd."""
    fence()
    if load(row + BATCH_WAITERS * WORD) != 0:
        futex_wake(word(ctl, SYSCALL), row + BATCH_STATE * WORD, EVERY_THREAD)
        account(ctl, Kind.WAKES, 1)
    if load(row + BATCH_AWAITED * WORD) != 0:
        store(ctl + SCRATCH * WORD, 1)
        call_write(word(ctl, WRITE), word(ctl, EVENT_FD), ctl + SCRATCH * WORD, WORD)


@kernel
def finish(ctl, row):
    """All slices are answered. Returns True when the batch was closed before, so that the caller must reclaim it."""
    account(ctl, Kind.BATCHES_FINISHED, 1)
    poke(row + BATCH_FINISHED_AT * WORD, clock(ctl))
    if move(row, FINISH) == DRAINING:
        return True
    announce(ctl, row)
    return False


@kernel
def finished(row):
    """Whether all slices of a batch that is not closed are answered."""
    return load(row + BATCH_STATE * WORD) == RECLAIMABLE
