"""Notifications: a batch's last slice, a SEND, held back until all others have arrived.

    DATA --all slices arrived--> TURN --all before it are gone--> ANSWER --the peer's inbox has it--> the batch is done
      \\--one failed, or the batch was cancelled or closed: it is never sent

Batches with a notification form one queue an endpoint, in the order of their submission; only its first may post, and
one at a time, so that the peer gets them in that order whatever the wire does.
"""

import numpy as np

from mooncache.kernels.account import account, raise_word, word
from mooncache.kernels.atomics import copy, i8, i16, i32, i64, load, peek, poke, store
from mooncache.kernels.batch import DRAINING, append, remove, slot_of
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_CANCELLED,
    BATCH_FAILED,
    BATCH_LAST,
    BATCH_NOTE,
    BATCH_NOTE_NEXT,
    BATCH_NOTE_STATE,
    BATCH_PEER,
    BATCH_REMAINING,
    BATCH_STATE,
    BATCH_WORKER,
    CHUNK_SLICES,
    ENDPOINT_NOTE_FIRST,
    NOTE_STRIDE,
    NOTES,
    SLICE_ATTEMPTS,
    SLICE_FIRST,
    SLICE_LAST,
    SLICE_LENGTH,
    SLICE_LOCAL,
    SLICE_REMOTE,
    SLICE_SOURCE,
    SLICE_STATE,
    SLICE_TARGET,
    WORD,
    WORKER_NOTES,
    Kind,
    Note,
    Slice,
)
from mooncache.kernels.look import NOWHERE
from mooncache.kernels.worker import endpoint_row, worker_row
from mooncache.limits import CHUNK_SLICES as SLOTS


@kernel
def fill_note(ctl, row, requests, note, length):
    """Make the batch's last slot its notification; `note` is the address of `length` bytes, copied here."""
    last = peek(row + BATCH_LAST * WORD)
    slot = last * SLOTS + i64(word(ctl, CHUNK_SLICES))[last] - 1
    own = word(ctl, NOTES) + slot_of(ctl, row) * word(ctl, NOTE_STRIDE)
    copy(own, note, length)
    i64(word(ctl, SLICE_SOURCE))[slot] = own
    i64(word(ctl, SLICE_TARGET))[slot] = 0
    i32(word(ctl, SLICE_LENGTH))[slot] = length
    i32(word(ctl, SLICE_FIRST))[slot] = requests
    i32(word(ctl, SLICE_LAST))[slot] = requests
    i16(word(ctl, SLICE_LOCAL))[slot] = NOWHERE
    i16(word(ctl, SLICE_REMOTE))[slot] = NOWHERE
    i16(word(ctl, SLICE_STATE))[slot] = Slice.WAITING
    i8(word(ctl, SLICE_ATTEMPTS))[slot] = 0
    poke(row + BATCH_NOTE * WORD, slot)
    poke(row + BATCH_NOTE_STATE * WORD, Note.DATA)


@kernel
def enqueue_note(ctl, worker, endpoint, row):
    """Append a batch to the endpoint's queue of those with a notification."""
    append(ctl, endpoint + ENDPOINT_NOTE_FIRST * WORD, BATCH_NOTE_NEXT, row)
    raise_word(worker + WORKER_NOTES * WORD, 1)


@kernel
def dequeue_note(ctl, row):
    """Take a batch, whose notification is answered, out of its endpoint's queue, wherever in it."""
    index = peek(row + BATCH_WORKER * WORD)
    endpoint = endpoint_row(ctl, index, peek(row + BATCH_PEER * WORD))
    remove(ctl, endpoint + ENDPOINT_NOTE_FIRST * WORD, BATCH_NOTE_NEXT, row)
    raise_word(worker_row(ctl, index) + WORKER_NOTES * WORD, -1)
    poke(row + BATCH_NOTE * WORD, -1)


@kernel
def withhold(ctl, row, state):
    """Answer a notification without sending it."""
    i16(word(ctl, SLICE_STATE))[peek(row + BATCH_NOTE * WORD)] = state
    store(row + BATCH_REMAINING * WORD, peek(row + BATCH_REMAINING * WORD) - 1)
    account(ctl, Kind.FAILED, 1)
    dequeue_note(ctl, row)


@kernel
def settle_note(ctl, row):
    """All slices of the batch but its notification, at most, are answered: move that on.

    It fails on its own account only where nothing else does: the batch was cancelled when all had arrived.
    """
    if peek(row + BATCH_NOTE_STATE * WORD) == Note.ANSWER:
        if peek(row + BATCH_REMAINING * WORD) == 0:
            dequeue_note(ctl, row)
        return
    cancelled = peek(row + BATCH_CANCELLED * WORD)
    if peek(row + BATCH_FAILED * WORD) > 0 or load(row + BATCH_STATE * WORD) == DRAINING:
        withhold(ctl, row, np.int64(Slice.WITHHELD))
    elif cancelled != 0:
        raise_word(row + BATCH_FAILED * WORD, 1)
        withhold(ctl, row, cancelled)
    else:
        poke(row + BATCH_NOTE_STATE * WORD, Note.TURN)
