"""The slice pool: slots in chunks of 256, a batch owns a chain of whole chunks.

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

from mooncache.kernels.account import account, raise_word, word
from mooncache.kernels.atomics import (
    add,
    call_write,
    cas,
    exchange,
    fence,
    futex_wake,
    i16,
    i64,
    load,
    peek,
    poke,
)
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_CHUNKS,
    BATCH_FIRST,
    BATCH_LAST,
    CACHE_COUNT,
    CACHE_FIRST,
    CHUNK_BATCH,
    CHUNK_GENERATION,
    CHUNK_LIVE,
    CHUNK_NEXT,
    CHUNK_PREVIOUS,
    CHUNK_SLICES,
    EVENT_FD,
    SHARED,
    SHARED_AWAITED,
    SHARED_BELL,
    SHARED_FREE_CHUNKS,
    SHARED_FREE_COUNT,
    SHARED_LOW,
    SHARED_WAITERS,
    SLEEPING,
    SLICE_STATE,
    SYSCALL,
    WORD,
    WRITE,
    Kind,
    Slice,
)
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
    """Detach the first `k` indices with one compare-and-swap; returns (first, last), or (-1, -1): fewer are there.

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
    """Wake those who wait for chunks or batch rows: threads on the bell's futex, event loops on the engine's eventfd.

    The bell rises even if nobody waits yet: one may be about to.
    """
    shared = word(ctl, SHARED)
    add(shared + SHARED_BELL * WORD, 1)
    fence()
    if load(shared + SHARED_WAITERS * WORD) != 0:
        futex_wake(word(ctl, SYSCALL), shared + SHARED_BELL * WORD, EVERY_THREAD)
    if load(shared + SHARED_AWAITED * WORD) != 0 and exchange(shared + SHARED_AWAITED * WORD, 0) != 0:
        poke(ctl + SLEEPING * WORD, 1)
        call_write(word(ctl, WRITE), word(ctl, EVENT_FD), ctl + SLEEPING * WORD, WORD)


@kernel
def note_low(shared, free):
    """Remember the fewest free chunks ever seen: the pool's high water."""
    low = load(shared + SHARED_LOW * WORD)
    while free < low:
        seen = cas(shared + SHARED_LOW * WORD, low, free)
        if seen == low:
            return
        low = seen


@kernel
def give_back(ctl, first, last, count):
    """Put a linked chain of `count` chunks on the free list."""
    shared = word(ctl, SHARED)
    push_chain(shared + SHARED_FREE_CHUNKS * WORD, word(ctl, CHUNK_NEXT), first, last)
    add(shared + SHARED_FREE_COUNT * WORD, count)
    wake_waiters(ctl)


@kernel
def take_cached(ctl, k):
    """Detach up to `k` chunks from this thread's cache (policy thread_cache); returns (first, last, count)."""
    next_ = i64(word(ctl, CHUNK_NEXT))
    first = word(ctl, CACHE_FIRST)
    last, count, after = np.int64(-1), np.int64(0), first
    while count < k and after >= 0:
        last = after
        after = next_[after]
        count += 1
    if count > 0:
        next_[last] = -1
        poke(ctl + CACHE_FIRST * WORD, after)
        raise_word(ctl + CACHE_COUNT * WORD, -count * SLOTS)
    return first, last, count


@kernel
def acquire(ctl, row, batch, slices):
    """Give the batch a chain of chunks for `slices` slots. Returns False, with nothing changed, when too few are free.

    Writes: the batch's first, last and count; each chunk's batch, previous, slots in use and live.
    """
    k = (slices + SLOTS - 1) // SLOTS
    shared = word(ctl, SHARED)
    next_, previous = i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_PREVIOUS))
    first, last, cached = take_cached(ctl, k)
    if cached < k:
        more, end = pop_chain(shared + SHARED_FREE_CHUNKS * WORD, word(ctl, CHUNK_NEXT), k - cached)
        if more < 0:
            if cached > 0:
                next_[last] = word(ctl, CACHE_FIRST)
                poke(ctl + CACHE_FIRST * WORD, first)
                raise_word(ctl + CACHE_COUNT * WORD, cached * SLOTS)
            return False
        note_low(shared, add(shared + SHARED_FREE_COUNT * WORD, cached - k) + cached - k)
        if cached > 0:
            next_[last] = more
        else:
            first = more
        last = end
        next_[last] = -1
    owner, used, live = i64(word(ctl, CHUNK_BATCH)), i64(word(ctl, CHUNK_SLICES)), i64(word(ctl, CHUNK_LIVE))
    chunk, before, left = first, np.int64(-1), slices
    while chunk >= 0:
        previous[chunk] = before
        owner[chunk] = batch
        used[chunk] = min(left, SLOTS)
        live[chunk] = used[chunk]
        left -= SLOTS
        before = chunk
        chunk = next_[chunk]
    poke(row + BATCH_FIRST * WORD, first)
    poke(row + BATCH_LAST * WORD, last)
    poke(row + BATCH_CHUNKS * WORD, k)
    account(ctl, Kind.CHUNKS_ACQUIRED, k)
    return True


@kernel
def unlink(ctl, row, chunk):
    """Take one chunk out of its batch's chain and make work requests that still name it stale."""
    next_, previous = i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_PREVIOUS))
    before, after = previous[chunk], next_[chunk]
    if before >= 0:
        next_[before] = after
    else:
        poke(row + BATCH_FIRST * WORD, after)
    if after >= 0:
        previous[after] = before
    else:
        poke(row + BATCH_LAST * WORD, before)
    raise_word(row + BATCH_CHUNKS * WORD, -1)
    i64(word(ctl, CHUNK_GENERATION))[chunk] += 1


@kernel
def mark_free(ctl, slot):
    """Free one slot; returns the slots of its chunk that are still live."""
    i16(word(ctl, SLICE_STATE))[slot] = Slice.FREE
    live = i64(word(ctl, CHUNK_LIVE))
    live[slot >> CHUNK_BITS] -= 1
    return live[slot >> CHUNK_BITS]


@kernel
def release_chunk(ctl, row, chunk):
    """Give one chunk, all of whose slots are free, back to the free list."""
    unlink(ctl, row, chunk)
    give_back(ctl, chunk, chunk, 1)


@kernel
def release(ctl, row):
    """Give the batch's whole chunk chain back to the free list. O(chunks), one compare-and-swap.

    Writes: the generation of each chunk, the free list's head, the batch's chain (now empty).
    """
    first, k = peek(row + BATCH_FIRST * WORD), peek(row + BATCH_CHUNKS * WORD)
    if first < 0:
        return
    next_ = i64(word(ctl, CHUNK_NEXT))
    generation = i64(word(ctl, CHUNK_GENERATION))
    chunk = first
    while chunk >= 0:
        generation[chunk] += 1
        chunk = next_[chunk]
    give_back(ctl, first, peek(row + BATCH_LAST * WORD), k)
    poke(row + BATCH_FIRST * WORD, -1)
    poke(row + BATCH_LAST * WORD, -1)
    poke(row + BATCH_CHUNKS * WORD, 0)
    account(ctl, Kind.CHUNKS_FREED, k)
