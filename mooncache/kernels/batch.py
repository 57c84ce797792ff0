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

from mooncache.errors import Status
from mooncache.kernels.account import account, clock
from mooncache.kernels.atomics import fence, futex_wake
from mooncache.kernels.enums import BatchState, Kind
from mooncache.kernels.handle import batch_row, resolve
from mooncache.kernels.jit import kernel
from mooncache.kernels.pool import EVERY_THREAD, pop_chain, push_chain, wake_waiters
from mooncache.kernels.records.base import acquire, address, cell_at, compare_swap, fetch_add, index_in, missing, where
from mooncache.kernels.records.batch import batch_at
from mooncache.kernels.records.shared import shared_at
from mooncache.kernels.worker import write_one


class Event(IntEnum):
    """The events that move a batch on."""

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
def move(batch, event):
    """Apply one event to the batch; return the state before it, or REFUSED with nothing changed."""
    state = acquire(batch, "state")
    while True:
        after = NEXT[state, event]
        if after == REFUSED:
            return np.int64(REFUSED)
        seen = compare_swap(batch, "state", state, after)
        if seen == state:
            return state
        state = seen


@kernel
def slot_of(ctl, batch):
    """Return the slot number of a batch row."""
    return index_in(ctl.batch_rows, batch)


@kernel
def link_of(ctl, slot, link):
    """Return the field of a batch's row at `link` bytes."""
    return cell_at(address(batch_row(ctl, slot)) + link)


@kernel
def append(ctl, ends, link, batch):
    """Append a batch to the queue with these ENDS; `link`: where in a row its next batch stands, NEXT or NOTE_NEXT."""
    slot = slot_of(ctl, batch)
    if ends.last < 0:
        ends.first = slot
    else:
        link_of(ctl, ends.last, link).value = slot
    ends.last = slot
    link_of(ctl, slot, link).value = -1


@kernel
def remove(ctl, ends, link, batch):
    """Take a batch out of such a queue, wherever in it."""
    slot, at, before = slot_of(ctl, batch), ends.first, np.int64(-1)
    after = link_of(ctl, slot, link).value
    while at != slot:
        before = at
        at = link_of(ctl, at, link).value
    if before < 0:
        ends.first = after
    else:
        link_of(ctl, before, link).value = after
    if after < 0:
        ends.last = before


@kernel
def take_row(ctl):
    """Take a batch's row under a new generation, FREE until it is ACQUIREd; missing when all are in use."""
    first, _ = pop_chain(where(shared_at(ctl.shared), "free_batches"), ctl.batch_link, 1)
    if first < 0:
        return batch_at(0)
    batch = batch_row(ctl, first)
    batch.first = -1
    batch.last = -1
    batch.next = -1
    batch.posted = 0
    batch.failed = 0
    batch.deadline = 0
    batch.cancelled = 0
    batch.awaited = 0
    batch.cancel_asked = 0
    batch.finished_at = 0
    batch.note = -1
    batch.taken = 0
    fetch_add(batch, "generation", 1)
    return batch


@kernel
def put_back_row(ctl, batch):
    """Put a free batch's row back into the list."""
    slot = slot_of(ctl, batch)
    push_chain(where(shared_at(ctl.shared), "free_batches"), ctl.batch_link, slot, slot)


@kernel
def return_row(ctl, batch):
    """Put a draining batch's row back without waking anybody; its slices must be gone from it."""
    move(batch, RECLAIM)
    put_back_row(ctl, batch)


@kernel
def release_row(ctl, batch):
    """Put a draining batch's row back, and tell those who wait for one."""
    return_row(ctl, batch)
    wake_waiters(ctl)


@kernel
def announce(ctl, batch):
    """Wake whoever waits for this batch: threads on its futex, event loops on the engine's eventfd."""
    fence()
    if acquire(batch, "waiters") != 0:
        futex_wake(ctl.syscall, where(batch, "state"), EVERY_THREAD)
        account(ctl, Kind.WAKES, 1)
    if acquire(batch, "awaited") != 0:
        write_one(ctl, ctl.event_fd)


@kernel
def finish(ctl, batch):
    """Finish a batch whose slices are all answered. True when it was closed before: the caller must reclaim it."""
    account(ctl, Kind.BATCHES_FINISHED, 1)
    batch.finished_at = clock(ctl)
    if move(batch, FINISH) == DRAINING:
        return True
    announce(ctl, batch)
    return False


@kernel
def finished(batch):
    """Return whether all slices of a batch that is not closed are answered."""
    return acquire(batch, "state") == RECLAIMABLE


@kernel
def look_up(ctl, handle):
    """Return OK when the batch that `handle` names is finished, else NOT_FINISHED, or STALE_HANDLE."""
    batch = resolve(ctl, handle)
    if missing(batch):
        return np.int64(Status.STALE_HANDLE)
    return np.int64(Status.OK if finished(batch) else Status.NOT_FINISHED)
