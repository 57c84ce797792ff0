"""The slice pool: slots in chunks of 256; a batch owns a chain of whole chunks.

free list   SHARED_FREE_CHUNKS = tag << 24 | chunk + 1
                 |
                 v
               [ 7 ] --next--> [ 2 ] --next--> [ 9 ] --> -1

acquire(k) walks k links and moves the head with one compare-and-swap; release links a whole chain back with one
more. The tag rises at every change, so a head that was taken and put back in between is noticed (Treiber, Systems
Programming: Coping with Parallelism, 1986). Slots of a batch stay contiguous by chunk however long the engine
runs, so filling and posting stay sequential; index stacks scramble after a while (9-71 ns a slice, costs.md).
"""

import numpy as np

from mooncache.kernels.account import account
from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import (
    call_write,
    cas,
    fence,
    futex_wake,
    i16,
    i64,
    load,
)
from mooncache.kernels.enums import Kind, Slice
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import acquire, compare_swap, fetch_add, swap, where
from mooncache.kernels.records.shared import shared_at
from mooncache.limits import CHUNK_BITS
from mooncache.limits import CHUNK_SLICES as SLOTS

INDEX_BITS = 24
INDEX_MASK = (1 << INDEX_BITS) - 1
EVERY_THREAD = (1 << 31) - 1


# ------------------------------------------------------------------------------ tagged stack of small indices
@kernel
def push_chain(head, links, first, last):
    """Put the linked chain `first .. last` on top with one compare-and-swap, whatever its length."""
    next_ = i64(links)
    old = load(head)
    while True:
        next_[last] = (old & INDEX_MASK) - 1
        seen = cas(head, old, ((old >> INDEX_BITS) + 1) << INDEX_BITS | (first + 1))
        if seen == old:
            return
        old = seen


@kernel
def pop_chain(head, links, k):
    """Detach the first `k` indices with one compare-and-swap; return (first, last), or (-1, -1): fewer are there.

    The walk may read links that others are changing: they stay in range, and the tag makes the swap fail.
    """
    next_ = i64(links)
    old = load(head)
    while True:
        first = (old & INDEX_MASK) - 1
        last = np.int64(-1)
        after = first
        walked = 0
        while walked < k and after >= 0:
            last = after
            after = next_[after]
            walked += 1
        if walked < k:
            now = load(head)
            if now == old:
                return np.int64(-1), np.int64(-1)
            old = now
            continue
        seen = cas(head, old, ((old >> INDEX_BITS) + 1) << INDEX_BITS | (after + 1))
        if seen == old:
            return first, last
        old = seen


# ------------------------------------------------------------------------------ chunks
@kernel
def wake_waiters(ctl):
    """Wake those who wait for chunks or batch rows: threads on the bell's futex, event loops on the eventfd.

    The bell rises even if nobody waits yet: one may be about to.
    """
    shared = shared_at(ctl.shared)
    fetch_add(shared, "bell", 1)
    fence()
    if acquire(shared, "waiters") != 0:
        futex_wake(ctl.syscall, where(shared, "bell"), EVERY_THREAD)
    if acquire(shared, "awaited") != 0 and swap(shared, "awaited", 0) != 0:
        call_write(ctl.write, ctl.event_fd, where(ctl, "one"), WORD)


@kernel
def note_low(shared, free):
    """Remember the fewest free chunks ever seen: the pool's high water."""
    low = acquire(shared, "low")
    while free < low:
        seen = compare_swap(shared, "low", low, free)
        if seen == low:
            return
        low = seen


@kernel
def give_back(ctl, first, last, count):
    """Put a linked chain of `count` chunks on the free list."""
    shared = shared_at(ctl.shared)
    push_chain(where(shared, "free_chunks"), ctl.chunk_next, first, last)
    fetch_add(shared, "free_count", count)
    wake_waiters(ctl)


@kernel
def take_cached(ctl, k):
    """Detach up to `k` chunks from this thread's cache (policy thread_cache); return (first, last, count)."""
    next_ = i64(ctl.chunk_next)
    first = ctl.cache_first
    last, count, after = np.int64(-1), np.int64(0), first
    while count < k and after >= 0:
        last = after
        after = next_[after]
        count += 1
    if count > 0:
        next_[last] = -1
        ctl.cache_first = after
        ctl.cache_count -= count * SLOTS
    return first, last, count


@kernel
def acquire_chunks(ctl, batch, slot, slices):
    """Take a chain of chunks for `slices` slots from the free list; the batch's row is `slot`.

    Returns False, with nothing changed, when too few are free.
    Writes: the batch's first, last and count; each chunk's batch, previous, slots in use and live.
    """
    k = (slices + SLOTS - 1) // SLOTS
    shared = shared_at(ctl.shared)
    next_, previous = i64(ctl.chunk_next), i64(ctl.chunk_previous)
    first, last, cached = take_cached(ctl, k)
    if cached < k:
        more, end = pop_chain(where(shared, "free_chunks"), ctl.chunk_next, k - cached)
        if more < 0:
            if cached > 0:
                next_[last] = ctl.cache_first
                ctl.cache_first = first
                ctl.cache_count += cached * SLOTS
            return False
        note_low(shared, fetch_add(shared, "free_count", cached - k) + cached - k)
        if cached > 0:
            next_[last] = more
        else:
            first = more
        last = end
        next_[last] = -1
    owner, used, live = i64(ctl.chunk_batch), i64(ctl.chunk_slices), i64(ctl.chunk_live)
    chunk, before, left = first, np.int64(-1), slices
    while chunk >= 0:
        previous[chunk] = before
        owner[chunk] = slot
        used[chunk] = min(left, SLOTS)
        live[chunk] = used[chunk]
        left -= SLOTS
        before = chunk
        chunk = next_[chunk]
    batch.first = first
    batch.last = last
    batch.chunks = k
    account(ctl, Kind.CHUNKS_ACQUIRED, k)
    return True


@kernel
def unlink(ctl, batch, chunk):
    """Take one chunk out of its batch's chain."""
    next_, previous = i64(ctl.chunk_next), i64(ctl.chunk_previous)
    before, after = previous[chunk], next_[chunk]
    if before >= 0:
        next_[before] = after
    else:
        batch.first = after
    if after >= 0:
        previous[after] = before
    else:
        batch.last = before
    batch.chunks -= 1


@kernel
def mark_free(ctl, slot):
    """Free one slot; return the slots of its chunk that are still live."""
    i16(ctl.slice_state)[slot] = Slice.FREE
    live = i64(ctl.chunk_live)
    live[slot >> CHUNK_BITS] -= 1
    return live[slot >> CHUNK_BITS]


@kernel
def release_chunk(ctl, batch, chunk):
    """Put one chunk, all of whose slots are free, back on the free list."""
    unlink(ctl, batch, chunk)
    give_back(ctl, chunk, chunk, 1)


@kernel
def release_chunks(ctl, batch):
    """Put the batch's whole chunk chain back on the free list with one compare-and-swap, whatever its length.

    Writes: the free list's head, the batch's chain (now empty).
    """
    first, k = batch.first, batch.chunks
    if first < 0:
        return
    give_back(ctl, first, batch.last, k)
    batch.first = -1
    batch.last = -1
    batch.chunks = 0
    account(ctl, Kind.CHUNKS_FREED, k)
