"""Posting: which batch's slices go next, and on which queue pair; and markers."""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import account
from mooncache.kernels.atomics import i16, i64
from mooncache.kernels.batch import append, remove, slot_of
from mooncache.kernels.chain import build_chain, build_note, build_plain, ring_doorbell
from mooncache.kernels.enums import Kind, Note, Opcode, QueueState, Slice
from mooncache.kernels.handle import SLOT_MASK, batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.look import region_refused
from mooncache.kernels.queue import (
    ANSWERED,
    HELD,
    SLICES_MASK,
    SLICES_SHIFT,
    entry_at,
    in_flight,
    mark_answered,
    ready,
    room,
)
from mooncache.kernels.records.base import acquire, cell_at, missing, release
from mooncache.kernels.records.batch import NEXT
from mooncache.kernels.records.queue import queue_at
from mooncache.kernels.repair import break_queue, look_drained
from mooncache.kernels.retry import answer_entry, keep_refused, may_keep, resume
from mooncache.kernels.settle import doubt, fail_slice, settle
from mooncache.kernels.spread import choose
from mooncache.kernels.verbs import (
    WcStatus,
)
from mooncache.kernels.worker import cut_off, endpoint_row, peer_table
from mooncache.limits import CHUNK_BITS
from mooncache.limits import CHUNK_SLICES as SLOTS

WAITING = int(Slice.WAITING)


@kernel
def post_marker(ctl, worker, queue):
    """Post an empty write that asks for a completion: for those before it, or to see if it gets through."""
    build_plain(queue, ctl.work_requests, Opcode.WRITE, 0, 0, 0)
    accepted, refused = ring_doorbell(ctl, worker, queue, np.int64(1))
    if refused and queue.breaks != 0:
        break_queue(ctl, worker, queue, WcStatus.LOC_QP_OP_ERR)
        look_drained(ctl, worker, queue)
    return accepted


@kernel
def owes_marker(queue):
    """Return whether a queue's last work requests asked for no completion, or it is connected anew."""
    if ready(queue):
        return queue.loose > 0
    return queue.state == QueueState.PROBING and in_flight(queue) == 0


@kernel
def post_markers(ctl, worker):
    """Post a marker on every queue that owes one and has room; the others owe it on. Return how many."""
    queues, posted = i64(worker.queues), np.int64(0)
    worker.owes = 0
    for i in range(acquire(worker, "queue_count")):
        if owes_marker(queue_at(queues[i])) and room(queue_at(queues[i])) > 0:
            posted += post_marker(ctl, worker, queue_at(queues[i]))
        if owes_marker(queue_at(queues[i])):
            worker.owes = 1
    return posted


@kernel
def pass_over(ctl, batch, n, now):
    """Move the batch's cursor over its next `n` slices, whose state becomes `now`."""
    state, next_, used = i16(ctl.slice_state), i64(ctl.chunk_next), i64(ctl.chunk_slices)
    chunk, offset = batch.cursor, batch.offset
    for _ in range(n):
        state[chunk * SLOTS + offset] = now
        offset += 1
        if offset == used[chunk]:
            chunk, offset = next_[chunk], np.int64(0)
    batch.cursor = chunk
    batch.offset = offset
    batch.unposted -= n


@kernel
def answer_unposted(ctl, batch, n, status):
    """Fail the next `n` slices at the batch's cursor with `status`, unposted."""
    pass_over(ctl, batch, n, status)
    batch.failed += n
    batch.remaining -= n
    account(ctl, Kind.FAILED, n)


@kernel
def post_chain(ctl, worker, batch, queue, n):
    """Build and post a chain of up to `n` work requests of the batch; return slices that left its queue, for good."""
    left = batch.unposted
    chunk, offset = batch.cursor, batch.offset
    built, taken, chunk, offset = build_chain(ctl, batch, queue, chunk, offset, n, left)
    accepted, refused = ring_doorbell(ctl, worker, queue, built)
    if accepted == built:
        batch.cursor = chunk
        batch.offset = offset
        batch.unposted -= taken
        batch.posted += taken
        return taken
    posted = retreat(ctl, batch, slices_of_last(queue, accepted), taken)
    if refused:
        answer_unposted(ctl, batch, 1, Status.LOCAL_ERROR)
        return posted + 1
    return posted


@kernel
def slices_of_last(queue, n):
    """Count the slices of the last `n` work requests in flight."""
    head, slices = queue.head, np.int64(0)
    for sequence in range(head - n, head):
        slices += (entry_at(queue, sequence).value >> SLICES_SHIFT) & SLICES_MASK
    return slices


@kernel
def retreat(ctl, batch, posted, built):
    """After a short post: move the cursor over the posted slices only, and call the others waiting again."""
    state, next_, used = i16(ctl.slice_state), i64(ctl.chunk_next), i64(ctl.chunk_slices)
    chunk, offset = batch.cursor, batch.offset
    for i in range(built):
        if i == posted:
            batch.cursor = chunk
            batch.offset = offset
        if i >= posted:
            state[chunk * SLOTS + offset] = WAITING
        offset += 1
        if offset == used[chunk]:
            chunk, offset = next_[chunk], np.int64(0)
    batch.unposted -= posted
    batch.posted += posted
    return posted


# ------------------------------------------------------------------------------ the endpoint's queue of batches
@kernel
def enqueue(ctl, worker, endpoint, batch):
    """Append a batch to the endpoint's queue of those with slices to post."""
    append(ctl, endpoint.to_post, NEXT, batch)
    worker.queued += 1


@kernel
def dequeue(ctl, worker, endpoint, batch):
    """Take a batch out of the endpoint's queue, wherever in it."""
    remove(ctl, endpoint.to_post, NEXT, batch)
    worker.queued -= 1


@kernel
def refuse_unposted(ctl, worker, batch):
    """Keep or answer the next slices of a batch as far as the peer is known to refuse their region; return how many."""
    table = peer_table(ctl, batch.peer)
    n = np.int64(0)
    while table.refusals != 0 and batch.unposted > 0:
        slot = batch.cursor * SLOTS + batch.offset
        if not region_refused(ctl, slot):
            break
        if may_keep(ctl, slot):
            pass_over(ctl, batch, 1, WAITING)
            keep_refused(ctl, worker, batch, slot)
        else:
            answer_unposted(ctl, batch, 1, Status.REMOTE_ACCESS)
        n += 1
    return n


@kernel
def post_batches(ctl, worker, index, endpoint):
    """Post chains from the endpoint's queue of batches while queue pairs have room; return slices that left it.

    A chain is posted when it is complete, so that doorbells stay rare.
    """
    moved = np.int64(0)
    while endpoint.to_post.first >= 0:
        batch = batch_row(ctl, endpoint.to_post.first)
        if cut_off(ctl, endpoint, batch):
            moved += batch.unposted
            stop_posting(ctl, worker, index, batch, Status.PEER_GONE)
            continue
        moved += refuse_unposted(ctl, worker, batch)
        n = min(ctl.chain, batch.unposted)
        if n == 0:
            dequeue(ctl, worker, endpoint, batch)
            settle(ctl, batch)
            continue
        queue = choose(endpoint, n)
        if missing(queue):
            return moved
        posted = post_chain(ctl, worker, batch, queue, min(n, room(queue)))
        moved += posted
        if queue.loose > 0:
            worker.owes = 1
        if batch.unposted == 0:
            dequeue(ctl, worker, endpoint, batch)
            settle(ctl, batch)
        if posted == 0:
            return moved
    return moved


# ------------------------------------------------------------------------------ notifications
@kernel
def post_note(ctl, worker, index, endpoint):
    """Post or answer the endpoint's next notification, if it waits for nothing else; return how many."""
    first_one, queue = endpoint.to_notify.first, queue_at(endpoint.notes)
    if first_one < 0:
        return np.int64(0)
    batch = batch_row(ctl, first_one)
    if batch.note_state != Note.TURN:
        return np.int64(0)
    if cut_off(ctl, endpoint, batch):
        stop_posting(ctl, worker, index, batch, Status.PEER_GONE)
        return np.int64(1)
    if not ready(queue) or room(queue) < 1:
        return np.int64(0)
    slot = batch.note
    build_note(ctl, queue, slot)
    accepted, refused = ring_doorbell(ctl, worker, queue, np.int64(1))
    if accepted == 0 and not refused:
        i16(ctl.slice_state)[slot] = WAITING
        return np.int64(0)
    batch.note_state = Note.ANSWER
    if refused:
        fail_slice(ctl, batch, slot, Status.LOCAL_ERROR)
        settle(ctl, batch)
    else:
        batch.posted += 1
    return np.int64(1)


# ------------------------------------------------------------------------------ batches that stop early
@kernel
def stop_posting(ctl, worker, index, batch, status):
    """Answer all unposted slices of a queued batch with `status` and take it out of the queue."""
    left = batch.unposted
    batch.cancelled = status
    if left > 0:
        dequeue(ctl, worker, endpoint_row(ctl, index, batch.peer), batch)
        answer_unposted(ctl, batch, left, status)
    resume(ctl, worker)  # some that are kept may be this batch's
    if left > 0 or (batch.note >= 0 and batch.note_state != Note.ANSWER):
        settle(ctl, batch)


@kernel
def take_back(ctl, worker, queue, batch):
    """Answer a queue's held slices of a batch; if more is in flight, let the queue end that, and all else on it."""
    owner, carries = i64(ctl.chunk_batch), False
    for sequence in range(queue.tail, queue.head):
        entry = entry_at(queue, sequence).value
        if entry & ANSWERED != 0 or (entry >> SLICES_SHIFT) & SLICES_MASK == 0:
            continue
        if owner[(entry & SLOT_MASK) >> CHUNK_BITS] != slot_of(ctl, batch):
            continue
        if entry & HELD != 0:
            doubt(ctl, batch)
            answer_entry(ctl, worker, entry, np.int64(WcStatus.WR_FLUSH_ERR), False)
            mark_answered(queue, sequence, sequence + 1)
        else:
            carries = True
    if not carries:
        return
    if queue.breaks != 0:
        break_queue(ctl, worker, queue, WcStatus.WR_FLUSH_ERR)
        look_drained(ctl, worker, queue)
    elif queue.cut != 0:
        release(cell_at(queue.cut), "value", 1)


@kernel
def take_posted_back(ctl, worker, index, batch):
    """Take back a batch's work requests from every queue that has some in flight."""
    endpoint = endpoint_row(ctl, index, batch.peer)
    queues = i64(endpoint.queues)
    for i in range(endpoint.count):
        take_back(ctl, worker, queue_at(queues[i]), batch)
    take_back(ctl, worker, queue_at(endpoint.notes), batch)
