"""A chain: slices become linked work requests, posted by one doorbell.

Work requests are structs that are chained once (`next`); a post writes everything else, cuts the chain at its end, and
calls the provider's post_send by address.
"""

import numpy as np

from mooncache.kernels.account import account
from mooncache.kernels.atomics import i16, i32, i64
from mooncache.kernels.enums import Kind, Opcode, Slice
from mooncache.kernels.jit import kernel
from mooncache.kernels.queue import (
    SEQUENCE_MASK,
    SIGNALED,
    SLICES_SHIFT,
    entry_at,
    in_flight,
)
from mooncache.kernels.records.base import acquire, address, cell_at, index_in, where
from mooncache.kernels.records.queue import cq_at
from mooncache.kernels.records.table import table_at
from mooncache.kernels.records.verbs import send_wr_at, sge_at
from mooncache.kernels.verbs import (
    EAGAIN,
    ENOMEM,
    SEND_INLINE,
    SEND_SIGNALED,
    post_send,
)
from mooncache.kernels.worker import peer_table
from mooncache.limits import CHUNK_SLICES as SLOTS

POSTED = int(Slice.POSTED)


@kernel
def build_chain(ctl, batch, queue, chunk, offset, wrs, slices):
    """Write up to `wrs` work requests for the batch's next slices, from `offset` of `chunk` on, at most `slices`.

    Slices that lie side by side at the target share a work request as far as the queue gathers. A completion is asked
    for every `signal` work requests and at the chain's end. Writes: work requests, gather lists, the queue's
    entries from its head on. Returns (work requests, slices, chunk, offset) as they are afterwards.
    """
    source, target = i64(ctl.slice_source), i64(ctl.slice_target)
    length, state = i32(ctl.slice_length), i16(ctl.slice_state)
    local, remote = i16(ctl.slice_local), i16(ctl.slice_remote)
    next_, used = i64(ctl.chunk_next), i64(ctl.chunk_slices)
    remote_table = peer_table(ctl, batch.peer)
    note_renewals(queue, remote_table)
    lkey = i64(table_at(ctl.local_table).keys + queue.lkeys)
    rkey = i64(remote_table.keys + queue.rkeys)
    opcode = batch.opcode
    tag, head = queue.tag, queue.head
    entries, mask = queue.entries, queue.mask
    signal, gathers = queue.signal, queue.gathers
    inline = queue.inline if opcode == Opcode.WRITE else np.int64(0)
    loose = queue.loose
    wr_rows, sge_rows = ctl.work_requests, ctl.gathers  # a store through one record may change what another holds
    wr, entry, ranges = send_wr_at(wr_rows), cell_at(entries), np.int64(0)
    built, taken, gathered = np.int64(0), np.int64(0), np.int64(0)
    end, there, flags = np.int64(-1), np.int64(-1), np.int64(0)
    while taken < slices:
        first = chunk * SLOTS + offset
        last = first + min(used[chunk] - offset, slices - taken)
        slot = first
        while slot < last:
            bytes_ = np.int64(length[slot])
            if 0 < gathered < gathers and target[slot] == end and remote[slot] == there:
                gathered += 1
                flags &= ~SEND_INLINE
                wr.num_sge = gathered
                wr.send_flags = flags
                entry.value += 1 << SLICES_SHIFT
            else:
                if built == wrs:
                    break
                wr = send_wr_at(wr_rows, built)
                loose += 1
                flags = np.int64(0)
                entry = cell_at(entries, (head + built) & mask)
                if loose == signal:
                    loose, flags = np.int64(0), np.int64(SEND_SIGNALED)
                    entry.value = slot | 1 << SLICES_SHIFT | SIGNALED
                else:
                    entry.value = slot | 1 << SLICES_SHIFT
                if bytes_ <= inline:
                    flags |= SEND_INLINE
                there = np.int64(remote[slot])
                wr.wr_id = tag | ((head + built) & SEQUENCE_MASK)
                wr.sg_list = address(sge_at(sge_rows, ranges))
                wr.num_sge_opcode = opcode << 32 | 1
                wr.send_flags = flags
                wr.remote_addr = target[slot]
                wr.rkey = rkey[there]
                built += 1
                gathered = np.int64(1)
            sge = sge_at(sge_rows, ranges)
            sge.addr = source[slot]
            sge.length_lkey = bytes_ | lkey[local[slot]] << 32
            ranges += 1
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
        wr.send_flags = flags | SEND_SIGNALED
        entry.value |= SIGNALED
    return built, taken, chunk, offset


@kernel
def note_renewals(queue, table):
    """Note, before the peer's keys are read, from which work request on the queue has the present keys."""
    renewals = acquire(table, "renewals")
    if renewals != queue.renewals:
        queue.renewals = renewals
        queue.renewed_from = queue.head


@kernel
def build_note(ctl, queue, slot):
    """Write the work request of a notification, and its entry at the queue's head."""
    sge = sge_at(ctl.gathers)
    sge.addr = i64(ctl.slice_source)[slot]
    sge.length = i32(ctl.slice_length)[slot]
    sge.lkey = 0
    build_plain(queue, ctl.work_requests, Opcode.SEND, ctl.gathers, 1, slot | 1 << SLICES_SHIFT)
    i16(ctl.slice_state)[slot] = POSTED


@kernel
def build_plain(queue, wr, opcode, sge, ranges, entry):
    """Write a work request that no region's key is needed for, and its entry at the queue's head."""
    head = queue.head
    wr = send_wr_at(wr)
    wr.wr_id = queue.tag | (head & SEQUENCE_MASK)
    wr.sg_list = sge
    wr.num_sge = ranges
    wr.opcode = opcode
    wr.send_flags = SEND_SIGNALED
    wr.remote_addr = 0
    wr.rkey = 0
    entry_at(queue, head).value = entry | SIGNALED


@kernel
def ring_doorbell(ctl, worker, queue, n):
    """Post the first `n` prepared work requests as one chain.

    Returns how many the provider accepted, and whether the first refused one can never be accepted: an errno other
    than ENOMEM (the queue is full) and EAGAIN (not now, whatever is in it), or a full queue with nothing in it.
    """
    account(ctl, Kind.WORK_REQUESTS, n)
    account(ctl, Kind.DOORBELLS, 1)
    last = send_wr_at(ctl.work_requests, n - 1)
    after, last.next = last.next, 0
    error = post_send(queue.qp, ctl.work_requests, where(ctl, "bad_wr"))
    last.next = after
    accepted, hopeless = n, False
    if error != 0:
        accepted = index_in(ctl.work_requests, send_wr_at(ctl.bad_wr))
        i64(ctl.counters)[np.int64(Kind.WORK_REQUESTS)] += accepted - n
        full = error == ENOMEM and (accepted > 0 or in_flight(queue) > 0)
        hopeless = not full and error != EAGAIN
    queue.head += accepted
    worker.outstanding += accepted
    cq_at(queue.cq).credits -= accepted
    queue.loose = loose_end(queue) if accepted < n else 0
    return accepted, hopeless


@kernel
def loose_end(queue):
    """Count the last work requests in flight that asked for no completion, after a short post."""
    head, n = queue.head, np.int64(0)
    while n < in_flight(queue) and entry_at(queue, head - 1 - n).value & SIGNALED == 0:
        n += 1
    return n
