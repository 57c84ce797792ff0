"""The worker's loop: take batches, post, poll, complete, retry, reclaim; spin a little when idle, then sleep.

In production a thread enters `pump`, gives the GIL up once and stays until the engine stops. In the simulation the
same loop runs in virtual time and comes back whenever something outside it may have to act: at the horizon, when a
batch has finished, and when there is nothing to do.
"""

from enum import IntEnum

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import account, clock
from mooncache.kernels.atomics import call_word, fence, i64, pause
from mooncache.kernels.complete import poll
from mooncache.kernels.enums import Kind, Order
from mooncache.kernels.handle import batch_row, row_of
from mooncache.kernels.jit import kernel
from mooncache.kernels.linger import lingers
from mooncache.kernels.linux import epoll_wait
from mooncache.kernels.note import enqueue_note
from mooncache.kernels.overdue import expire, note_deadline
from mooncache.kernels.post import (
    enqueue,
    post_batches,
    post_markers,
    post_note,
    stop_posting,
)
from mooncache.kernels.reclaim.dispatch import on_idle, reap_lot, retired_waits
from mooncache.kernels.reclaim.epoch import announce_epoch
from mooncache.kernels.records.base import acquire, missing, release, where
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.queue import cq_at, queue_at
from mooncache.kernels.records.ring import RING_EMPTY, ring_at
from mooncache.kernels.records.shared import shared_at
from mooncache.kernels.repair import obey, take_order
from mooncache.kernels.retry import post_retries, resume
from mooncache.kernels.ring import first, pop
from mooncache.kernels.settle import settle
from mooncache.kernels.worker import end_turn, endpoint_row, sleep_on, take_turn, worker_row

NS_PER_MS = 1_000_000
HEARTBEAT_NS = 500_000_000  # a sleeper looks around this often even if nobody rings
ABANDONED = 2  # of `shared.stop`: leave although the NIC has not answered
PAUSES = 64  # between two looks at the clock while spinning


class Pump(IntEnum):
    """The reason for which `pump` came back."""

    STOPPED = 0
    HORIZON = 1
    FINISHED = 2
    IDLE = 3


@kernel
def take(ctl, worker, index):
    """Move everything from the submission ring into the endpoints' queues; return how many entries."""
    ring, taken = ring_at(worker.ring), 0
    while True:
        entry = pop(ring)
        if entry == RING_EMPTY:
            return taken
        taken += 1
        if entry >= 0:
            take_batch(ctl, worker, index, batch_row(ctl, entry))
        else:
            cancel_entry(ctl, worker, index, ~entry)


@kernel
def take_batch(ctl, worker, index, batch):
    """Queue a batch at its endpoint for its slices to be posted, and for its notification."""
    account(ctl, Kind.BATCHES_TAKEN, 1)
    peer = batch.peer
    batch.taken = 1
    note_deadline(worker, batch.deadline)
    worker.peers = max(worker.peers, peer + 1)
    if batch.note >= 0:
        enqueue_note(ctl, worker, endpoint_row(ctl, index, peer), batch)
    if batch.unposted > 0:
        enqueue(ctl, worker, endpoint_row(ctl, index, peer), batch)
    else:
        settle(ctl, batch)


@kernel
def cancel_entry(ctl, worker, index, handle):
    """Stop posting for the batch that `handle` names, if it still is that batch and has slices without an answer."""
    named = row_of(ctl, handle)
    if not missing(named) and acquire(named, "remaining") > 0 and not missing(row_of(ctl, handle)):
        stop_posting(ctl, worker, index, named, Status.CANCELLED)


@kernel
def post(ctl, worker, index):
    """Run once over retries and all endpoints; return slices that left their queues."""
    moved = post_retries(ctl, worker, index)
    if worker.queued > 0:
        for peer in range(worker.peers):
            endpoint = endpoint_row(ctl, index, peer)
            if endpoint.to_post.first >= 0:
                moved += post_batches(ctl, worker, index, endpoint)
    if worker.notes > 0:
        for peer in range(worker.peers):
            moved += post_note(ctl, worker, index, endpoint_row(ctl, index, peer))
    if worker.owes != 0:
        moved += post_markers(ctl, worker)
    return moved


@kernel
def decide(ctl, worker):
    """Obey the orders given to queue pairs; return how many."""
    happened, queues = np.int64(0), i64(worker.queues)
    for i in range(acquire(worker, "queue_count")):
        queue = queue_at(queues[i])
        order = take_order(worker, queue)
        if order != Order.NONE:
            obey(ctl, worker, queue, order)
            happened += 1
    return happened


@kernel
def busy(ctl, worker):
    """Return whether the worker has anything to do or to wait for."""
    return (
        worker.outstanding > 0
        or worker.queued > 0
        or first(ring_at(worker.ring)) != RING_EMPTY
        or worker.retry.first >= 0
        or worker.undecided > 0
        or acquire(worker, "orders") > 0
        or acquire(worker, "looked") != 0
        or retired_waits(ctl)
    )


@kernel
def nap(ctl, worker, ns):
    """Return how long to sleep, ns: no longer than until the next deadline, or the next look around."""
    ns, due = min(ns, HEARTBEAT_NS), worker.next_deadline
    return ns if due == 0 else max(min(ns, due - clock(ctl)), np.int64(0))


@kernel
def sleep_on_descriptors(ctl, worker, ns):
    """Sleep until the worker's eventfd, or a descriptor of its wire, stirs; for at most `ns`."""
    ms = -(-nap(ctl, worker, ns) // NS_PER_MS)
    epoll_wait(ctl.syscall, worker.epoll, where(ctl, "sleep"), 1, ms)


@kernel
def work_waits(ctl, worker):
    """Return whether there is something to do that no descriptor will tell of."""
    if worker.spins != 0:
        return busy(ctl, worker)
    return (
        first(ring_at(worker.ring)) != RING_EMPTY
        or acquire(worker, "orders") > 0
        or acquire(worker, "looked") != 0
        or retired_waits(ctl)
    )


@kernel
def park(ctl, worker):
    """Sleep until there is work. The worker announces itself as asleep first, looks once more, and lets its turn go."""
    seen = acquire(worker, "bell")
    release(worker, "parked", 1)
    fence()
    if not work_waits(ctl, worker) and acquire(shared_at(ctl.shared), "stop") == 0:
        account(ctl, Kind.PARKS, 1)
        end_turn(ctl, worker)
        if worker.epoll < 0:
            sleep_on(ctl, where(worker, "bell"), seen, nap(ctl, worker, HEARTBEAT_NS))
        else:
            sleep_on_descriptors(ctl, worker, HEARTBEAT_NS)
        take_turn(ctl, worker)
    release(worker, "parked", 0)


@kernel
def idle_real(ctl, worker):
    """Poll on while the NIC has work requests, as nothing happened; else spin briefly, then sleep."""
    if worker.spins == 0:
        if not lingers(ctl, worker.idle):
            park(ctl, worker)
        return
    if worker.outstanding > 0:
        pause()
        return
    since = clock(ctl)
    while first(ring_at(worker.ring)) == RING_EMPTY:
        announce_epoch(ctl, worker)  # it looks at nothing meanwhile
        for _ in range(PAUSES):
            pause()
        if busy(ctl, worker) or acquire(shared_at(ctl.shared), "stop") != 0:
            return
        if clock(ctl) - since > ctl.spin:
            park(ctl, worker)
            return


@kernel
def idle_virtual(ctl, worker):
    """Let virtual time pass up to the next completion. False when that lies beyond the horizon."""
    if worker.outstanding == 0:
        return False
    due = np.int64(ctl.horizon + 1)
    for i in range(worker.cq_count):
        cq = cq_at(worker.cqs, i)
        due = min(due, call_word(ctl.next_completion, cq.address))
    if due > ctl.horizon:
        return False
    ctl.now = max(due, ctl.now)
    return True


@kernel
def turn(ctl, worker, index):
    """Run one round of the worker; return how much happened. The order is that of a slice's life."""
    announce_epoch(ctl, worker)
    happened = take(ctl, worker, index)
    if worker.next_deadline != 0 and clock(ctl) >= worker.next_deadline:
        expire(ctl, worker, index)
    if acquire(worker, "orders") > 0:
        happened += decide(ctl, worker)
    if acquire(worker, "looked") != 0:
        release(worker, "looked", 0)
        resume(ctl, worker)
    happened += post(ctl, worker, index)
    if worker.outstanding > 0 or worker.serves != 0:
        happened += poll(ctl, worker)
    if happened > 0:
        worker.idle.since = 0
    return happened


@kernel("int64(int64)", nogil=True)
def pump(ctl):
    """Run the worker of this control block until it stops (production) or must let others act (simulation)."""
    ctl = control_at(ctl)
    index = ctl.actor
    worker = worker_row(ctl, index)
    virtual = ctl.virtual != 0
    counters = i64(ctl.counters)
    if not virtual:
        take_turn(ctl, worker)
    before, since = counters[np.int64(Kind.BATCHES_FINISHED)], clock(ctl)
    while True:
        happened = turn(ctl, worker, index) > 0
        if not happened:
            happened = on_idle(ctl)
        if virtual:
            if counters[np.int64(Kind.BATCHES_FINISHED)] != before:
                return np.int64(Pump.FINISHED)
            if not happened and not idle_virtual(ctl, worker):
                return np.int64(Pump.IDLE)
            if ctl.now >= ctl.horizon:
                return np.int64(Pump.HORIZON)
        elif not happened:
            ctl.time_busy += clock(ctl) - since
            stop = acquire(shared_at(ctl.shared), "stop")
            if stop == ABANDONED or (stop != 0 and not busy(ctl, worker)):
                end_turn(ctl, worker)
                return np.int64(Pump.STOPPED)
            idle_real(ctl, worker)
            since = clock(ctl)


@kernel("int64(int64)", nogil=True)
def reaper(ctl):
    """Run the reaper of the `deferred` policy until the engine stops: free a lot, pause for a period, again."""
    ctl = control_at(ctl)
    shared = shared_at(ctl.shared)
    bell, ring = where(shared, "reaper_bell"), ring_at(ctl.retired_ring)
    while acquire(shared, "reaper_stop") == 0 or first(ring) != RING_EMPTY:
        seen = acquire(shared, "reaper_bell")
        if reap_lot(ctl) > 0:
            if acquire(shared, "reaper_stop") == 0:
                sleep_on(ctl, bell, seen, ctl.reaper_period)
            continue
        release(shared, "reaper_parked", 1)
        fence()
        if first(ring) == RING_EMPTY and acquire(shared, "reaper_stop") == 0:
            account(ctl, Kind.PARKS, 1)
            sleep_on(ctl, bell, seen, HEARTBEAT_NS)
        release(shared, "reaper_parked", 0)
    return np.int64(Pump.STOPPED)
