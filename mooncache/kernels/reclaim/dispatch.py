"""The dispatch to the policy of an engine, at each of the three moments of deletion."""

from mooncache.kernels.account import account, clock
from mooncache.kernels.atomics import fence, futex_wake
from mooncache.kernels.batch import release_row, slot_of
from mooncache.kernels.enums import Kind, Policy
from mooncache.kernels.jit import kernel
from mooncache.kernels.reclaim import bulk, deferred, epoch, inline, leak, on_close, thread_cache
from mooncache.kernels.reclaim.base import charge_freeing
from mooncache.kernels.records.base import acquire, fetch_add, where
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.ring import RING_EMPTY, ring_at
from mooncache.kernels.records.shared import shared_at
from mooncache.kernels.ring import first, push
from mooncache.kernels.worker import ring_bell, worker_row


@kernel
def wake_reaper(ctl):
    """Wake the reaper, if it sleeps."""
    shared = shared_at(ctl.shared)
    fence()
    if acquire(shared, "reaper_parked") != 0:
        fetch_add(shared, "reaper_bell", 1)
        futex_wake(ctl.syscall, where(shared, "reaper_bell"), 1)
        account(ctl, Kind.WAKES, 1)


@kernel
def hand_over(ctl, batch):
    """Leave a draining batch to the reaper (deferred) or to the workers' idle moments (epoch)."""
    shared, worker = shared_at(ctl.shared), worker_row(ctl, 0)
    account(ctl, Kind.RETIRED, 1)
    batch.retired_at = fetch_add(shared, "epoch", 1)
    push(ring_at(ctl.retired_ring), slot_of(ctl, batch))
    if ctl.policy == Policy.DEFERRED:
        wake_reaper(ctl)
    else:
        ring_bell(ctl, worker)


@kernel
def retire(ctl, batch):
    """Let the policy free a draining batch, all of whose slices are answered, now or later."""
    policy = ctl.policy
    if policy == Policy.DEFERRED or policy == Policy.EPOCH:
        hand_over(ctl, batch)
        return
    since = clock(ctl)
    if policy == Policy.BULK:
        bulk.on_close(ctl, batch)
    elif policy == Policy.THREAD_CACHE:
        thread_cache.on_close(ctl, batch)
    elif policy == Policy.ON_CLOSE:
        on_close.on_close(ctl, batch)
    elif policy == Policy.INLINE:
        inline.on_close(ctl, batch)
    else:
        leak.on_close(ctl, batch)
    charge_freeing(ctl, since)
    release_row(ctl, batch)


@kernel
def on_complete(ctl, batch, slot, n):
    """Let the policy free `n` slices of the batch, from `slot` on, that have just completed. In the worker."""
    if ctl.policy == Policy.INLINE:
        since = clock(ctl)
        inline.on_complete(ctl, batch, slot, n)
        charge_freeing(ctl, since)


@kernel
def on_idle(ctl):
    """Let the policy free something when the worker has nothing else to do; return whether there was anything."""
    if ctl.policy != Policy.EPOCH:
        return False
    since = clock(ctl)
    freed = epoch.on_idle(ctl)
    if freed > 0:
        charge_freeing(ctl, since)
    return freed > 0


@kernel
def retired_waits(ctl):
    """Return whether a worker has batches to free in an idle moment."""
    return ctl.policy == Policy.EPOCH and first(ring_at(ctl.retired_ring)) != RING_EMPTY


@kernel
def reap_lot(ctl):
    """Free one lot in the reaper. Return how many slices."""
    since = clock(ctl)
    freed = deferred.on_idle(ctl)
    charge_freeing(ctl, since)
    return freed


@kernel("int64(int64)")
def reap(ctl):
    """Free one lot for a reaper that is turned from outside (the simulation). Return how many slices."""
    ctl = control_at(ctl)
    return reap_lot(ctl)
