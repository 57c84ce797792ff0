"""The states, kinds, policies and operations, as kernels and Python number them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np


class Store(IntEnum):
    """The place of slices: the struct-of-array pool, or one malloc'ed object each as in the upstream engine."""

    POOL = 0
    HEAP = 1


class Policy(IntEnum):
    """The place of deletion of finished slices; one file each in `kernels/reclaim/`."""

    LEAK = 0
    INLINE = 1
    ON_CLOSE = 2
    THREAD_CACHE = 3
    DEFERRED = 4
    EPOCH = 5
    BULK = 6


class Opcode(IntEnum):
    """`ibv_wr_opcode` of the one-sided operations."""

    WRITE = 0
    SEND = 2  # a batch's notification
    READ = 4


class BatchState(IntEnum):
    """The state of a batch; moved only by the table in `kernels/batch.py`."""

    FREE = 0
    OPEN = 1
    SEALED = 2
    DRAINING = 3
    RECLAIMABLE = 4


class Slice(IntEnum):
    """The state of a slice. A failed slice's state is its `Status` (301 and above)."""

    FREE = 0
    WAITING = 1  # filled, not posted
    POSTED = 2  # the NIC has it
    DONE = 3
    WITHHELD = 4  # a notification that was not sent, because other slices of its batch failed


class Note(IntEnum):
    """The state of a batch's notification, by what it waits for."""

    DATA = 0  # all other slices of its batch
    TURN = 1  # the notifications of batches submitted before
    ANSWER = 2  # it is posted


class Kind(IntEnum):
    """Kinds of work, as `account` counts them. The simulation prices each; production only counts."""

    REQUESTS = 0  # checked and cut
    CHUNKS_ACQUIRED = 1
    SLICES_FILLED = 2
    HEAP_ALLOCATED = 3  # slice objects taken from malloc, with their string
    HEAP_REUSED = 4  # slice objects taken from a thread's cache instead
    BATCHES_SUBMITTED = 5
    BATCHES_TAKEN = 6  # by a worker
    WORK_REQUESTS = 7  # built
    DOORBELLS = 8  # post_send calls
    POLLS = 9  # poll_cq calls
    COMPLETIONS = 10  # entries polled
    COMPLETED = 11  # slices that arrived
    FAILED = 12  # slices that did not
    RETRIED = 13  # slices posted again
    STALE = 14  # completions of slices freed long ago: counted, never applied
    BATCHES_FINISHED = 15
    BATCHES_CLOSED = 16
    SLICES_FREED = 17  # one by one
    CHUNKS_FREED = 18  # as part of a whole chain
    SLICES_DROPPED = 19  # freed with their chain; no work of their own
    HEAP_FREED = 20  # slice objects given to free
    HEAP_CACHED = 21  # slice objects kept in a thread's cache instead
    SLICES_LEAKED = 22
    RETIRED = 23  # batches handed to the reaper or to an epoch
    PARKS = 24
    WAKES = 25


KINDS = len(Kind)


class QueueState(IntEnum):
    """The state of a queue pair. A software wire's is only ever READY."""

    CLOSED = 0  # nothing in flight; whoever connects it may write the row
    READY = 1
    BROKEN = 2  # an error came; nothing is posted, what is in flight comes back flushed
    DRAINED = 3  # all of it has come back; waits for an order
    PROBING = 4  # connected anew; ready when an empty write gets through


class Order(IntEnum):
    """An order of a connection's owner to the worker."""

    NONE = 0
    BREAK = 1  # post nothing more; the queue pair is in its error state already
    RETURN = 2  # drained, and nothing of it can reach the peer any more: post it again
    LOSE = 3  # the peer is gone: fail everything
    PROBE = 4  # the queue pair is connected anew


class AtOnce(IntEnum):
    """The outcome of a submitter's try to post its own batch in the place of a sleeping worker."""

    REFUSED = 0  # nothing
    POSTED = 1  # all; descriptors tell of the rest
    BEGUN = 2  # ring the bell: there is more for the worker to do


class Access(IntEnum):
    """The rights of peers to a region; bits."""

    READ = 1
    WRITE = 2
    LOCAL = 4  # not for peers: the owner's own reads may write here, since the memory is not read-only
    HELD = 8  # not for peers: the engine holds the object that keeps the memory mapped


def words_of(names: Iterable[IntEnum], values: np.ndarray) -> dict[str, int]:
    """Return `{name: value}` of a counter array, names in lower case."""
    return {name.name.lower(): int(values[name]) for name in names}
