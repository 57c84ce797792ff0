"""The contract of a reclaim policy, the work they share, and the dispatch to the one an engine runs.

A policy acts at one of three moments and leaves the others empty:

    on_complete(ctl, row, slot, n)  in the worker, as slices complete: `n` of one chunk, from `slot` on
    on_close(ctl, row)              in whoever closes: the caller, or the worker for a batch closed before its end
    on_idle(ctl)                    in the worker when it has nothing else to do, or in the reaper

A batch that reaches `retire` is draining: all its slices are answered and nobody can name it any more. Whatever the
policy, slices that failed stay until then, because the caller may still ask which they were.
"""

from mooncache.kernels import heap
from mooncache.kernels.account import account, clock, raise_word, word
from mooncache.kernels.atomics import i16, i64, peek
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_FIRST,
    BATCH_SLICES,
    CHUNK_LIVE,
    CHUNK_NEXT,
    CHUNK_SLICES,
    SLICE_STATE,
    STORE,
    TIME_FREEING,
    WORD,
    Kind,
    Slice,
    Store,
)
from mooncache.kernels.pool import mark_free, release, release_chunk
from mooncache.limits import CHUNK_SLICES as SLOTS


@kernel
def free_slot(ctl, row, slot):
    """Free one slice, and its chunk when that was the last one. The caller accounts."""
    if word(ctl, STORE) == Store.HEAP:
        heap.free_object(ctl, slot)
    if mark_free(ctl, slot) == 0:
        release_chunk(ctl, row, slot // SLOTS)


@kernel
def account_freed(ctl, n):
    """Account for `n` slices freed one by one."""
    account(ctl, Kind.SLICES_FREED, n)
    if word(ctl, STORE) == Store.HEAP:
        account(ctl, Kind.HEAP_FREED, n)


@kernel
def free_chunk(ctl, row, chunk):
    """Free what is live of the slices in one chunk, one by one, and the chunk; returns how many slices."""
    state = i16(word(ctl, SLICE_STATE))
    live = i64(word(ctl, CHUNK_LIVE))[chunk]
    account_freed(ctl, live)
    left = live
    for slot in range(chunk * SLOTS, chunk * SLOTS + i64(word(ctl, CHUNK_SLICES))[chunk]):
        if state[slot] != Slice.FREE:
            free_slot(ctl, row, slot)
            left -= 1
            if left == 0:  # the chunk is free: from here on its slots may be another batch's
                break
    return live


@kernel
def free_each(ctl, row):
    """Free every slice of the batch that is still live, one by one."""
    chunk = peek(row + BATCH_FIRST * WORD)
    while chunk >= 0:
        after = i64(word(ctl, CHUNK_NEXT))[chunk]
        free_chunk(ctl, row, chunk)
        chunk = after


@kernel
def free_whole(ctl, row):
    """Free the batch's chain with one compare-and-swap; heap objects, which malloc knows singly, one by one."""
    account(ctl, Kind.SLICES_DROPPED, peek(row + BATCH_SLICES * WORD))
    if word(ctl, STORE) == Store.HEAP:
        next_, used = i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES))
        chunk = peek(row + BATCH_FIRST * WORD)
        while chunk >= 0:
            account(ctl, Kind.HEAP_FREED, used[chunk])
            for slot in range(chunk * SLOTS, chunk * SLOTS + used[chunk]):
                heap.free_object(ctl, slot)
            chunk = next_[chunk]
    release(ctl, row)


@kernel
def charge_freeing(ctl, since):
    """Add the time since `since` to the actor's time spent on freeing."""
    raise_word(ctl + TIME_FREEING * WORD, clock(ctl) - since)
