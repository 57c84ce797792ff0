"""Notifications: a batch's last slice is a SEND, held back until all others have arrived.

    DATA --all slices arrived--> TURN --all before it are gone--> ANSWER --the peer's inbox has it--> the batch is done
      \\--one failed, or the batch was cancelled or closed: it is never sent

Batches with a notification form one queue an endpoint, in the order of their submission; only its first may post, and
one at a time, so that the peer gets them in that order whatever the wire does.
"""

import numpy as np

from mooncache.kernels.account import account
from mooncache.kernels.atomics import copy, i8, i16, i32, i64
from mooncache.kernels.batch import DRAINING, append, remove, slot_of
from mooncache.kernels.enums import Kind, Note, Slice
from mooncache.kernels.jit import kernel
from mooncache.kernels.look import NOWHERE
from mooncache.kernels.records.base import acquire, release
from mooncache.kernels.records.batch import NOTE_NEXT
from mooncache.kernels.worker import endpoint_row, worker_row
from mooncache.limits import CHUNK_SLICES as SLOTS


@kernel
def fill_note(ctl, batch, requests, note, length):
    """Make the batch's last slot its notification; `note` is the address of `length` bytes, copied here."""
    last = batch.last
    slot = last * SLOTS + i64(ctl.chunk_slices)[last] - 1
    own = ctl.notes + slot_of(ctl, batch) * ctl.note_stride
    copy(own, note, length)
    i64(ctl.slice_source)[slot] = own
    i64(ctl.slice_target)[slot] = 0
    i32(ctl.slice_length)[slot] = length
    i32(ctl.slice_first)[slot] = requests
    i32(ctl.slice_last)[slot] = requests
    i16(ctl.slice_local)[slot] = NOWHERE
    i16(ctl.slice_remote)[slot] = NOWHERE
    i16(ctl.slice_state)[slot] = Slice.WAITING
    i8(ctl.slice_attempts)[slot] = 0
    batch.note = slot
    batch.note_state = Note.DATA


@kernel
def enqueue_note(ctl, worker, endpoint, batch):
    """Append a batch to the endpoint's queue of those with a notification."""
    append(ctl, endpoint.to_notify, NOTE_NEXT, batch)
    worker.notes += 1


@kernel
def dequeue_note(ctl, batch):
    """Take a batch, whose notification is answered, out of its endpoint's queue, wherever in it."""
    index = batch.worker
    endpoint = endpoint_row(ctl, index, batch.peer)
    remove(ctl, endpoint.to_notify, NOTE_NEXT, batch)
    worker_row(ctl, index).notes -= 1
    batch.note = -1


@kernel
def withhold(ctl, batch, state):
    """Answer a notification without sending it."""
    i16(ctl.slice_state)[batch.note] = state
    release(batch, "remaining", batch.remaining - 1)
    account(ctl, Kind.FAILED, 1)
    dequeue_note(ctl, batch)


@kernel
def settle_note(ctl, batch):
    """Move a batch's notification on: all its slices but that one, at most, are answered.

    It fails on its own account only where nothing else does: the batch was cancelled when all had arrived.
    """
    if batch.note_state == Note.ANSWER:
        if batch.remaining == 0:
            dequeue_note(ctl, batch)
        return
    cancelled = batch.cancelled
    if batch.failed > 0 or acquire(batch, "state") == DRAINING:
        withhold(ctl, batch, np.int64(Slice.WITHHELD))
    elif cancelled != 0:
        batch.failed += 1
        withhold(ctl, batch, cancelled)
    else:
        batch.note_state = Note.TURN
