"""The calls of a caller that holds a batch's handle: wait, ask, cancel, close. And how an engine stops."""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import account
from mooncache.kernels.atomics import (
    fence,
    futex_wake,
    i16,
    i32,
    i64,
)
from mooncache.kernels.batch import CLOSE, DRAINING, OPEN, RECLAIMABLE, SEALED, announce, finished, look_up, move
from mooncache.kernels.enums import Kind, Slice
from mooncache.kernels.handle import FREE, GENERATION_MASK, SLOT_MASK, batch_row, handle_of, resolve
from mooncache.kernels.jit import kernel
from mooncache.kernels.pool import EVERY_THREAD, wake_waiters
from mooncache.kernels.pump import ABANDONED
from mooncache.kernels.reclaim.dispatch import retire
from mooncache.kernels.reclaim.epoch import oldest_epoch
from mooncache.kernels.records.base import acquire, fetch_add, missing, release, swap, where
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.queue import queue_at
from mooncache.kernels.records.shared import shared_at
from mooncache.kernels.records.table import table_at
from mooncache.kernels.regions import take_out
from mooncache.kernels.repair import give_order
from mooncache.kernels.submit import bump_generation, request_cancel
from mooncache.kernels.worker import ring_bell, wake_worker, worker_row
from mooncache.limits import CHUNK_SLICES as SLOTS

CANCELLED, DONE = int(Status.CANCELLED), int(Slice.DONE)
NEVER = (1 << 63) - 1


@kernel("int64(int64, int64)")
def status(ctl, handle):
    """Return OK when the batch is finished, else NOT_FINISHED, or STALE_HANDLE."""
    return look_up(control_at(ctl), handle)


@kernel("int64(int64, int64)")
def finished_at(ctl, handle):
    """Return when the batch finished, ns; 0 while it has not; -1 for a stale handle."""
    ctl = control_at(ctl)
    batch = resolve(ctl, handle)
    return np.int64(-1) if missing(batch) else batch.finished_at


@kernel("int64(int64, int64)")
def slices(ctl, handle):
    """Return how many slices the batch has, or -1 for a stale handle."""
    ctl = control_at(ctl)
    batch = resolve(ctl, handle)
    return np.int64(-1) if missing(batch) else batch.slices


@kernel("int64(int64, int64)")
def cancel(ctl, handle):
    """Ask the worker to answer the batch's unposted slices as cancelled. OK, or STALE_HANDLE."""
    ctl = control_at(ctl)
    batch = resolve(ctl, handle)
    if missing(batch):
        return np.int64(Status.STALE_HANDLE)
    if acquire(batch, "state") == SEALED and swap(batch, "cancel_asked", 1) == 0:
        request_cancel(ctl, batch, handle)
    return np.int64(Status.OK)


@kernel
def close_batch(ctl, handle, keep_failed):
    """Close a batch, as `close` does."""
    batch = resolve(ctl, handle)
    if missing(batch):
        return np.int64(Status.STALE_HANDLE)
    if keep_failed and finished(batch) and batch.failed > 0:
        return np.int64(Status.HAS_FAILURES)
    if not bump_generation(batch, handle):
        return np.int64(Status.STALE_HANDLE)
    account(ctl, Kind.BATCHES_CLOSED, 1)
    if move(batch, CLOSE) == SEALED:
        announce(ctl, batch)  # to threads and coroutines that wait for it: it is closed
        request_cancel(ctl, batch, handle_of(batch.generation, handle & SLOT_MASK))
        return np.int64(Status.NOT_FINISHED)
    retire(ctl, batch)
    return np.int64(Status.OK)


@kernel("int64(int64, int64, boolean)")
def close(ctl, handle, keep_failed):
    """End the caller's interest in the batch; its handle is stale from now on.

    Finished: reclaimed here, as the policy says. Not finished: detached; unposted slices are cancelled, and the worker
    reclaims it when the NIC has answered for the last. With `keep_failed` a finished batch with failed slices is left
    as it is, so that the caller can look at them first.

    Returns OK (reclaimed), NOT_FINISHED (detached), HAS_FAILURES (nothing changed) or STALE_HANDLE.
    """
    ctl = control_at(ctl)
    return close_batch(ctl, handle, keep_failed)


@kernel("int64(int64, int64)")
def quiesced(ctl, handle):
    """Return 1 when no more bytes of the batch can move, whether it is closed or not; else 0."""
    ctl = control_at(ctl)
    slot = handle & SLOT_MASK
    if handle < 0 or slot >= ctl.batches:
        return 1
    batch = batch_row(ctl, slot)
    ahead = (acquire(batch, "generation") - (handle >> 32)) & GENERATION_MASK
    if ahead > 1:
        return 1
    state = acquire(batch, "state")
    if ahead == 1:
        return np.int64(state != DRAINING or acquire(batch, "remaining") == 0)
    return np.int64(state == RECLAIMABLE or state == FREE)


@kernel("int64(int64, int64)")
def failed(ctl, handle):
    """Count the failed slices of a finished batch; 0: all have arrived. Or minus NOT_FINISHED or STALE_HANDLE."""
    ctl = control_at(ctl)
    batch = resolve(ctl, handle)
    if missing(batch):
        return np.int64(-Status.STALE_HANDLE)
    return batch.failed if finished(batch) else np.int64(-Status.NOT_FINISHED)


@kernel("int64(int64, int64, int64[::1], int64[::1], int64[:, ::1])")
def failures(ctl, handle, request, why, where):
    """List failed requests: `request` and `why` (Status), each int64[requests], ascending, each request once.

    `where`, int64[requests, 3], are the local address, that at the peer and the length of what failed first of each.
    Returns how many, or minus NOT_FINISHED or STALE_HANDLE.
    """
    ctl = control_at(ctl)
    batch = resolve(ctl, handle)
    if missing(batch):
        return np.int64(-Status.STALE_HANDLE)
    if not finished(batch):
        return np.int64(-Status.NOT_FINISHED)
    state, head, tail = i16(ctl.slice_state), i32(ctl.slice_first), i32(ctl.slice_last)
    next_, used = i64(ctl.chunk_next), i64(ctl.chunk_slices)
    n, listed = 0, np.int64(-1)
    chunk = batch.first
    while chunk >= 0:
        for slot in range(chunk * SLOTS, chunk * SLOTS + used[chunk]):
            if state[slot] >= CANCELLED:
                for index in range(max(np.int64(head[slot]), listed + 1), np.int64(tail[slot]) + 1):
                    request[n] = index
                    why[n] = state[slot]
                    where[n, 0] = i64(ctl.slice_source)[slot]
                    where[n, 1] = i64(ctl.slice_target)[slot]
                    where[n, 2] = i32(ctl.slice_length)[slot]
                    n += 1
                    listed = index
        chunk = next_[chunk]
    return n


@kernel
def region_in_use(ctl, region):
    """Count the slices without an answer whose local region is the slot `region`, which must stay registered.

    Looks through all chunks, not along chains: workers, and the reaper, take chunks out of these meanwhile. No chunk
    becomes another batch's, since submitting takes the GIL that this holds; and what is answered stays so.
    """
    state, local = i16(ctl.slice_state), i16(ctl.slice_local)
    owner, used = i64(ctl.chunk_batch), i64(ctl.chunk_slices)
    n = 0
    for chunk in range(ctl.chunks):
        batch = batch_row(ctl, owner[chunk])
        at = acquire(batch, "state")
        if at == SEALED or (at == DRAINING and acquire(batch, "remaining") > 0):
            for i in range(chunk * SLOTS, chunk * SLOTS + used[chunk]):
                n += local[i] == region and 0 < state[i] < DONE
    return n


@kernel("int64(int64, int64)")
def oldest_submit(ctl, peer):
    """Return when the oldest batch to the peer in row `peer` with unanswered slices was submitted; NEVER: none."""
    ctl = control_at(ctl)
    oldest = np.int64(NEVER)
    for slot in range(ctl.batches):
        batch = batch_row(ctl, slot)
        at = acquire(batch, "state")
        if at == SEALED or at == OPEN or (at == DRAINING and acquire(batch, "remaining") > 0):
            if batch.peer == peer:
                oldest = min(oldest, batch.submitted_at)
    return oldest


@kernel("int64(int64)")
def grace(ctl):
    """Begin a grace period; return its epoch. Once `graced`, no worker holds what was withdrawn before."""
    ctl = control_at(ctl)
    fence()
    return fetch_add(shared_at(ctl.shared), "epoch", 1) + 1


@kernel("int64(int64, int64)")
def graced(ctl, epoch):
    """Return 1 when every worker has begun a new round since `grace` returned `epoch`, or rests."""
    ctl = control_at(ctl)
    fence()
    return np.int64(oldest_epoch(ctl) >= epoch)


@kernel("int64(int64, int64[::1])")
def withdraw(ctl, regions):
    """Forget the local regions with these slots, unless slices still use one of them.

    One call, which holds the GIL: no submit can come in between. Returns how many slices do; 0: they are gone.
    """
    ctl = control_at(ctl)
    users = np.int64(0)
    for i in range(regions.size):
        users += region_in_use(ctl, regions[i])
    if users == 0:
        table = table_at(ctl.local_table)
        slots = i64(table.slots)
        for i in range(regions.size):
            at = 0
            while slots[at] != regions[i]:
                at += 1
            take_out(table, at)
    return users


@kernel("int64(int64)")
def stop(ctl):
    """Close every batch, whoever holds it, refuse new ones, and let workers leave once they are idle.

    One call, which holds the GIL: no submit can come in between. Returns how many batches it closed.
    """
    ctl = control_at(ctl)
    shared, closed = shared_at(ctl.shared), 0
    for slot in range(ctl.batches):
        batch = batch_row(ctl, slot)
        state = acquire(batch, "state")
        if state == OPEN or state == SEALED or state == RECLAIMABLE:
            close_batch(ctl, handle_of(acquire(batch, "generation"), slot), False)
            closed += 1
    release(shared, "stop", 1)
    wake_waiters(ctl)  # for slots, which will not come
    for i in range(ctl.workers):
        wake_worker(ctl, worker_row(ctl, i))
    return closed


@kernel("int64(int64)")
def stop_reaper(ctl):
    """Let the reaper leave once it has freed everything. Only after the workers, which still hand it batches."""
    ctl = control_at(ctl)
    shared = shared_at(ctl.shared)
    release(shared, "reaper_stop", 1)
    fetch_add(shared, "reaper_bell", 1)
    futex_wake(ctl.syscall, where(shared, "reaper_bell"), EVERY_THREAD)
    return 0


@kernel("int64(int64, int64, int64, int64)")
def order(ctl, worker, queue, what):
    """Give worker number `worker` an order (enums.Order) about the queue whose row is at `queue`."""
    ctl = control_at(ctl)
    worker = worker_row(ctl, worker)
    give_order(worker, queue_at(queue), what)
    ring_bell(ctl, worker)
    return 0


@kernel("int64(int64)")
def refused_request(ctl):
    """Return the index of the request that the last submit of this thread was refused for."""
    ctl = control_at(ctl)
    return ctl.refused


@kernel("int64(int64)")
def abandon(ctl):
    """Let workers leave without the NIC's last answers. Whatever it still writes to must never be freed."""
    ctl = control_at(ctl)
    release(shared_at(ctl.shared), "stop", ABANDONED)
    return 0
