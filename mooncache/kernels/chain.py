"""Slices -> chained work requests -> one doorbell.

Work requests are structs that are chained once (`next`); a post writes everything else, cuts the chain at its end, and
calls the provider's post_send by address.
"""

import numpy as np

from mooncache.kernels.account import account, raise_word, word
from mooncache.kernels.atomics import i16, i32, i64, peek, poke
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_OPCODE,
    BATCH_PEER,
    CHUNK_NEXT,
    CHUNK_SLICES,
    COUNTERS,
    CQ_CREDITS,
    GATHERS,
    LOCAL_TABLE,
    PEER_TABLES,
    QUEUE_CQ,
    QUEUE_ENTRIES,
    QUEUE_GATHERS,
    QUEUE_HEAD,
    QUEUE_INLINE,
    QUEUE_LKEYS,
    QUEUE_LOOSE,
    QUEUE_MASK,
    QUEUE_QP,
    QUEUE_RKEYS,
    QUEUE_SIGNAL,
    QUEUE_TAG,
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
    WORKER_OUTSTANDING,
    Kind,
    Opcode,
    Slice,
)
from mooncache.kernels.queue import (
    SEQUENCE_MASK,
    SIGNALED,
    SLICES_SHIFT,
    entry_at,
    in_flight,
)
from mooncache.kernels.verbs import (
    EAGAIN,
    ENOMEM,
    SEND_INLINE,
    SEND_SIGNALED,
    SGE_ADDR,
    SGE_BYTES,
    SGE_LENGTH,
    WR_BYTES,
    WR_ID,
    WR_NEXT,
    WR_NUM_SGE,
    WR_REMOTE_ADDR,
    WR_RKEY,
    WR_SEND_FLAGS,
    WR_SG_LIST,
    post_send,
)
from mooncache.limits import CHUNK_SLICES as SLOTS

POSTED = int(Slice.POSTED)
BAD_WR = SCRATCH + 2


@kernel
def build_chain(ctl, row, queue, chunk, offset, wrs, slices):
    """Write up to `wrs` work requests for the batch's next slices, from `offset` of `chunk` on, at most `slices`.

    Slices that lie side by side at the target share a work request as far as the queue gathers. A completion is asked
    for every QUEUE_SIGNAL work requests and at the chain's end. Writes: work requests, gather lists, the queue's
    entries from its head on. Returns (work requests, slices, chunk, offset) as they are afterwards.
    """
    source, target = i64(word(ctl, SLICE_SOURCE)), i64(word(ctl, SLICE_TARGET))
    length, state = i32(word(ctl, SLICE_LENGTH)), i16(word(ctl, SLICE_STATE))
    local, remote = i16(word(ctl, SLICE_LOCAL)), i16(word(ctl, SLICE_REMOTE))
    next_, used = i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES))
    peer_table = i64(word(ctl, PEER_TABLES))[peek(row + BATCH_PEER * WORD)]
    lkey = i64(peek(word(ctl, LOCAL_TABLE) + TABLE_KEYS * WORD) + peek(queue + QUEUE_LKEYS * WORD))
    rkey = i64(peek(peer_table + TABLE_KEYS * WORD) + peek(queue + QUEUE_RKEYS * WORD))
    opcode = peek(row + BATCH_OPCODE * WORD)
    tag, head = peek(queue + QUEUE_TAG * WORD), peek(queue + QUEUE_HEAD * WORD)
    entries, mask = peek(queue + QUEUE_ENTRIES * WORD), peek(queue + QUEUE_MASK * WORD)
    signal, gathers = peek(queue + QUEUE_SIGNAL * WORD), peek(queue + QUEUE_GATHERS * WORD)
    inline = peek(queue + QUEUE_INLINE * WORD) if opcode == Opcode.WRITE else np.int64(0)
    loose = peek(queue + QUEUE_LOOSE * WORD)
    wr, sge = word(ctl, WORK_REQUESTS) - WR_BYTES, word(ctl, GATHERS)
    built, taken, gathered = np.int64(0), np.int64(0), np.int64(0)
    end, there, entry, flags = np.int64(-1), np.int64(-1), np.int64(0), np.int64(0)
    while taken < slices:
        first = chunk * SLOTS + offset
        last = first + min(used[chunk] - offset, slices - taken)
        slot = first
        while slot < last:
            bytes_ = np.int64(length[slot])
            if 0 < gathered < gathers and target[slot] == end and remote[slot] == there:
                gathered += 1
                flags &= ~SEND_INLINE
                poke(wr + WR_NUM_SGE, opcode << 32 | gathered)
                poke(wr + WR_SEND_FLAGS, flags)
                poke(entry, peek(entry) + (1 << SLICES_SHIFT))
            else:
                if built == wrs:
                    break
                wr += WR_BYTES
                loose += 1
                flags = np.int64(0)
                entry = entries + ((head + built) & mask) * WORD
                if loose == signal:
                    loose, flags = np.int64(0), np.int64(SEND_SIGNALED)
                    poke(entry, slot | 1 << SLICES_SHIFT | SIGNALED)
                else:
                    poke(entry, slot | 1 << SLICES_SHIFT)
                if bytes_ <= inline:
                    flags |= SEND_INLINE
                there = np.int64(remote[slot])
                poke(wr + WR_ID, tag | ((head + built) & SEQUENCE_MASK))
                poke(wr + WR_SG_LIST, sge)
                poke(wr + WR_NUM_SGE, opcode << 32 | 1)  # the number of ranges, and behind it the opcode
                poke(wr + WR_SEND_FLAGS, flags)
                poke(wr + WR_REMOTE_ADDR, target[slot])
                poke(wr + WR_RKEY, rkey[there])  # a NIC reads the low half, a software wire all of it
                built += 1
                gathered = np.int64(1)
            poke(sge + SGE_ADDR, source[slot])
            poke(sge + SGE_LENGTH, bytes_ | lkey[local[slot]] << 32)  # the length, and behind it the key
            sge += SGE_BYTES
            state[slot] = POSTED
            end = target[slot] + bytes_
            slot += 1
        taken += slot - first
        offset += slot - first
        if offset == used[chunk]:
            chunk, offset = next_[chunk], np.int64(0)
            gathered = np.int64(0)  # an entry's slots are of one chunk
        if slot < last:
            break
    if loose > 0:
        poke(wr + WR_SEND_FLAGS, flags | SEND_SIGNALED)
        poke(entry, peek(entry) | SIGNALED)
    return built, taken, chunk, offset


@kernel
def build_note(ctl, queue, slot, wr):
    """Write the work request of a notification, and its entry at the queue's head."""
    sge = word(ctl, GATHERS)
    poke(sge + SGE_ADDR, i64(word(ctl, SLICE_SOURCE))[slot])
    poke(sge + SGE_LENGTH, np.int64(i32(word(ctl, SLICE_LENGTH))[slot]))
    build_plain(queue, wr, Opcode.SEND, sge, 1, slot | 1 << SLICES_SHIFT)
    i16(word(ctl, SLICE_STATE))[slot] = POSTED


@kernel
def build_plain(queue, wr, opcode, sge, ranges, entry):
    """Write a work request that no region's key is needed for, and its entry at the queue's head."""
    head = peek(queue + QUEUE_HEAD * WORD)
    poke(wr + WR_ID, peek(queue + QUEUE_TAG * WORD) | (head & SEQUENCE_MASK))
    poke(wr + WR_SG_LIST, sge)
    poke(wr + WR_NUM_SGE, opcode << 32 | ranges)
    poke(wr + WR_SEND_FLAGS, SEND_SIGNALED)
    poke(wr + WR_REMOTE_ADDR, 0)
    poke(wr + WR_RKEY, 0)
    poke(entry_at(queue, head), entry | SIGNALED)


@kernel
def ring_doorbell(ctl, worker, queue, n):
    """Post the first `n` prepared work requests as one chain.

    Returns how many the provider accepted, and whether the first refused one can never be accepted: an errno other
    than ENOMEM (the queue is full) and EAGAIN (not now, whatever is in it), or a full queue with nothing in it.
    """
    account(ctl, Kind.WORK_REQUESTS, n)
    account(ctl, Kind.DOORBELLS, 1)
    wr = word(ctl, WORK_REQUESTS)
    last = wr + (n - 1) * WR_BYTES
    after = peek(last + WR_NEXT)
    poke(last + WR_NEXT, 0)
    error = post_send(peek(queue + QUEUE_QP * WORD), wr, ctl + BAD_WR * WORD)
    poke(last + WR_NEXT, after)
    accepted, hopeless = n, False
    if error != 0:
        accepted = (peek(ctl + BAD_WR * WORD) - wr) // WR_BYTES
        raise_word(word(ctl, COUNTERS) + Kind.WORK_REQUESTS * WORD, accepted - n)
        full = error == ENOMEM and (accepted > 0 or in_flight(queue) > 0)
        hopeless = not full and error != EAGAIN
    raise_word(queue + QUEUE_HEAD * WORD, accepted)
    raise_word(worker + WORKER_OUTSTANDING * WORD, accepted)
    raise_word(peek(queue + QUEUE_CQ * WORD) + CQ_CREDITS * WORD, -accepted)
    poke(queue + QUEUE_LOOSE * WORD, loose_end(queue) if accepted < n else 0)
    return accepted, hopeless


@kernel
def loose_end(queue):
    """After a short post: how many of the last work requests in flight asked for no completion."""
    head, n = peek(queue + QUEUE_HEAD * WORD), np.int64(0)
    while n < in_flight(queue) and peek(entry_at(queue, head - 1 - n)) & SIGNALED == 0:
        n += 1
    return n
