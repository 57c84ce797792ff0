"""A queue pair as its worker sees it: what is in flight on it, what a completion answers, and its life.

    entries  ...answered... |  a   b   C   d   e   F  |        one word a work request, by sequence number;
                            tail                      head     C and F asked for a completion

Work requests on a queue pair end in order, so a completion answers its own and those just before it that asked for
none. Its id is the queue's tag (index and incarnation) and the sequence number: what comes late, from before the queue
pair was connected anew or for a work request that was answered, names nothing in flight and is only counted.

    READY --an error--> BROKEN --all flushed--> DRAINED --order: post it all again--------------> CLOSED
      ^                   ^                        \\--order: the peer is gone, all of it fails----/ |
      |                   +--it did not--\\                                                          |
      +--an empty write got through-- PROBING <------------order: it is connected anew--------------+

What came back from a broken queue is held, not posted again at once: until the peer has closed its end, a packet of
it might still arrive, over bytes that by then belong to somebody else. Who owns the connection sees to that, and gives
the order.
"""

import numpy as np

from mooncache.kernels.atomics import i64
from mooncache.kernels.enums import Order, QueueState
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import acquire, cell_at, fetch_add, release, swap
from mooncache.kernels.records.endpoint import endpoint_at
from mooncache.kernels.records.queue import cq_at, queue_at
from mooncache.kernels.worker import write_one

SEQUENCE_MASK = (1 << 32) - 1
INCARNATION = 1 << 32  # the tag's next one
TAG_MASK = (1 << 63) - 1 - SEQUENCE_MASK
INDEX_SHIFT = 48
# An entry: slot of its first slice | number of slices << 32 | flags
SLICES_SHIFT, SLICES_MASK = 32, 0xFF
SIGNALED, ANSWERED, HELD, BLAMED = 1 << 40, 1 << 41, 1 << 42, 1 << 43


@kernel
def in_flight(queue):
    """Work requests without an answer, held ones included."""
    return queue.head - queue.tail


@kernel
def entry_at(queue, sequence):
    """The entry of a work request, a CELL."""
    return cell_at(queue.entries, sequence & queue.mask)


@kernel
def room(queue):
    """How many more work requests its depth and its completion queue have room for."""
    left = queue.depth - in_flight(queue)
    return min(left, cq_at(queue.cq).credits)


@kernel
def ready(queue):
    """Whether it may be posted to."""
    return acquire(queue, "state") == QueueState.READY


@kernel
def named_by(worker, wr_id):
    """The row of the queue that a work request's id names; missing when it names none."""
    index = wr_id >> INDEX_SHIFT
    if index < 0 or index >= worker.queue_count:
        return queue_at(0)
    queue = queue_at(i64(worker.queues)[index])
    return queue if queue.tag == wr_id & TAG_MASK else queue_at(0)


@kernel
def group_start(queue, tail, sequence):
    """The first work request that a completion of `sequence` answers."""
    while sequence > tail and entry_at(queue, sequence - 1).value & (SIGNALED | ANSWERED | HELD) == 0:
        sequence -= 1
    return sequence


@kernel
def mark_answered(queue, first, end):
    """The work requests from `first` up to `end` are answered before those in front of them."""
    for sequence in range(first, end):
        entry = entry_at(queue, sequence)
        entry.value |= ANSWERED


@kernel
def move_tail(queue, tail):
    """All work requests up to `tail` are answered: move the queue's tail there, and over those that were before."""
    head = queue.head
    while tail < head and entry_at(queue, tail).value & ANSWERED != 0:
        tail += 1
    queue.tail = tail


@kernel
def hold(queue, sequence, blamed):
    """Keep what came back from a broken queue until it is decided what becomes of it; `blamed`: it broke the queue."""
    entry = entry_at(queue, sequence)
    entry.value |= HELD | BLAMED if blamed else HELD


# ------------------------------------------------------------------------------ its life
@kernel
def tell(ctl, worker, queue, state):
    """Change the queue's state and let its owner know."""
    release(queue, "state", state)
    descriptor = worker.trouble_fd
    if descriptor >= 0:
        write_one(ctl, descriptor)


@kernel
def break_queue(ctl, worker, queue, cause):
    """An error came: post nothing more. Its owner sees to it that all that is in flight comes back."""
    state = queue.state
    if state == QueueState.READY or state == QueueState.PROBING:
        queue.cause = cause
        worker.undecided += 1
        tell(ctl, worker, queue, QueueState.BROKEN)


@kernel
def has_drained(queue):
    """Whether all that a broken queue had in flight has come back: it does so in order."""
    head = queue.head
    if queue.state != QueueState.BROKEN:
        return False
    return in_flight(queue) == 0 or entry_at(queue, head - 1).value & (ANSWERED | HELD) != 0


@kernel
def close_queue(ctl, worker, queue):
    """Nothing of it is in flight or held any more."""
    queue.tail = queue.head
    queue.loose = 0
    worker.undecided -= 1
    tell(ctl, worker, queue, QueueState.CLOSED)


@kernel
def reincarnate(queue):
    """It is connected anew: what still comes from before names nothing."""
    tag = queue.tag
    queue.tag = (tag & ~(0xFFFF << 32)) | ((tag + INCARNATION) & (0xFFFF << 32))


@kernel
def give_order(worker, queue, order):
    """Leave an order for the worker, in place of one that was not seen yet. Any thread; ring the worker's bell then."""
    if swap(queue, "order", order) == Order.NONE:
        fetch_add(worker, "orders", 1)


@kernel
def take_order(worker, queue):
    """The order given to a queue, if any."""
    if acquire(queue, "order") == Order.NONE:
        return np.int64(Order.NONE)
    fetch_add(worker, "orders", -1)
    return swap(queue, "order", Order.NONE)


@kernel
def lost(queue):
    """Whether its peer is gone."""
    return endpoint_at(queue.endpoint).lost != 0
