"""States, kinds and policies as numbers, and how the arrays of an engine's memory are allocated."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress
from enum import IntEnum

import numpy as np
from numpy.typing import DTypeLike

WORD = 8  # bytes
LINE = 64  # bytes of a cache line
MAP_NORESERVE = 0x4000  # Python has no name for it
MAPPED_BYTES = 1 << 20  # from here on a system call more, and up to a page, are nothing beside the array


class Store(IntEnum):
    """Where slices live: the struct-of-array pool, or one malloc'ed object each as in the upstream engine."""

    POOL = 0
    HEAP = 1


class Policy(IntEnum):
    """Where the deletion of finished slices happens; one file each in `kernels/reclaim/`."""

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
    """Where a batch is in its life; moved only by the table in `kernels/batch.py`."""

    FREE = 0
    OPEN = 1
    SEALED = 2
    DRAINING = 3
    RECLAIMABLE = 4


class Slice(IntEnum):
    """State of one slice. A failed slice's state is its `Status` (301 and above)."""

    FREE = 0
    WAITING = 1  # filled, not posted
    POSTED = 2  # the NIC has it
    DONE = 3
    WITHHELD = 4  # a notification that was not sent, because other slices of its batch failed


class Note(IntEnum):
    """What a batch's notification waits for."""

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
TIMING_KINDS = (Kind.POLLS, Kind.DOORBELLS, Kind.PARKS, Kind.WAKES)
"""Kinds whose counts depend on how threads interleave; all others are a function of the batches alone."""


class QueueState(IntEnum):
    """The life of a queue pair. A software wire's is only ever READY."""

    CLOSED = 0  # nothing in flight; whoever connects it may write the row
    READY = 1
    BROKEN = 2  # an error came; nothing is posted, what is in flight comes back flushed
    DRAINED = 3  # all of it has come back; waits for an order
    PROBING = 4  # connected anew; ready when an empty write gets through


class Order(IntEnum):
    """What the owner of a connection asks of the worker."""

    NONE = 0
    BREAK = 1  # post nothing more; the queue pair is in its error state already
    RETURN = 2  # drained, and nothing of it can reach the peer any more: post it again
    LOSE = 3  # the peer is gone: fail everything
    PROBE = 4  # the queue pair is connected anew


class AtOnce(IntEnum):
    """What a submitter has done of its own batch in the place of a sleeping worker."""

    REFUSED = 0  # nothing
    POSTED = 1  # all; descriptors tell of the rest
    BEGUN = 2  # ring the bell: there is more for the worker to do


class Access(IntEnum):
    """What a peer may do with a region; bits."""

    READ = 1
    WRITE = 2
    LOCAL = 4  # not for peers: the owner's own reads may write here, since the memory is not read-only
    HELD = 8  # not for peers: the engine holds the object that keeps the memory mapped


def zeros(n: int, dtype: DTypeLike, *, sparse: bool = False) -> np.ndarray:
    """dtype[n] of zeros; pages of its own for a large array, which the system gives when they are first written to.

    They go back to the system with the array. glibc keeps what was freed, up to 32 MiB each, and writes the zeros of
    the next array itself. `sparse`: little of a large one is written to: it gets small pages, and the system need not
    have room for all of it.
    """
    nbytes = n * np.dtype(dtype).itemsize
    if nbytes < MAPPED_BYTES:
        return np.zeros(n, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if sparse else 0)
    pages = mmap.mmap(-1, nbytes, flags)
    with suppress(OSError):  # this kernel has no huge pages to give; numpy asks for them, too
        pages.madvise(mmap.MADV_NOHUGEPAGE if sparse else mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype, n)


def aligned(words: int, *, sparse: bool = False) -> np.ndarray:
    """int64[words] of zeros on a cache line of its own; see `zeros`."""
    raw = zeros(words + LINE // WORD, np.int64, sparse=sparse)
    skip = (-raw.ctypes.data % LINE) // WORD
    return raw[skip : skip + words]


def rows_of(dtype: np.dtype, n: int = 1, *, sparse: bool = False) -> np.ndarray:
    """dtype[n] of zeros, for a dtype of whole cache lines: on cache lines of their own; see `zeros`."""
    return aligned(n * dtype.itemsize // WORD, sparse=sparse).view(dtype)


def power_of_two(least: int) -> int:
    """The smallest power of two that is `least` or more."""
    return 1 << max(0, least - 1).bit_length()


def words_of(names: Iterable[IntEnum], values: np.ndarray) -> dict[str, int]:
    """`{name: value}` of a counter array, names in lower case."""
    return {name.name.lower(): int(values[name]) for name in names}
