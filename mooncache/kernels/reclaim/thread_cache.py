"""As on_close, through a cache of `cache_slices` that belongs to the closing thread: the accepted upstream fix.

On the heap the cache holds slice objects, on the pool whole chunks. What does not fit is freed one by one, and what
fits is used again only by a submit of the same thread: both are the fix's weak points, kept on purpose.
"""

from mooncache.kernels import heap
from mooncache.kernels.account import account, raise_word, word
from mooncache.kernels.atomics import i16, i64, peek, poke
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    ACTOR,
    BATCH_FIRST,
    CACHE_COUNT,
    CACHE_FIRST,
    CACHE_OBJECTS,
    CACHE_SLICES,
    CHUNK_LIVE,
    CHUNK_NEXT,
    CHUNK_SLICES,
    SLICE_STATE,
    STORE,
    WORD,
    Kind,
    Slice,
    Store,
)
from mooncache.kernels.pool import give_back, mark_free, release_chunk, unlink
from mooncache.kernels.reclaim.base import free_chunk, free_each
from mooncache.limits import CHUNK_SLICES as SLOTS


@kernel
def keep_chunk(ctl, row, chunk):
    """Free the chunk's slots one by one and keep the chunk for this thread's next submit."""
    account(ctl, Kind.SLICES_FREED, i64(word(ctl, CHUNK_LIVE))[chunk])
    for slot in range(chunk * SLOTS, chunk * SLOTS + i64(word(ctl, CHUNK_SLICES))[chunk]):
        mark_free(ctl, slot)
    unlink(ctl, row, chunk)
    i64(word(ctl, CHUNK_NEXT))[chunk] = word(ctl, CACHE_FIRST)
    poke(ctl + CACHE_FIRST * WORD, chunk)
    raise_word(ctl + CACHE_COUNT * WORD, SLOTS)


@kernel
def keep_objects(ctl, row, chunk):
    """Free the chunk's slices one by one, but keep as many of their objects as the cache has room for."""
    state = i16(word(ctl, SLICE_STATE))
    live = i64(word(ctl, CHUNK_LIVE))[chunk]
    room = min(live, word(ctl, CACHE_SLICES) - word(ctl, CACHE_COUNT))
    account(ctl, Kind.SLICES_FREED, live)
    account(ctl, Kind.HEAP_CACHED, room)
    account(ctl, Kind.HEAP_FREED, live - room)
    for slot in range(chunk * SLOTS, chunk * SLOTS + i64(word(ctl, CHUNK_SLICES))[chunk]):
        if state[slot] != Slice.FREE:
            if room > 0:
                heap.keep_object(ctl, slot)
                room -= 1
            else:
                heap.free_object(ctl, slot)
            if mark_free(ctl, slot) == 0:
                release_chunk(ctl, row, chunk)
                break  # from here on its slots may be another batch's


@kernel
def on_close(ctl, row):
    """Fill the thread's cache first, free the rest. A worker, which never submits, keeps nothing."""
    if word(ctl, ACTOR) >= 0:
        free_each(ctl, row)
        return
    chunk = peek(row + BATCH_FIRST * WORD)
    while chunk >= 0:
        after = i64(word(ctl, CHUNK_NEXT))[chunk]
        if word(ctl, STORE) == Store.HEAP:
            keep_objects(ctl, row, chunk)
        elif word(ctl, CACHE_COUNT) + SLOTS <= word(ctl, CACHE_SLICES):
            keep_chunk(ctl, row, chunk)
        else:
            free_chunk(ctl, row, chunk)
        chunk = after


@kernel("int64(int64)")
def drop(ctl):
    """Free what this thread keeps, objects and chunks; returns how many slices. When its engine closes."""
    kept = word(ctl, CACHE_COUNT)
    if word(ctl, STORE) == Store.HEAP:
        for i in range(kept):
            heap.delete_object(ctl, i64(word(ctl, CACHE_OBJECTS))[i])
    chunk = word(ctl, CACHE_FIRST)
    while chunk >= 0:
        after = i64(word(ctl, CHUNK_NEXT))[chunk]
        give_back(ctl, chunk, chunk, 1)
        chunk = after
    poke(ctl + CACHE_FIRST * WORD, -1)
    poke(ctl + CACHE_COUNT * WORD, 0)
    return kept
