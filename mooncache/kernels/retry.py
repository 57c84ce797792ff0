"""Slices that are posted again: after a failure that was not theirs, or once a peer that refused them was asked.

    posted --a failure, see `failure`--> retry  --a queue takes it--------------------------> posted
       |                                   ^  \\--its batch was stopped, or its peer is gone--> fails
       +--refused--> kept --peer asked-----+
                                            \\--nothing is new--> fails

Memory that is registered anew, at the same address, has another key than its peers know. A worker cannot ask: it keeps
the slice, once each, and writes to the eventfd that the engine's looker sleeps on (`look`).
"""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import account
from mooncache.kernels.atomics import i8, i16, i32, i64
from mooncache.kernels.chain import build_chain, build_note, ring_doorbell
from mooncache.kernels.enums import Kind, Slice
from mooncache.kernels.failure import Fate, fate_of, status_of
from mooncache.kernels.handle import SLOT_MASK, batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.look import NOWHERE, region_refused
from mooncache.kernels.queue import SLICES_MASK, SLICES_SHIFT, ready, room
from mooncache.kernels.records.base import acquire, missing, swap
from mooncache.kernels.records.queue import queue_at
from mooncache.kernels.settle import fail_slice, settle
from mooncache.kernels.spread import choose
from mooncache.kernels.worker import cut_off, endpoint_row, peer_table, write_one
from mooncache.limits import CHUNK_BITS
from mooncache.limits import CHUNK_SLICES as SLOTS

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


# ------------------------------------------------------------------------------ the list of those to post again


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
def post_later(ctl, worker, slot):
    """Append a slice to those that are to be posted again."""
    append_slice(ctl, worker.retry, slot)


# ------------------------------------------------------------------------------ kept until their peer was asked


@kernel
def may_keep(ctl, slot):
    """Return whether a refused slice may wait for a look: there is a looker, and none was made for it yet."""
    return ctl.look_fd >= 0 and i16(ctl.slice_remote)[slot] != NOWHERE and not was_kept(ctl, slot)


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


# ------------------------------------------------------------------------------ failed work requests


@kernel
def answer_failure(ctl, worker, batch, slot, wc_status, blamed):
    """Post a slice again later whose work request failed, perhaps after the peer was asked, or let it fail.

    What is not `blamed`, since it only was on a queue pair when that broke, may be posted again as often as it takes.
    """
    stopped = batch.cancelled
    exhausted = blamed and attempts_of(ctl, slot) >= ctl.retries
    fate = fate_of(wc_status, slot == batch.note, stopped, exhausted, may_keep(ctl, slot))
    if fate == Fate.AGAIN:
        if blamed:
            count_attempt(ctl, slot)
        i16(ctl.slice_state)[slot] = WAITING
        post_later(ctl, worker, slot)
        account(ctl, Kind.RETRIED, 1)
    elif fate == Fate.ASK:
        keep_refused(ctl, worker, batch, slot)
        account(ctl, Kind.RETRIED, 1)
    elif fate == Fate.STOP:
        fail_slice(ctl, batch, slot, stopped)
    elif fate == Fate.FULL:
        fail_slice(ctl, batch, slot, np.int64(Status.INBOX_FULL))
    else:
        fail_slice(ctl, batch, slot, status_of(wc_status))


@kernel
def answer_entry(ctl, worker, entry, wc_status, blamed):
    """Answer the slices of one work request with a failure, and settle their batch."""
    slot, n = entry & SLOT_MASK, (entry >> SLICES_SHIFT) & SLICES_MASK
    if n == 0:
        return
    batch = batch_row(ctl, i64(ctl.chunk_batch)[slot >> CHUNK_BITS])
    for i in range(n):
        answer_failure(ctl, worker, batch, slot + i, wc_status, blamed)
    batch.posted -= n
    settle(ctl, batch)


# ------------------------------------------------------------------------------ posting again


@kernel
def post_retries(ctl, worker, index):
    """Look once at every slice that is to be posted again; return how many were, or failed. The others wait on."""
    next_, owner = i32(ctl.slice_next), i64(ctl.chunk_batch)
    slot, moved = worker.retry.first, np.int64(0)
    worker.retry.first = -1
    while slot >= 0:
        after = np.int64(next_[slot])
        batch = batch_row(ctl, owner[slot // SLOTS])
        endpoint = endpoint_row(ctl, index, batch.peer)
        status = batch.cancelled
        if status == 0 and cut_off(ctl, endpoint, batch):
            status = np.int64(Status.PEER_GONE)
        due = status == 0 and look_is_due(ctl, batch, slot)
        if status == 0 and not due and (in_vain(ctl, batch, slot) or region_refused(ctl, slot)):
            status = np.int64(Status.REMOTE_ACCESS)
        if due:
            keep(ctl, worker, slot)
        elif status == 0 and not due and post_again(ctl, worker, batch, endpoint, slot):
            moved += 1
        elif status == 0:
            post_later(ctl, worker, slot)
        else:
            fail_slice(ctl, batch, slot, status)
            settle(ctl, batch)
            moved += 1
        slot = after
    return moved


@kernel
def post_again(ctl, worker, batch, endpoint, slot):
    """Post one slice on its own; return False when no queue takes it now."""
    if slot == batch.note:
        queue = queue_at(endpoint.notes)
        if not ready(queue) or room(queue) < 1:
            return False
        build_note(ctl, queue, slot)
    else:
        queue = choose(endpoint, np.int64(1))
        if missing(queue):
            return False
        build_chain(ctl, batch, queue, slot // SLOTS, slot % SLOTS, 1, 1)
    accepted, refused = ring_doorbell(ctl, worker, queue, np.int64(1))
    batch.posted += accepted
    if refused:
        fail_slice(ctl, batch, slot, Status.LOCAL_ERROR)
        settle(ctl, batch)
    elif accepted == 0:
        i16(ctl.slice_state)[slot] = WAITING
    return accepted == 1 or refused
