"""Policy thread_cache: as on_close, through a cache of `cache_slices` of the closing thread: the accepted upstream fix.

On the heap the cache holds slice objects, on the pool whole chunks. What does not fit is freed one by one, and what
fits is used again only by a submit of the same thread: both are the fix's weak points, kept on purpose.
"""

from mooncache.kernels import heap
from mooncache.kernels.account import account
from mooncache.kernels.atomics import i16, i64
from mooncache.kernels.enums import Kind, Slice, Store
from mooncache.kernels.jit import kernel
from mooncache.kernels.pool import give_back, mark_free, release_chunk, unlink
from mooncache.kernels.reclaim.base import free_chunk, free_each
from mooncache.kernels.reclaim.traits import FreesIn, Traits
from mooncache.kernels.records.control import control_at
from mooncache.limits import CHUNK_SLICES as SLOTS

TRAITS = Traits(FreesIn.CALLER, whole_chain=False)


@kernel
def keep_chunk(ctl, batch, chunk):
    """Free the chunk's slots one by one and keep the chunk for this thread's next submit."""
    account(ctl, Kind.SLICES_FREED, i64(ctl.chunk_live)[chunk])
    for slot in range(chunk * SLOTS, chunk * SLOTS + i64(ctl.chunk_slices)[chunk]):
        mark_free(ctl, slot)
    unlink(ctl, batch, chunk)
    i64(ctl.chunk_next)[chunk] = ctl.cache_first
    ctl.cache_first = chunk
    ctl.cache_count += SLOTS


@kernel
def keep_objects(ctl, batch, chunk):
    """Free the chunk's slices one by one, but keep as many of their objects as the cache has room for."""
    state = i16(ctl.slice_state)
    live = i64(ctl.chunk_live)[chunk]
    room = min(live, ctl.cache_slices - ctl.cache_count)
    account(ctl, Kind.SLICES_FREED, live)
    account(ctl, Kind.HEAP_CACHED, room)
    account(ctl, Kind.HEAP_FREED, live - room)
    for slot in range(chunk * SLOTS, chunk * SLOTS + i64(ctl.chunk_slices)[chunk]):
        if state[slot] != Slice.FREE:
            if room > 0:
                heap.keep_object(ctl, slot)
                room -= 1
            else:
                heap.free_object(ctl, slot)
            if mark_free(ctl, slot) == 0:
                release_chunk(ctl, batch, chunk)
                break  # from here on its slots may be another batch's


@kernel
def on_close(ctl, batch):
    """Fill the thread's cache first, free the rest. A worker, which never submits, keeps nothing."""
    if ctl.actor >= 0:
        free_each(ctl, batch)
        return
    chunk = batch.first
    while chunk >= 0:
        after = i64(ctl.chunk_next)[chunk]
        if ctl.store == Store.HEAP:
            keep_objects(ctl, batch, chunk)
        elif ctl.cache_count + SLOTS <= ctl.cache_slices:
            keep_chunk(ctl, batch, chunk)
        else:
            free_chunk(ctl, batch, chunk)
        chunk = after


@kernel("int64(int64)")
def drop(ctl):
    """Free the objects and chunks that this thread keeps; return how many slices. When its engine closes."""
    ctl = control_at(ctl)
    kept = ctl.cache_count
    if ctl.store == Store.HEAP:
        for i in range(kept):
            heap.delete_object(ctl, i64(ctl.cache_objects)[i])
    chunk = ctl.cache_first
    while chunk >= 0:
        after = i64(ctl.chunk_next)[chunk]
        give_back(ctl, chunk, chunk, 1)
        chunk = after
    ctl.cache_first = -1
    ctl.cache_count = 0
    return kept
