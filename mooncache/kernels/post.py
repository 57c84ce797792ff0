"""Which batch and which slices are posted next, on which queue pair; those that are to be posted again; and markers."""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import account, raise_word, word
from mooncache.kernels.atomics import i16, i32, i64, load, peek, poke, store
from mooncache.kernels.batch import append, remove
from mooncache.kernels.chain import build_chain, build_note, build_plain, ring_doorbell
from mooncache.kernels.complete import (
    answer_entry,
    doubt,
    fail_slice,
    look_drained,
    post_later,
    region_refused,
    settle,
)
from mooncache.kernels.handle import SLOT_MASK, batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_CANCELLED,
    BATCH_CURSOR,
    BATCH_EPOCH,
    BATCH_FAILED,
    BATCH_NEXT,
    BATCH_NOTE,
    BATCH_NOTE_STATE,
    BATCH_OFFSET,
    BATCH_PEER,
    BATCH_POSTED,
    BATCH_REMAINING,
    BATCH_UNPOSTED,
    CHAIN,
    CHUNK_BATCH,
    CHUNK_NEXT,
    CHUNK_SLICES,
    ENDPOINT_COUNT,
    ENDPOINT_FIRST,
    ENDPOINT_LOST,
    ENDPOINT_NOTE_FIRST,
    ENDPOINT_NOTES,
    ENDPOINT_QUEUES,
    PEER_TABLES,
    QUEUE_BREAKS,
    QUEUE_CUT,
    QUEUE_HEAD,
    QUEUE_LOOSE,
    QUEUE_STATE,
    QUEUE_TAIL,
    SLICE_NEXT,
    SLICE_STATE,
    TABLE_EPOCH,
    TABLE_REFUSALS,
    WORD,
    WORK_REQUESTS,
    WORKER_OWES,
    WORKER_QUEUE_COUNT,
    WORKER_QUEUED,
    WORKER_QUEUES,
    WORKER_RETRY_FIRST,
    Kind,
    Note,
    Opcode,
    QueueState,
    Slice,
)
from mooncache.kernels.look import in_vain, keep, keep_refused, look_is_due, may_keep, resume
from mooncache.kernels.queue import (
    ANSWERED,
    HELD,
    SLICES_MASK,
    SLICES_SHIFT,
    break_queue,
    entry_at,
    in_flight,
    mark_answered,
    ready,
    room,
)
from mooncache.kernels.spread import NOBODY, choose
from mooncache.kernels.verbs import (
    WcStatus,
)
from mooncache.kernels.worker import endpoint_row
from mooncache.limits import CHUNK_BITS
from mooncache.limits import CHUNK_SLICES as SLOTS

WAITING = int(Slice.WAITING)


@kernel
def post_marker(ctl, worker, queue):
    """Post an empty write that asks for a completion: for those before that did not, or to see if it gets through."""
    build_plain(queue, word(ctl, WORK_REQUESTS), Opcode.WRITE, 0, 0, 0)
    accepted, refused = ring_doorbell(ctl, worker, queue, np.int64(1))
    if refused and peek(queue + QUEUE_BREAKS * WORD) != 0:
        break_queue(ctl, worker, queue, WcStatus.LOC_QP_OP_ERR)
        look_drained(ctl, worker, queue)
    return accepted


@kernel
def owes_marker(queue):
    """Whether its last work requests asked for no completion, after a short post, or it is connected anew."""
    if ready(queue):
        return peek(queue + QUEUE_LOOSE * WORD) > 0
    return peek(queue + QUEUE_STATE * WORD) == QueueState.PROBING and in_flight(queue) == 0


@kernel
def post_markers(ctl, worker):
    """Post a marker on every queue that owes one and has room; the others owe it on. Returns how many."""
    queues, posted = i64(peek(worker + WORKER_QUEUES * WORD)), np.int64(0)
    poke(worker + WORKER_OWES * WORD, 0)
    for i in range(load(worker + WORKER_QUEUE_COUNT * WORD)):
        if owes_marker(queues[i]) and room(queues[i]) > 0:
            posted += post_marker(ctl, worker, queues[i])
        if owes_marker(queues[i]):
            poke(worker + WORKER_OWES * WORD, 1)
    return posted


@kernel
def pass_over(ctl, row, n, now):
    """Move the batch's cursor over its next `n` slices, whose state becomes `now`."""
    state, next_, used = i16(word(ctl, SLICE_STATE)), i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES))
    chunk, offset = peek(row + BATCH_CURSOR * WORD), peek(row + BATCH_OFFSET * WORD)
    for _ in range(n):
        state[chunk * SLOTS + offset] = now
        offset += 1
        if offset == used[chunk]:
            chunk, offset = next_[chunk], np.int64(0)
    poke(row + BATCH_CURSOR * WORD, chunk)
    poke(row + BATCH_OFFSET * WORD, offset)
    raise_word(row + BATCH_UNPOSTED * WORD, -n)


@kernel
def answer_unposted(ctl, row, n, status):
    """Let the next `n` slices at the batch's cursor fail with `status`, unposted."""
    pass_over(ctl, row, n, status)
    raise_word(row + BATCH_FAILED * WORD, n)
    raise_word(row + BATCH_REMAINING * WORD, -n)
    account(ctl, Kind.FAILED, n)


@kernel
def post_chain(ctl, worker, row, queue, n):
    """Build and post a chain of up to `n` work requests of the batch; returns slices that left its queue, for good."""
    left = peek(row + BATCH_UNPOSTED * WORD)
    chunk, offset = peek(row + BATCH_CURSOR * WORD), peek(row + BATCH_OFFSET * WORD)
    built, taken, chunk, offset = build_chain(ctl, row, queue, chunk, offset, n, left)
    accepted, refused = ring_doorbell(ctl, worker, queue, built)
    if accepted == built:
        poke(row + BATCH_CURSOR * WORD, chunk)
        poke(row + BATCH_OFFSET * WORD, offset)
        raise_word(row + BATCH_UNPOSTED * WORD, -taken)
        raise_word(row + BATCH_POSTED * WORD, taken)
        return taken
    posted = retreat(ctl, row, slices_of_last(queue, accepted), taken)
    if refused:
        answer_unposted(ctl, row, 1, Status.LOCAL_ERROR)
        return posted + 1
    return posted


@kernel
def slices_of_last(queue, n):
    """Slices of the last `n` work requests in flight."""
    head, slices = peek(queue + QUEUE_HEAD * WORD), np.int64(0)
    for sequence in range(head - n, head):
        slices += (peek(entry_at(queue, sequence)) >> SLICES_SHIFT) & SLICES_MASK
    return slices


@kernel
def retreat(ctl, row, posted, built):
    """After a short post: move the cursor over the posted slices only, and call the others waiting again."""
    state, next_, used = i16(word(ctl, SLICE_STATE)), i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES))
    chunk, offset = peek(row + BATCH_CURSOR * WORD), peek(row + BATCH_OFFSET * WORD)
    for i in range(built):
        if i == posted:
            poke(row + BATCH_CURSOR * WORD, chunk)
            poke(row + BATCH_OFFSET * WORD, offset)
        if i >= posted:
            state[chunk * SLOTS + offset] = WAITING
        offset += 1
        if offset == used[chunk]:
            chunk, offset = next_[chunk], np.int64(0)
    raise_word(row + BATCH_UNPOSTED * WORD, -posted)
    raise_word(row + BATCH_POSTED * WORD, posted)
    return posted


# ------------------------------------------------------------------------------ the endpoint's queue of batches
@kernel
def enqueue(ctl, worker, endpoint, row):
    """Append a batch to the endpoint's queue of those with slices to post."""
    append(ctl, endpoint + ENDPOINT_FIRST * WORD, BATCH_NEXT, row)
    raise_word(worker + WORKER_QUEUED * WORD, 1)


@kernel
def dequeue(ctl, worker, endpoint, row):
    """Take a batch out of the endpoint's queue, wherever in it."""
    remove(ctl, endpoint + ENDPOINT_FIRST * WORD, BATCH_NEXT, row)
    raise_word(worker + WORKER_QUEUED * WORD, -1)


@kernel
def refuse_unposted(ctl, worker, row):
    """Keep or answer the next slices of a batch as far as the peer is known to refuse their region; how many."""
    table = i64(word(ctl, PEER_TABLES))[peek(row + BATCH_PEER * WORD)]
    n = np.int64(0)
    while peek(table + TABLE_REFUSALS * WORD) != 0 and peek(row + BATCH_UNPOSTED * WORD) > 0:
        slot = peek(row + BATCH_CURSOR * WORD) * SLOTS + peek(row + BATCH_OFFSET * WORD)
        if not region_refused(ctl, slot):
            break
        if may_keep(ctl, slot):
            pass_over(ctl, row, 1, WAITING)
            keep_refused(ctl, worker, row, slot)
        else:
            answer_unposted(ctl, row, 1, Status.REMOTE_ACCESS)
        n += 1
    return n


@kernel
def post_batches(ctl, worker, index, endpoint):
    """Post chains from the endpoint's queue of batches while its queue pairs have room; returns slices that left it.

    A chain is posted when it is complete, so that doorbells stay rare.
    """
    moved = np.int64(0)
    while peek(endpoint + ENDPOINT_FIRST * WORD) >= 0:
        row = batch_row(ctl, peek(endpoint + ENDPOINT_FIRST * WORD))
        if cut_off(ctl, endpoint, row):
            moved += peek(row + BATCH_UNPOSTED * WORD)
            stop_posting(ctl, worker, index, row, Status.PEER_GONE)
            continue
        moved += refuse_unposted(ctl, worker, row)
        n = min(word(ctl, CHAIN), peek(row + BATCH_UNPOSTED * WORD))
        if n == 0:
            dequeue(ctl, worker, endpoint, row)
            settle(ctl, row)
            continue
        queue = choose(endpoint, n)
        if queue == NOBODY:
            return moved
        posted = post_chain(ctl, worker, row, queue, min(n, room(queue)))
        moved += posted
        if peek(queue + QUEUE_LOOSE * WORD) > 0:
            poke(worker + WORKER_OWES * WORD, 1)
        if peek(row + BATCH_UNPOSTED * WORD) == 0:
            dequeue(ctl, worker, endpoint, row)
            settle(ctl, row)
        if posted == 0:
            return moved
    return moved


# ------------------------------------------------------------------------------ notifications
@kernel
def post_note(ctl, worker, index, endpoint):
    """Post or answer the notification whose turn it is at this endpoint, if it waits for nothing else; how many."""
    first_one, queue = peek(endpoint + ENDPOINT_NOTE_FIRST * WORD), peek(endpoint + ENDPOINT_NOTES * WORD)
    if first_one < 0:
        return np.int64(0)
    row = batch_row(ctl, first_one)
    if peek(row + BATCH_NOTE_STATE * WORD) != Note.TURN:
        return np.int64(0)
    if cut_off(ctl, endpoint, row):
        stop_posting(ctl, worker, index, row, Status.PEER_GONE)
        return np.int64(1)
    if not ready(queue) or room(queue) < 1:
        return np.int64(0)
    slot = peek(row + BATCH_NOTE * WORD)
    build_note(ctl, queue, slot, word(ctl, WORK_REQUESTS))
    accepted, refused = ring_doorbell(ctl, worker, queue, np.int64(1))
    if accepted == 0 and not refused:
        i16(word(ctl, SLICE_STATE))[slot] = WAITING
        return np.int64(0)
    poke(row + BATCH_NOTE_STATE * WORD, Note.ANSWER)
    if refused:
        fail_slice(ctl, row, slot, Status.LOCAL_ERROR)
        settle(ctl, row)
    else:
        raise_word(row + BATCH_POSTED * WORD, 1)
    return np.int64(1)


# ------------------------------------------------------------------------------ slices posted again
@kernel
def post_retries(ctl, worker, index):
    """Look once at every slice that is to be posted again; returns how many were, or failed. The others wait on."""
    next_, owner = i32(word(ctl, SLICE_NEXT)), i64(word(ctl, CHUNK_BATCH))
    slot, moved = peek(worker + WORKER_RETRY_FIRST * WORD), np.int64(0)
    poke(worker + WORKER_RETRY_FIRST * WORD, -1)
    while slot >= 0:
        after = np.int64(next_[slot])
        row = batch_row(ctl, owner[slot // SLOTS])
        endpoint = endpoint_row(ctl, index, peek(row + BATCH_PEER * WORD))
        status = peek(row + BATCH_CANCELLED * WORD)
        if status == 0 and cut_off(ctl, endpoint, row):
            status = np.int64(Status.PEER_GONE)
        due = status == 0 and look_is_due(ctl, row, slot)
        if status == 0 and not due and (in_vain(ctl, row, slot) or region_refused(ctl, slot)):
            status = np.int64(Status.REMOTE_ACCESS)
        if due:
            keep(ctl, worker, slot)
        elif status == 0 and not due and post_again(ctl, worker, row, endpoint, slot):
            moved += 1
        elif status == 0:
            post_later(ctl, worker, slot)
        else:
            fail_slice(ctl, row, slot, status)
            settle(ctl, row)
            moved += 1
        slot = after
    return moved


@kernel
def post_again(ctl, worker, row, endpoint, slot):
    """Post one slice on its own; False when no queue takes it now."""
    if slot == peek(row + BATCH_NOTE * WORD):
        queue = peek(endpoint + ENDPOINT_NOTES * WORD)
        if not ready(queue) or room(queue) < 1:
            return False
        build_note(ctl, queue, slot, word(ctl, WORK_REQUESTS))
    else:
        queue = choose(endpoint, np.int64(1))
        if queue == NOBODY:
            return False
        build_chain(ctl, row, queue, slot // SLOTS, slot % SLOTS, 1, 1)
    accepted, refused = ring_doorbell(ctl, worker, queue, np.int64(1))
    raise_word(row + BATCH_POSTED * WORD, accepted)
    if refused:
        fail_slice(ctl, row, slot, Status.LOCAL_ERROR)
        settle(ctl, row)
    elif accepted == 0:
        i16(word(ctl, SLICE_STATE))[slot] = WAITING
    return accepted == 1 or refused


# ------------------------------------------------------------------------------ batches that stop early
@kernel
def stop_posting(ctl, worker, index, row, status):
    """Answer all unposted slices of a queued batch with `status` and take it out of the queue."""
    left = peek(row + BATCH_UNPOSTED * WORD)
    poke(row + BATCH_CANCELLED * WORD, status)
    if left > 0:
        dequeue(ctl, worker, endpoint_row(ctl, index, peek(row + BATCH_PEER * WORD)), row)
        answer_unposted(ctl, row, left, status)
    resume(ctl, worker)  # some that are kept may be this batch's
    if left > 0 or (peek(row + BATCH_NOTE * WORD) >= 0 and peek(row + BATCH_NOTE_STATE * WORD) != Note.ANSWER):
        settle(ctl, row)


@kernel
def cut_off(ctl, endpoint, row):
    """Whether nothing of a batch may be posted any more: its peer is gone, or a connection to it ended meanwhile.

    What was submitted before a peer's fence ended the connections must not land over those that came after.
    """
    table = i64(word(ctl, PEER_TABLES))[peek(row + BATCH_PEER * WORD)]
    ended = load(table + TABLE_EPOCH * WORD) != peek(row + BATCH_EPOCH * WORD)
    return ended or peek(endpoint + ENDPOINT_LOST * WORD) != 0


@kernel
def take_back(ctl, worker, queue, row):
    """Answer what a queue holds of a batch; if it has more in flight, let it end that, and whatever else is on it."""
    owner, carries = i64(word(ctl, CHUNK_BATCH)), False
    for sequence in range(peek(queue + QUEUE_TAIL * WORD), peek(queue + QUEUE_HEAD * WORD)):
        entry = peek(entry_at(queue, sequence))
        if entry & ANSWERED != 0 or (entry >> SLICES_SHIFT) & SLICES_MASK == 0:
            continue
        if batch_row(ctl, owner[(entry & SLOT_MASK) >> CHUNK_BITS]) != row:
            continue
        if entry & HELD != 0:
            doubt(ctl, row)
            answer_entry(ctl, worker, entry, np.int64(WcStatus.WR_FLUSH_ERR), False)
            mark_answered(queue, sequence, sequence + 1)
        else:
            carries = True
    if not carries:
        return
    if peek(queue + QUEUE_BREAKS * WORD) != 0:
        break_queue(ctl, worker, queue, WcStatus.WR_FLUSH_ERR)
        look_drained(ctl, worker, queue)
    elif peek(queue + QUEUE_CUT * WORD) != 0:
        store(peek(queue + QUEUE_CUT * WORD), 1)


@kernel
def take_posted_back(ctl, worker, index, row):
    """Let every queue that has work requests of a batch in flight end them."""
    endpoint = endpoint_row(ctl, index, peek(row + BATCH_PEER * WORD))
    queues = i64(peek(endpoint + ENDPOINT_QUEUES * WORD))
    for i in range(peek(endpoint + ENDPOINT_COUNT * WORD)):
        take_back(ctl, worker, queues[i], row)
    take_back(ctl, worker, peek(endpoint + ENDPOINT_NOTES * WORD), row)
