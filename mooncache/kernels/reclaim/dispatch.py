"""Which policy's code runs at each of the three moments."""

from mooncache.kernels.account import account, clock, word
from mooncache.kernels.atomics import add, fence, futex_wake, load, poke
from mooncache.kernels.batch import release_row, slot_of
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_RETIRED_AT,
    POLICY,
    RETIRED_RING,
    SHARED,
    SHARED_EPOCH,
    SHARED_REAPER_BELL,
    SHARED_REAPER_PARKED,
    SYSCALL,
    WORD,
    WORKER_ROWS,
    Kind,
    Policy,
)
from mooncache.kernels.reclaim import bulk, deferred, epoch, inline, leak, on_close, thread_cache
from mooncache.kernels.reclaim.base import charge_freeing
from mooncache.kernels.ring import push
from mooncache.kernels.worker import ring_bell


@kernel
def wake_reaper(ctl):
    """Wake the reaper, if it sleeps."""
    shared = word(ctl, SHARED)
    fence()
    if load(shared + SHARED_REAPER_PARKED * WORD) != 0:
        add(shared + SHARED_REAPER_BELL * WORD, 1)
        futex_wake(word(ctl, SYSCALL), shared + SHARED_REAPER_BELL * WORD, 1)
        account(ctl, Kind.WAKES, 1)


@kernel
def hand_over(ctl, row):
    """Leave a draining batch to the reaper (deferred) or to the workers' idle moments (epoch)."""
    shared, worker = word(ctl, SHARED), word(ctl, WORKER_ROWS)
    account(ctl, Kind.RETIRED, 1)
    poke(row + BATCH_RETIRED_AT * WORD, add(shared + SHARED_EPOCH * WORD, 1))
    push(word(ctl, RETIRED_RING), slot_of(ctl, row))
    if word(ctl, POLICY) == Policy.DEFERRED:
        wake_reaper(ctl)
    else:
        ring_bell(ctl, worker)


@kernel
def retire(ctl, row):
    """The batch is draining and all its slices are answered: let the policy free it, now or later."""
    policy = word(ctl, POLICY)
    if policy == Policy.DEFERRED or policy == Policy.EPOCH:
        hand_over(ctl, row)
        return
    since = clock(ctl)
    if policy == Policy.BULK:
        bulk.on_close(ctl, row)
    elif policy == Policy.THREAD_CACHE:
        thread_cache.on_close(ctl, row)
    elif policy == Policy.ON_CLOSE:
        on_close.on_close(ctl, row)
    elif policy == Policy.INLINE:
        inline.on_close(ctl, row)
    else:
        leak.on_close(ctl, row)
    charge_freeing(ctl, since)
    release_row(ctl, row)


@kernel
def on_complete(ctl, row, slot, n):
    """In the worker: `n` slices of the batch, from `slot` on, have just completed."""
    if word(ctl, POLICY) == Policy.INLINE:
        since = clock(ctl)
        inline.on_complete(ctl, row, slot, n)
        charge_freeing(ctl, since)


@kernel
def on_idle(ctl):
    """In the worker: nothing else to do. Returns whether there was something to free."""
    if word(ctl, POLICY) != Policy.EPOCH:
        return False
    since = clock(ctl)
    freed = epoch.on_idle(ctl)
    if freed > 0:
        charge_freeing(ctl, since)
    return freed > 0


@kernel
def reap_lot(ctl):
    """In the reaper: free one lot. Returns how many slices."""
    since = clock(ctl)
    freed = deferred.on_idle(ctl)
    charge_freeing(ctl, since)
    return freed


@kernel("int64(int64)")
def reap(ctl):
    """What `reap_lot` does, for a reaper that is turned from outside (the simulation)."""
    return reap_lot(ctl)
