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

from mooncache.kernels.account import raise_word, word
from mooncache.kernels.atomics import add, call_write, exchange, i64, load, peek, poke, store
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    CQ_CREDITS,
    ENDPOINT_LOST,
    QUEUE_CAUSE,
    QUEUE_CQ,
    QUEUE_DEPTH,
    QUEUE_ENDPOINT,
    QUEUE_ENTRIES,
    QUEUE_HEAD,
    QUEUE_LOOSE,
    QUEUE_MASK,
    QUEUE_ORDER,
    QUEUE_STATE,
    QUEUE_TAG,
    QUEUE_TAIL,
    SLEEPING,
    WORD,
    WORKER_ORDERS,
    WORKER_QUEUE_COUNT,
    WORKER_QUEUES,
    WORKER_TROUBLE_FD,
    WORKER_UNDECIDED,
    WRITE,
    Order,
    QueueState,
)

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
    return peek(queue + QUEUE_HEAD * WORD) - peek(queue + QUEUE_TAIL * WORD)


@kernel
def entry_at(queue, sequence):
    """Address of the entry of a work request."""
    return peek(queue + QUEUE_ENTRIES * WORD) + (sequence & peek(queue + QUEUE_MASK * WORD)) * WORD


@kernel
def room(queue):
    """How many more work requests its depth and its completion queue have room for."""
    left = peek(queue + QUEUE_DEPTH * WORD) - in_flight(queue)
    return min(left, peek(peek(queue + QUEUE_CQ * WORD) + CQ_CREDITS * WORD))


@kernel
def ready(queue):
    """Whether it may be posted to."""
    return load(queue + QUEUE_STATE * WORD) == QueueState.READY


@kernel
def named_by(worker, wr_id):
    """The queue row that a work request's id names, or 0."""
    index = wr_id >> INDEX_SHIFT
    if index < 0 or index >= peek(worker + WORKER_QUEUE_COUNT * WORD):
        return np.int64(0)
    queue = i64(peek(worker + WORKER_QUEUES * WORD))[index]
    return queue if peek(queue + QUEUE_TAG * WORD) == wr_id & TAG_MASK else np.int64(0)


@kernel
def group_start(queue, tail, sequence):
    """The first work request that a completion of `sequence` answers."""
    while sequence > tail and peek(entry_at(queue, sequence - 1)) & (SIGNALED | ANSWERED | HELD) == 0:
        sequence -= 1
    return sequence


@kernel
def mark_answered(queue, first, end):
    """The work requests from `first` up to `end` are answered before those in front of them."""
    for sequence in range(first, end):
        entry = entry_at(queue, sequence)
        poke(entry, peek(entry) | ANSWERED)


@kernel
def move_tail(queue, tail):
    """All work requests up to `tail` are answered: move the queue's tail there, and over those that were before."""
    head = peek(queue + QUEUE_HEAD * WORD)
    while tail < head and peek(entry_at(queue, tail)) & ANSWERED != 0:
        tail += 1
    poke(queue + QUEUE_TAIL * WORD, tail)


@kernel
def hold(queue, sequence, blamed):
    """Keep what came back from a broken queue until it is decided what becomes of it; `blamed`: it broke the queue."""
    entry = entry_at(queue, sequence)
    poke(entry, peek(entry) | (HELD | BLAMED if blamed else HELD))


# ------------------------------------------------------------------------------ its life
@kernel
def tell(ctl, worker, queue, state):
    """Change the queue's state and let its owner know."""
    store(queue + QUEUE_STATE * WORD, state)
    descriptor = peek(worker + WORKER_TROUBLE_FD * WORD)
    if descriptor >= 0:
        poke(ctl + SLEEPING * WORD, 1)
        call_write(word(ctl, WRITE), descriptor, ctl + SLEEPING * WORD, WORD)


@kernel
def break_queue(ctl, worker, queue, cause):
    """An error came: post nothing more. Its owner sees to it that all that is in flight comes back."""
    state = peek(queue + QUEUE_STATE * WORD)
    if state == QueueState.READY or state == QueueState.PROBING:
        poke(queue + QUEUE_CAUSE * WORD, cause)
        raise_word(worker + WORKER_UNDECIDED * WORD, 1)
        tell(ctl, worker, queue, QueueState.BROKEN)


@kernel
def has_drained(queue):
    """Whether all that a broken queue had in flight has come back: it does so in order."""
    head = peek(queue + QUEUE_HEAD * WORD)
    if peek(queue + QUEUE_STATE * WORD) != QueueState.BROKEN:
        return False
    return in_flight(queue) == 0 or peek(entry_at(queue, head - 1)) & (ANSWERED | HELD) != 0


@kernel
def close_queue(ctl, worker, queue):
    """Nothing of it is in flight or held any more."""
    poke(queue + QUEUE_TAIL * WORD, peek(queue + QUEUE_HEAD * WORD))
    poke(queue + QUEUE_LOOSE * WORD, 0)
    raise_word(worker + WORKER_UNDECIDED * WORD, -1)
    tell(ctl, worker, queue, QueueState.CLOSED)


@kernel
def reincarnate(queue):
    """It is connected anew: what still comes from before names nothing."""
    tag = peek(queue + QUEUE_TAG * WORD)
    poke(queue + QUEUE_TAG * WORD, (tag & ~(0xFFFF << 32)) | ((tag + INCARNATION) & (0xFFFF << 32)))


@kernel
def give_order(worker, queue, order):
    """Leave an order for the worker, in place of one that was not seen yet. Any thread; ring the worker's bell then."""
    if exchange(queue + QUEUE_ORDER * WORD, order) == Order.NONE:
        add(worker + WORKER_ORDERS * WORD, 1)


@kernel
def take_order(worker, queue):
    """The order given to a queue, if any."""
    if load(queue + QUEUE_ORDER * WORD) == Order.NONE:
        return np.int64(Order.NONE)
    add(worker + WORKER_ORDERS * WORD, -1)
    return exchange(queue + QUEUE_ORDER * WORD, Order.NONE)


@kernel
def lost(queue):
    """Whether its peer is gone."""
    return peek(peek(queue + QUEUE_ENDPOINT * WORD) + ENDPOINT_LOST * WORD) != 0
