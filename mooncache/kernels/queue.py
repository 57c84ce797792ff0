"""A queue pair as its worker keeps it: the entries in flight, the order of completions, and its state.

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
    """Count the work requests without an answer, held ones included."""
    return queue.head - queue.tail


@kernel
def entry_at(queue, sequence):
    """Return the entry of a work request, a CELL."""
    return cell_at(queue.entries, sequence & queue.mask)


@kernel
def room(queue):
    """Return how many more work requests fit into its depth and its completion queue."""
    left = queue.depth - in_flight(queue)
    return min(left, cq_at(queue.cq).credits)


@kernel
def ready(queue):
    """Return whether it may be posted to."""
    return acquire(queue, "state") == QueueState.READY


@kernel
def named_by(worker, wr_id):
    """Return the row of the queue that a work request's id names; missing when it names none."""
    index = wr_id >> INDEX_SHIFT
    if index < 0 or index >= worker.queue_count:
        return queue_at(0)
    queue = queue_at(i64(worker.queues)[index])
    return queue if queue.tag == wr_id & TAG_MASK else queue_at(0)


@kernel
def group_start(queue, tail, sequence):
    """Return the first work request that a completion of `sequence` answers."""
    while sequence > tail and entry_at(queue, sequence - 1).value & (SIGNALED | ANSWERED | HELD) == 0:
        sequence -= 1
    return sequence


@kernel
def mark_answered(queue, first, end):
    """Mark the work requests from `first` up to `end` as answered, before those in front of them."""
    for sequence in range(first, end):
        entry = entry_at(queue, sequence)
        entry.value |= ANSWERED


@kernel
def move_tail(queue, tail):
    """Move the queue's tail to `tail`, up to which all are answered, and over those answered before."""
    head = queue.head
    while tail < head and entry_at(queue, tail).value & ANSWERED != 0:
        tail += 1
    queue.tail = tail


@kernel
def hold(queue, sequence, blamed):
    """Keep a work request that came back from a broken queue until it is decided on; `blamed`: it broke the queue."""
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
    """Post nothing more on a queue with an error. Its owner sees to it that all that is in flight comes back."""
    state = queue.state
    if state == QueueState.READY or state == QueueState.PROBING:
        queue.cause = cause
        worker.undecided += 1
        tell(ctl, worker, queue, QueueState.BROKEN)


@kernel
def has_drained(queue):
    """Return whether all that a broken queue had in flight has come back: it does so in order."""
    head = queue.head
    if queue.state != QueueState.BROKEN:
        return False
    return in_flight(queue) == 0 or entry_at(queue, head - 1).value & (ANSWERED | HELD) != 0


@kernel
def close_queue(ctl, worker, queue):
    """Close a queue of which nothing is in flight or held any more."""
    queue.tail = queue.head
    queue.loose = 0
    worker.undecided -= 1
    tell(ctl, worker, queue, QueueState.CLOSED)


@kernel
def reincarnate(queue):
    """Reset a queue that is connected anew: completions from before name nothing."""
    tag = queue.tag
    queue.tag = (tag & ~(0xFFFF << 32)) | ((tag + INCARNATION) & (0xFFFF << 32))


@kernel
def give_order(worker, queue, order):
    """Leave an order for the worker, in place of one that was not seen yet. Any thread; ring the worker's bell then."""
    if swap(queue, "order", order) == Order.NONE:
        fetch_add(worker, "orders", 1)


@kernel
def take_order(worker, queue):
    """Take the order given to a queue, if any."""
    if acquire(queue, "order") == Order.NONE:
        return np.int64(Order.NONE)
    fetch_add(worker, "orders", -1)
    return swap(queue, "order", Order.NONE)


@kernel
def lost(queue):
    """Return whether its peer is gone."""
    return endpoint_at(queue.endpoint).lost != 0
