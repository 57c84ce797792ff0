"""A queue pair as its worker keeps it: the entries in flight, and the order of completions.

    entries  ...answered... |  a   b   C   d   e   F  |        one word a work request, by sequence number;
                            tail                      head     C and F asked for a completion

Work requests on a queue pair end in order, so a completion answers its own and those just before it that asked for
none. Its id is the queue's tag (index and incarnation) and the sequence number: what comes late, from before the queue
pair was connected anew or for a work request that was answered, names nothing in flight and is only counted.

How a queue pair breaks and is connected anew is in `repair`.
"""

from mooncache.kernels.atomics import i64
from mooncache.kernels.enums import QueueState
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import acquire, cell_at
from mooncache.kernels.records.queue import cq_at, queue_at

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
