"""The contract of a reclaim policy, and the work that policies share.

A policy acts at one of three moments and leaves the others empty:

    on_complete(ctl, batch, slot, n)  in the worker, as slices complete: `n` of one chunk, from `slot` on
    on_close(ctl, batch)              in whoever closes: the caller, or the worker for a batch closed before its end
    on_idle(ctl)                      in the worker when it has nothing else to do, or in the reaper

A batch that reaches `retire` is draining: all its slices are answered and nobody can name it any more. Whatever the
policy, slices that failed stay until then, because the caller may still ask which they were.
"""

from mooncache.kernels import heap
from mooncache.kernels.account import account, clock
from mooncache.kernels.atomics import i16, i64
from mooncache.kernels.enums import Kind, Slice, Store
from mooncache.kernels.jit import kernel
from mooncache.kernels.pool import mark_free, release_chunk, release_chunks
from mooncache.limits import CHUNK_SLICES as SLOTS


@kernel
def free_slot(ctl, batch, slot):
    """Free one slice, and its chunk when that was the last one. The caller accounts."""
    if ctl.store == Store.HEAP:
        heap.free_object(ctl, slot)
    if mark_free(ctl, slot) == 0:
        release_chunk(ctl, batch, slot // SLOTS)


@kernel
def account_freed(ctl, n):
    """Account for `n` slices freed one by one."""
    account(ctl, Kind.SLICES_FREED, n)
    if ctl.store == Store.HEAP:
        account(ctl, Kind.HEAP_FREED, n)


@kernel
def free_chunk(ctl, batch, chunk):
    """Free the live slices of one chunk, one by one, and the chunk; return how many slices."""
    state = i16(ctl.slice_state)
    live = i64(ctl.chunk_live)[chunk]
    account_freed(ctl, live)
    left = live
    for slot in range(chunk * SLOTS, chunk * SLOTS + i64(ctl.chunk_slices)[chunk]):
        if state[slot] != Slice.FREE:
            free_slot(ctl, batch, slot)
            left -= 1
            if left == 0:  # the chunk is free: from here on its slots may be another batch's
                break
    return live


@kernel
def free_each(ctl, batch):
    """Free every slice of the batch that is still live, one by one."""
    chunk = batch.first
    while chunk >= 0:
        after = i64(ctl.chunk_next)[chunk]
        free_chunk(ctl, batch, chunk)
        chunk = after


@kernel
def free_whole(ctl, batch):
    """Free the batch's chain with one compare-and-swap; heap objects, which malloc knows singly, one by one."""
    account(ctl, Kind.SLICES_DROPPED, batch.slices)
    if ctl.store == Store.HEAP:
        heap.free_chain(ctl, batch.first, -1)
    release_chunks(ctl, batch)


@kernel
def charge_freeing(ctl, since):
    """Add the time since `since` to the actor's time spent on freeing."""
    ctl.time_freeing += clock(ctl) - since
