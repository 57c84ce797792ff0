"""Slices -> chained work requests -> one doorbell.

Work requests are structs prepared once (`next`, gather list, flags); a post writes only what differs, cuts the chain
at its length, and calls the provider's post_send by address.
"""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import account, clock, raise_word, word
from mooncache.kernels.atomics import i16, i32, i64, peek, poke, u32
from mooncache.kernels.batch import append, remove
from mooncache.kernels.complete import fail_slice, settle
from mooncache.kernels.handle import GENERATION_MASK, SLOT_MASK, batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_CANCELLED,
    BATCH_CURSOR,
    BATCH_DEADLINE,
    BATCH_FAILED,
    BATCH_NEXT,
    BATCH_NOTE,
    BATCH_NOTE_STATE,
    BATCH_OFFSET,
    BATCH_OPCODE,
    BATCH_PEER,
    BATCH_POSTED,
    BATCH_REMAINING,
    BATCH_UNPOSTED,
    CHAIN,
    CHUNK_BATCH,
    CHUNK_GENERATION,
    CHUNK_NEXT,
    CHUNK_SLICES,
    COUNTERS,
    ENDPOINT_FIRST,
    ENDPOINT_NOTE_FIRST,
    ENDPOINT_OUTSTANDING,
    ENDPOINT_QP,
    LOCAL_TABLE,
    PEER_TABLES,
    QUEUE_DEPTH,
    RING_EMPTY,
    SCRATCH,
    SLICE_LENGTH,
    SLICE_LOCAL,
    SLICE_REMOTE,
    SLICE_SOURCE,
    SLICE_STATE,
    SLICE_TARGET,
    TABLE_KEYS,
    WORD,
    WORK_REQUESTS,
    WORKER_DEADLINES,
    WORKER_OUTSTANDING,
    WORKER_QUEUED,
    WORKER_RETRY_RING,
    Kind,
    Note,
    Opcode,
    Slice,
)
from mooncache.kernels.ring import first, pop, push
from mooncache.kernels.verbs import (
    ENOMEM,
    SGE_ADDR,
    SGE_LENGTH,
    SGE_LKEY,
    WR_BYTES,
    WR_ID,
    WR_NEXT,
    WR_OPCODE,
    WR_REMOTE_ADDR,
    WR_RKEY,
    WR_SG_LIST,
    post_send,
)
from mooncache.kernels.worker import endpoint_row
from mooncache.limits import CHUNK_SLICES as SLOTS

WAITING, POSTED = int(Slice.WAITING), int(Slice.POSTED)
BAD_WR = SCRATCH + 2


@kernel
def build_run(ctl, row, slot, n, wr):
    """Write the work requests of the slots `slot .. slot + n - 1`, all of one chunk, from the struct at `wr` on."""
    source, target = i64(word(ctl, SLICE_SOURCE)), i64(word(ctl, SLICE_TARGET))
    length, state = i32(word(ctl, SLICE_LENGTH)), i16(word(ctl, SLICE_STATE))
    local, remote = i16(word(ctl, SLICE_LOCAL)), i16(word(ctl, SLICE_REMOTE))
    lkey = i64(peek(word(ctl, LOCAL_TABLE) + TABLE_KEYS * WORD))
    rkey = i64(peek(i64(word(ctl, PEER_TABLES))[peek(row + BATCH_PEER * WORD)] + TABLE_KEYS * WORD))
    opcode = peek(row + BATCH_OPCODE * WORD)
    generation = (i64(word(ctl, CHUNK_GENERATION))[slot // SLOTS] & GENERATION_MASK) << 32
    sge = peek(wr + WR_SG_LIST)
    for i in range(n):
        poke(sge + SGE_ADDR, source[slot + i])
        u32(sge + SGE_LENGTH)[0] = length[slot + i]
        u32(sge + SGE_LKEY)[0] = lkey[local[slot + i]]
        poke(wr + WR_ID, generation | (slot + i))
        u32(wr + WR_OPCODE)[0] = opcode
        poke(wr + WR_REMOTE_ADDR, target[slot + i])
        poke(wr + WR_RKEY, rkey[remote[slot + i]])  # a NIC reads the low half, a software wire all of it
        state[slot + i] = POSTED
        wr += WR_BYTES
        sge += 16


@kernel
def build_note(ctl, slot, wr):
    """Write the work request of a notification."""
    generation = (i64(word(ctl, CHUNK_GENERATION))[slot // SLOTS] & GENERATION_MASK) << 32
    sge = peek(wr + WR_SG_LIST)
    poke(sge + SGE_ADDR, i64(word(ctl, SLICE_SOURCE))[slot])
    u32(sge + SGE_LENGTH)[0] = i32(word(ctl, SLICE_LENGTH))[slot]
    u32(sge + SGE_LKEY)[0] = 0
    poke(wr + WR_ID, generation | slot)
    u32(wr + WR_OPCODE)[0] = Opcode.SEND
    poke(wr + WR_REMOTE_ADDR, 0)
    poke(wr + WR_RKEY, 0)
    i16(word(ctl, SLICE_STATE))[slot] = POSTED


@kernel
def ring_doorbell(ctl, endpoint, n):
    """Post the first `n` prepared work requests as one chain.

    Returns how many the provider accepted, and whether the first refused one can never be accepted: an errno other
    than ENOMEM (the queue is full), or a full queue with nothing in it.
    """
    account(ctl, Kind.WORK_REQUESTS, n)
    account(ctl, Kind.DOORBELLS, 1)
    wr = word(ctl, WORK_REQUESTS)
    last = wr + (n - 1) * WR_BYTES
    after = peek(last + WR_NEXT)
    poke(last + WR_NEXT, 0)
    error = post_send(peek(endpoint + ENDPOINT_QP * WORD), wr, ctl + BAD_WR * WORD)
    poke(last + WR_NEXT, after)
    if error == 0:
        return n, False
    accepted = (peek(ctl + BAD_WR * WORD) - wr) // WR_BYTES
    raise_word(word(ctl, COUNTERS) + Kind.WORK_REQUESTS * WORD, accepted - n)
    hopeless = error != ENOMEM or (accepted == 0 and peek(endpoint + ENDPOINT_OUTSTANDING * WORD) == 0)
    return accepted, hopeless


@kernel
def note_posted(worker, endpoint, row, n):
    """Remember that `n` more work requests of the batch are with the NIC."""
    raise_word(row + BATCH_POSTED * WORD, n)
    raise_word(endpoint + ENDPOINT_OUTSTANDING * WORD, n)
    raise_word(worker + WORKER_OUTSTANDING * WORD, n)


@kernel
def answer_unposted(ctl, row, n, status):
    """Let the next `n` slices at the batch's cursor fail with `status`, unposted."""
    state, next_, used = i16(word(ctl, SLICE_STATE)), i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES))
    chunk, offset = peek(row + BATCH_CURSOR * WORD), peek(row + BATCH_OFFSET * WORD)
    for _ in range(n):
        state[chunk * SLOTS + offset] = status
        offset += 1
        if offset == used[chunk]:
            chunk, offset = next_[chunk], np.int64(0)
    poke(row + BATCH_CURSOR * WORD, chunk)
    poke(row + BATCH_OFFSET * WORD, offset)
    raise_word(row + BATCH_UNPOSTED * WORD, -n)
    raise_word(row + BATCH_FAILED * WORD, n)
    raise_word(row + BATCH_REMAINING * WORD, -n)
    account(ctl, Kind.FAILED, n)


@kernel
def post_chain(ctl, worker, endpoint, row, n):
    """Build and post the next `n` slices of the batch; returns how many left the queue, posted or refused for good."""
    next_, used = i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES))
    chunk, offset = peek(row + BATCH_CURSOR * WORD), peek(row + BATCH_OFFSET * WORD)
    wr, built = word(ctl, WORK_REQUESTS), np.int64(0)
    while built < n:
        run = min(n - built, used[chunk] - offset)
        build_run(ctl, row, chunk * SLOTS + offset, run, wr + built * WR_BYTES)
        built += run
        offset += run
        if offset == used[chunk]:
            chunk, offset = next_[chunk], np.int64(0)
    accepted, refused = ring_doorbell(ctl, endpoint, n)
    note_posted(worker, endpoint, row, accepted)
    if accepted == n:
        poke(row + BATCH_CURSOR * WORD, chunk)
        poke(row + BATCH_OFFSET * WORD, offset)
        raise_word(row + BATCH_UNPOSTED * WORD, -n)
        return n
    retreat(ctl, row, accepted, n)
    if refused:
        answer_unposted(ctl, row, 1, Status.LOCAL_ERROR)
        return accepted + 1
    return accepted


@kernel
def retreat(ctl, row, accepted, built):
    """After a short post: move the cursor over the accepted slices only, and call the others waiting again."""
    state, next_, used = i16(word(ctl, SLICE_STATE)), i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES))
    chunk, offset = peek(row + BATCH_CURSOR * WORD), peek(row + BATCH_OFFSET * WORD)
    for i in range(built):
        if i == accepted:
            poke(row + BATCH_CURSOR * WORD, chunk)
            poke(row + BATCH_OFFSET * WORD, offset)
        if i >= accepted:
            state[chunk * SLOTS + offset] = WAITING
        offset += 1
        if offset == used[chunk]:
            chunk, offset = next_[chunk], np.int64(0)
    raise_word(row + BATCH_UNPOSTED * WORD, -accepted)


# ------------------------------------------------------------------------------ the endpoint's queue of batches
@kernel
def enqueue(ctl, worker, endpoint, row):
    """Append a batch to the endpoint's queue of those with slices to post."""
    append(ctl, endpoint + ENDPOINT_FIRST * WORD, BATCH_NEXT, row)
    raise_word(worker + WORKER_QUEUED * WORD, 1)
    if peek(row + BATCH_DEADLINE * WORD) != 0:
        raise_word(worker + WORKER_DEADLINES * WORD, 1)


@kernel
def dequeue(ctl, worker, endpoint, row):
    """Take a batch out of the endpoint's queue, wherever in it."""
    remove(ctl, endpoint + ENDPOINT_FIRST * WORD, BATCH_NEXT, row)
    raise_word(worker + WORKER_QUEUED * WORD, -1)
    if peek(row + BATCH_DEADLINE * WORD) != 0:
        raise_word(worker + WORKER_DEADLINES * WORD, -1)


@kernel
def post_batches(ctl, worker, endpoint):
    """Post whole chains from the endpoint's queue while it has credits for them; returns slices that left the queue.

    A chain is posted when it is complete, so that doorbells stay rare; chains are at most half the queue's depth, so
    that this never leaves the queue empty.
    """
    moved = np.int64(0)
    chain, depth = word(ctl, CHAIN), word(ctl, QUEUE_DEPTH)
    while peek(endpoint + ENDPOINT_FIRST * WORD) >= 0:
        row = batch_row(ctl, peek(endpoint + ENDPOINT_FIRST * WORD))
        n = min(chain, peek(row + BATCH_UNPOSTED * WORD))
        if n > depth - peek(endpoint + ENDPOINT_OUTSTANDING * WORD):
            return moved
        posted = post_chain(ctl, worker, endpoint, row, n)
        moved += posted
        if peek(row + BATCH_UNPOSTED * WORD) == 0:
            dequeue(ctl, worker, endpoint, row)
            settle(ctl, row)
        if posted < n:
            return moved
    return moved


# ------------------------------------------------------------------------------ notifications
@kernel
def post_note(ctl, worker, endpoint):
    """Post the notification whose turn it is at this endpoint, if it waits for nothing else; returns how many."""
    first_one = peek(endpoint + ENDPOINT_NOTE_FIRST * WORD)
    if first_one < 0 or peek(endpoint + ENDPOINT_OUTSTANDING * WORD) >= word(ctl, QUEUE_DEPTH):
        return np.int64(0)
    row = batch_row(ctl, first_one)
    if peek(row + BATCH_NOTE_STATE * WORD) != Note.TURN:
        return np.int64(0)
    slot = peek(row + BATCH_NOTE * WORD)
    build_note(ctl, slot, word(ctl, WORK_REQUESTS))
    accepted, refused = ring_doorbell(ctl, endpoint, np.int64(1))
    if accepted == 0 and not refused:
        i16(word(ctl, SLICE_STATE))[slot] = WAITING
        return np.int64(0)
    poke(row + BATCH_NOTE_STATE * WORD, Note.ANSWER)
    if refused:
        fail_slice(ctl, row, slot, Status.LOCAL_ERROR)
        settle(ctl, row)
    else:
        note_posted(worker, endpoint, row, accepted)
    return np.int64(1)


# ------------------------------------------------------------------------------ slices posted again
@kernel
def post_retries(ctl, worker, index):
    """Post slices from the retry ring, a chain of one batch at a time; returns how many left it."""
    ring, owner = peek(worker + WORKER_RETRY_RING * WORD), i64(word(ctl, CHUNK_BATCH))
    state = i16(word(ctl, SLICE_STATE))
    moved = np.int64(0)
    while True:
        slot = first(ring)
        if slot == RING_EMPTY:
            return moved
        row = batch_row(ctl, owner[slot // SLOTS])
        if peek(row + BATCH_CANCELLED * WORD) != 0:
            pop(ring)
            fail_slice(ctl, row, slot, peek(row + BATCH_CANCELLED * WORD))
            settle(ctl, row)
            moved += 1
            continue
        endpoint = endpoint_row(ctl, index, peek(row + BATCH_PEER * WORD))
        room = min(word(ctl, CHAIN), word(ctl, QUEUE_DEPTH) - peek(endpoint + ENDPOINT_OUTSTANDING * WORD))
        n = np.int64(0)
        while n < room and slot != RING_EMPTY and batch_row(ctl, owner[slot // SLOTS]) == row:
            if slot == peek(row + BATCH_NOTE * WORD):
                build_note(ctl, slot, word(ctl, WORK_REQUESTS) + n * WR_BYTES)
            else:
                build_run(ctl, row, slot, 1, word(ctl, WORK_REQUESTS) + n * WR_BYTES)
            pop(ring)
            n += 1
            slot = first(ring)
        if n == 0:
            return moved
        accepted, refused = ring_doorbell(ctl, endpoint, n)
        note_posted(worker, endpoint, row, accepted)
        moved += accepted
        for i in range(accepted, n):
            again = peek(word(ctl, WORK_REQUESTS) + i * WR_BYTES + WR_ID) & SLOT_MASK
            if i == accepted and refused:
                fail_slice(ctl, row, again, Status.LOCAL_ERROR)
                moved += 1
            else:
                state[again] = WAITING
                push(ring, again)
        settle(ctl, row)
        if accepted < n:
            return moved


# ------------------------------------------------------------------------------ batches that stop early
@kernel
def stop_posting(ctl, worker, index, row, status):
    """Answer all unposted slices of a queued batch with `status` and take it out of the queue."""
    left = peek(row + BATCH_UNPOSTED * WORD)
    poke(row + BATCH_CANCELLED * WORD, status)
    if left > 0:
        dequeue(ctl, worker, endpoint_row(ctl, index, peek(row + BATCH_PEER * WORD)), row)
        answer_unposted(ctl, row, left, status)
    if left > 0 or (peek(row + BATCH_NOTE * WORD) >= 0 and peek(row + BATCH_NOTE_STATE * WORD) != Note.ANSWER):
        settle(ctl, row)


@kernel
def overdue(ctl, row):
    """Whether a batch's deadline has passed."""
    return peek(row + BATCH_DEADLINE * WORD) != 0 and clock(ctl) >= peek(row + BATCH_DEADLINE * WORD)
