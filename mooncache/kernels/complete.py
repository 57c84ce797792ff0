"""Completions -> slice states, batch counts, retries, failures, and the end of batches."""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels import heap
from mooncache.kernels.account import account, raise_word, word
from mooncache.kernels.atomics import i8, i16, i64, peek, store, u32
from mooncache.kernels.batch import finish
from mooncache.kernels.handle import GENERATION_MASK, SLOT_MASK, batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_CANCELLED,
    BATCH_FAILED,
    BATCH_NOTE,
    BATCH_PEER,
    BATCH_POSTED,
    BATCH_REMAINING,
    CAPACITY,
    CHUNK_BATCH,
    CHUNK_GENERATION,
    COMPLETIONS,
    ENDPOINT_OUTSTANDING,
    POLL_LOT,
    RETRIES,
    RUN,
    SLICE_ATTEMPTS,
    SLICE_STATE,
    STORE,
    WORD,
    WORKER_CQ,
    WORKER_OUTSTANDING,
    WORKER_RETRY_RING,
    Kind,
    Slice,
    Store,
)
from mooncache.kernels.note import settle_note
from mooncache.kernels.reclaim.dispatch import on_complete, retire
from mooncache.kernels.ring import push
from mooncache.kernels.verbs import POLL_AGAIN, WC_BYTES, WC_STATUS, WC_WR_ID, WcStatus, poll_cq
from mooncache.kernels.worker import endpoint_row
from mooncache.limits import CHUNK_BITS

DONE, POSTED, WAITING = int(Slice.DONE), int(Slice.POSTED), int(Slice.WAITING)


@kernel
def settle(ctl, row):
    """End the batch if all its slices are answered; post its notification if that is the last."""
    if peek(row + BATCH_NOTE * WORD) >= 0 and peek(row + BATCH_REMAINING * WORD) <= 1:
        settle_note(ctl, row)
    if peek(row + BATCH_REMAINING * WORD) == 0 and finish(ctl, row):
        retire(ctl, row)


@kernel
def fail_slice(ctl, row, slot, status):
    """Answer one slice with a failure. The caller settles the batch."""
    i16(word(ctl, SLICE_STATE))[slot] = status
    raise_word(row + BATCH_FAILED * WORD, 1)
    store(row + BATCH_REMAINING * WORD, peek(row + BATCH_REMAINING * WORD) - 1)
    account(ctl, Kind.FAILED, 1)


@kernel
def status_of(wc_status):
    """The Status that a failed work request's slice gets."""
    if wc_status == WcStatus.REM_ACCESS_ERR:
        return np.int64(Status.REMOTE_ACCESS)
    if wc_status == WcStatus.REM_INV_REQ_ERR or wc_status == WcStatus.REM_OP_ERR:
        return np.int64(Status.REMOTE_ERROR)
    if wc_status == WcStatus.RETRY_EXC_ERR or wc_status == WcStatus.RNR_RETRY_EXC_ERR:
        return np.int64(Status.RETRIES_EXCEEDED)
    if wc_status == WcStatus.WR_FLUSH_ERR:
        return np.int64(Status.FLUSHED)
    if wc_status == WcStatus.REM_ABORT_ERR:
        return np.int64(Status.PEER_GONE)
    return np.int64(Status.LOCAL_ERROR)


@kernel
def passing(wc_status):
    """Whether the failure says nothing about the slice itself, so that it may be posted again."""
    return (
        wc_status == WcStatus.WR_FLUSH_ERR
        or wc_status == WcStatus.RETRY_EXC_ERR
        or wc_status == WcStatus.RNR_RETRY_EXC_ERR
    )


@kernel
def answer_failure(ctl, worker, row, slot, wc_status):
    """A work request failed: post its slice again later, or let it fail."""
    attempts = i8(word(ctl, SLICE_ATTEMPTS))
    cancelled = peek(row + BATCH_CANCELLED * WORD)
    if wc_status == WcStatus.RNR_RETRY_EXC_ERR and slot == peek(row + BATCH_NOTE * WORD):
        fail_slice(ctl, row, slot, np.int64(Status.INBOX_FULL))
    elif passing(wc_status) and cancelled == 0 and attempts[slot] < word(ctl, RETRIES):
        attempts[slot] += 1
        i16(word(ctl, SLICE_STATE))[slot] = WAITING
        push(peek(worker + WORKER_RETRY_RING * WORD), slot)
        account(ctl, Kind.RETRIED, 1)
    elif passing(wc_status) and cancelled != 0:
        fail_slice(ctl, row, slot, cancelled)
    else:
        fail_slice(ctl, row, slot, status_of(wc_status))


@kernel
def apply_run(ctl, row, run, done, answered, endpoint, worker):
    """`answered` work requests of one batch came back, `done` of them well: update counts, reclaim, end the batch."""
    raise_word(row + BATCH_POSTED * WORD, -answered)
    raise_word(endpoint + ENDPOINT_OUTSTANDING * WORD, -answered)
    raise_word(worker + WORKER_OUTSTANDING * WORD, -answered)
    if done > 0:
        account(ctl, Kind.COMPLETED, done)
        store(row + BATCH_REMAINING * WORD, peek(row + BATCH_REMAINING * WORD) - done)
        on_complete(ctl, row, run, done)
    settle(ctl, row)


@kernel
def poll(ctl, worker, index):
    """Take one lot of completions and apply it, run by run of one batch; returns how many were taken.

    A completion whose generation or state does not match names a slice that was freed: it is counted, not applied.
    """
    wc, slots = word(ctl, COMPLETIONS), i64(word(ctl, RUN))
    account(ctl, Kind.POLLS, 1)
    taken = poll_cq(peek(worker + WORKER_CQ * WORD), word(ctl, POLL_LOT), wc)
    if taken <= 0:
        return np.int64(taken == POLL_AGAIN)
    account(ctl, Kind.COMPLETIONS, taken)
    capacity, heap_store = word(ctl, CAPACITY), word(ctl, STORE) == Store.HEAP
    state, owner, generation = (
        i16(word(ctl, SLICE_STATE)),
        i64(word(ctl, CHUNK_BATCH)),
        i64(word(ctl, CHUNK_GENERATION)),
    )
    batch, done, answered = np.int64(-1), np.int64(0), np.int64(0)
    row, endpoint = np.int64(0), np.int64(0)
    known = np.int64(-(1 << 63))  # generation and chunk of the last completion, looked up once a chunk; none yet
    for _ in range(taken):
        wr_id, wc_status = peek(wc + WC_WR_ID), np.int64(u32(wc + WC_STATUS)[0])
        wc += WC_BYTES
        slot = wr_id & SLOT_MASK
        if wr_id >> CHUNK_BITS != known:
            chunk = slot >> CHUNK_BITS
            if slot >= capacity or generation[chunk] & GENERATION_MASK != wr_id >> 32:
                account(ctl, Kind.STALE, 1)
                continue
            known = wr_id >> CHUNK_BITS
            if owner[chunk] != batch:
                if answered > 0:
                    apply_run(ctl, row, word(ctl, RUN), done, answered, endpoint, worker)
                batch, done, answered = owner[chunk], np.int64(0), np.int64(0)
                row = batch_row(ctl, batch)
                endpoint = endpoint_row(ctl, index, peek(row + BATCH_PEER * WORD))
        if state[slot] != POSTED:
            account(ctl, Kind.STALE, 1)
            continue
        answered += 1
        if wc_status == WcStatus.SUCCESS:
            state[slot] = DONE
            if heap_store:
                heap.touch(ctl, slot, DONE)
            slots[done] = slot
            done += 1
        else:
            answer_failure(ctl, worker, row, slot, wc_status)
    if answered > 0:
        apply_run(ctl, row, word(ctl, RUN), done, answered, endpoint, worker)
    return taken
