"""Waiting in kernels: threads that sleep until a batch is finished or room comes back, and what coroutines ask for."""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import clock
from mooncache.kernels.atomics import call_words, fence, pause
from mooncache.kernels.batch import RECLAIMABLE, finished, look_up
from mooncache.kernels.handle import resolve
from mooncache.kernels.jit import kernel
from mooncache.kernels.linger import lingers
from mooncache.kernels.pump import PAUSES, busy, sleep_on_descriptors, work_waits
from mooncache.kernels.records.base import acquire, fetch_add, missing, release, where
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.shared import shared_at
from mooncache.kernels.records.worker import EPOCH_QUIET
from mooncache.kernels.worker import end_turn, ring_bell, sleep_on, try_turn, worker_row


@kernel("int64(int64, int64, int64)", nogil=True)
def wait(ctl, handle, ns):
    """Spin briefly, then sleep until the batch is finished, for at most `ns`. Gives the GIL up.

    Comes back at every wake-up, so that Python can run signal handlers. Returns what `status` does. Where the worker
    sleeps on descriptors, the waiting thread takes its turn and fetches the answer itself.
    """
    ctl = control_at(ctl)
    batch = resolve(ctl, handle)
    if missing(batch):
        return np.int64(Status.STALE_HANDLE)
    since = clock(ctl)
    worker = worker_row(ctl, batch.worker)
    if worker.epoll >= 0:
        ctl.waits.since = 0
        while not finished(batch) and not missing(resolve(ctl, handle)) and clock(ctl) - since < ns:
            if try_turn(worker):
                turn_until(ctl, worker, batch, handle, since + ns)
            elif not lingers(ctl, ctl.waits):
                break
        spin = np.int64(0)
    else:
        spin = min(ctl.spin, ns)
    while not finished(batch):
        for _ in range(PAUSES):
            pause()
        if clock(ctl) - since > spin:
            break
    left = ns - (clock(ctl) - since)
    if not finished(batch) and left > 0:
        fetch_add(batch, "waiters", 1)
        fence()
        state = acquire(batch, "state")
        if state != RECLAIMABLE and not missing(resolve(ctl, handle)):
            sleep_on(ctl, where(batch, "state"), state, left)
        fetch_add(batch, "waiters", -1)
    return look_up(ctl, handle)


@kernel
def turn_until(ctl, worker, batch, handle, end):
    """Work as the worker, whose turn the caller holds, until the batch is finished or closed, or `end` has come.

    Lets go of the turn. Sleeps on the worker's descriptors like its own thread: Linux wakes the last to come.
    """
    happened = np.int64(1)
    while not finished(batch) and not missing(resolve(ctl, handle)):
        happened = call_words(ctl.turn, worker.ctl, np.int64(0))
        if happened > 0:
            continue
        left = end - clock(ctl)
        if left <= 0 or acquire(shared_at(ctl.shared), "stop") != 0:
            break
        if worker.spins != 0 and busy(ctl, worker):
            pause()
        elif not lingers(ctl, worker.idle):
            release(worker, "epoch", EPOCH_QUIET)
            sleep_on_descriptors(ctl, worker, left)
    end_turn(ctl, worker)
    if happened > 0 or work_waits(ctl, worker):
        ring_bell(ctl, worker)


@kernel("int64(int64, int64)")
def await_finish(ctl, handle):
    """Ask for a write to the engine's eventfd when the batch finishes. Return `status`, looked up afterwards."""
    ctl = control_at(ctl)
    batch = resolve(ctl, handle)
    if not missing(batch):
        release(batch, "awaited", 1)
        fence()
    return look_up(ctl, handle)


@kernel("int64(int64)")
def capacity_bell(ctl):
    """Read the bell's value now: before the attempt whose failure is to be waited out."""
    ctl = control_at(ctl)
    return acquire(shared_at(ctl.shared), "bell")


@kernel("int64(int64, int64, int64)", nogil=True)
def wait_capacity(ctl, seen, ns):
    """Sleep until chunks or batch rows came back since the bell was `seen`, for at most `ns`. Gives the GIL up."""
    ctl = control_at(ctl)
    shared = shared_at(ctl.shared)
    fetch_add(shared, "waiters", 1)
    fence()
    if acquire(shared, "bell") == seen:
        sleep_on(ctl, where(shared, "bell"), seen, ns)
    fetch_add(shared, "waiters", -1)
    return 0


@kernel("int64(int64, int64)")
def await_capacity(ctl, seen):
    """Ask for a write to the engine's eventfd when chunks or batch rows come back.

    Return 1 when they have since the bell was `seen`, looked up afterwards.
    """
    ctl = control_at(ctl)
    shared = shared_at(ctl.shared)
    release(shared, "awaited", 1)
    fence()
    return np.int64(acquire(shared, "bell") != seen)
