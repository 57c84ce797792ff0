"""The worker's loop: take batches, post, poll, complete, retry, reclaim; spin a little when idle, then sleep.

In production a thread enters `pump`, gives the GIL up once and stays until the engine stops. In the simulation the
same loop runs in virtual time and comes back whenever something outside it may have to act: at the horizon, when a
batch has finished, and when there is nothing to do.
"""

from enum import IntEnum

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import account, clock, raise_word, word
from mooncache.kernels.atomics import call_word, fence, i64, load, pause, peek, poke, store
from mooncache.kernels.batch import DRAINING, SEALED
from mooncache.kernels.complete import answer_held, look_drained, poll, settle
from mooncache.kernels.handle import batch_row, row_of
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    ACTOR,
    BATCH_CANCELLED,
    BATCH_DEADLINE,
    BATCH_GENERATION,
    BATCH_NOTE,
    BATCH_PEER,
    BATCH_POSTED,
    BATCH_REMAINING,
    BATCH_STATE,
    BATCH_TAKEN,
    BATCH_UNPOSTED,
    BATCH_WORKER,
    BATCHES,
    COUNTERS,
    CQ_ADDRESS,
    CQ_WORDS,
    ENDPOINT_FIRST,
    ENDPOINT_LOST,
    HORIZON,
    IDLE_SINCE,
    NEXT_COMPLETION,
    NOW,
    POLICY,
    QUEUE_ENDPOINT,
    QUEUE_STATE,
    REAPER_PERIOD,
    RETIRED_RING,
    RING_EMPTY,
    SHARED,
    SHARED_REAPER_BELL,
    SHARED_REAPER_PARKED,
    SHARED_REAPER_STOP,
    SHARED_STOP,
    SLEEPING,
    SPIN,
    SYSCALL,
    TIME_BUSY,
    VIRTUAL,
    WORD,
    WORKER_BELL,
    WORKER_CQ_COUNT,
    WORKER_CQS,
    WORKER_EPOLL,
    WORKER_IDLE,
    WORKER_LOOKED,
    WORKER_NEXT_DEADLINE,
    WORKER_NOTES,
    WORKER_ORDERS,
    WORKER_OUTSTANDING,
    WORKER_OWES,
    WORKER_PARKED,
    WORKER_PEERS,
    WORKER_QUEUE_COUNT,
    WORKER_QUEUED,
    WORKER_QUEUES,
    WORKER_RETRY_FIRST,
    WORKER_RING,
    WORKER_SERVES,
    WORKER_SPINS,
    WORKER_UNDECIDED,
    Kind,
    Order,
    Policy,
    QueueState,
)
from mooncache.kernels.linger import lingers
from mooncache.kernels.linux import epoll_wait
from mooncache.kernels.look import resume
from mooncache.kernels.note import enqueue_note
from mooncache.kernels.post import (
    enqueue,
    post_batches,
    post_markers,
    post_note,
    post_retries,
    stop_posting,
    take_posted_back,
)
from mooncache.kernels.queue import break_queue, reincarnate, take_order
from mooncache.kernels.reclaim.dispatch import on_idle, reap_lot
from mooncache.kernels.reclaim.epoch import announce_epoch
from mooncache.kernels.ring import first, pop
from mooncache.kernels.verbs import WcStatus
from mooncache.kernels.worker import end_turn, endpoint_row, sleep_on, take_turn, worker_row

NS_PER_MS = 1_000_000
GRACE_NS = 20 * NS_PER_MS  # past its deadline a batch waits so long for the answers of what it has posted
LOOK_AGAIN_NS = NS_PER_MS  # at a batch that changed while its deadline was looked at
HEARTBEAT_NS = 500_000_000  # a sleeper looks around this often even if nobody rings
ABANDONED = 2  # SHARED_STOP: leave although the NIC has not answered
PAUSES = 64  # between two looks at the clock while spinning


class Pump(IntEnum):
    """Why `pump` came back."""

    STOPPED = 0
    HORIZON = 1
    FINISHED = 2
    IDLE = 3


@kernel
def take(ctl, worker, index):
    """Move everything from the submission ring into the endpoints' queues; returns how many entries."""
    ring, taken = peek(worker + WORKER_RING * WORD), 0
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
def take_batch(ctl, worker, index, row):
    """Let a batch queue at its endpoint for its slices to be posted, and for its notification."""
    account(ctl, Kind.BATCHES_TAKEN, 1)
    peer = peek(row + BATCH_PEER * WORD)
    poke(row + BATCH_TAKEN * WORD, 1)
    note_deadline(worker, peek(row + BATCH_DEADLINE * WORD))
    poke(worker + WORKER_PEERS * WORD, max(peek(worker + WORKER_PEERS * WORD), peer + 1))
    if peek(row + BATCH_NOTE * WORD) >= 0:
        enqueue_note(ctl, worker, endpoint_row(ctl, index, peer), row)
    if peek(row + BATCH_UNPOSTED * WORD) > 0:
        enqueue(ctl, worker, endpoint_row(ctl, index, peer), row)
    else:
        settle(ctl, row)


@kernel
def cancel_entry(ctl, worker, index, handle):
    """Stop posting for the batch that `handle` names, if it still is that batch and has slices without an answer."""
    named = row_of(ctl, handle)
    if named != 0 and load(named + BATCH_REMAINING * WORD) > 0 and row_of(ctl, handle) != 0:
        stop_posting(ctl, worker, index, named, Status.CANCELLED)


@kernel
def post(ctl, worker, index):
    """One pass over retries and all endpoints; returns slices that left their queues."""
    moved = post_retries(ctl, worker, index)
    if peek(worker + WORKER_QUEUED * WORD) > 0:
        for peer in range(peek(worker + WORKER_PEERS * WORD)):
            endpoint = endpoint_row(ctl, index, peer)
            if peek(endpoint + ENDPOINT_FIRST * WORD) >= 0:
                moved += post_batches(ctl, worker, index, endpoint)
    if peek(worker + WORKER_NOTES * WORD) > 0:
        for peer in range(peek(worker + WORKER_PEERS * WORD)):
            moved += post_note(ctl, worker, index, endpoint_row(ctl, index, peer))
    if peek(worker + WORKER_OWES * WORD) != 0:
        moved += post_markers(ctl, worker)
    return moved


@kernel
def decide(ctl, worker):
    """Carry out the orders given to queue pairs; returns how many."""
    happened, queues = np.int64(0), i64(peek(worker + WORKER_QUEUES * WORD))
    for i in range(load(worker + WORKER_QUEUE_COUNT * WORD)):
        queue = queues[i]
        order = take_order(worker, queue)
        if order != Order.NONE:
            obey(ctl, worker, queue, order)
            happened += 1
    return happened


@kernel
def obey(ctl, worker, queue, order):
    """Carry out one order; see kernels/queue.py."""
    state = peek(queue + QUEUE_STATE * WORD)
    if order == Order.BREAK:
        break_queue(ctl, worker, queue, WcStatus.WR_FLUSH_ERR)
        look_drained(ctl, worker, queue)
    elif order == Order.RETURN and state == QueueState.DRAINED:
        answer_held(ctl, worker, queue, WcStatus.WR_FLUSH_ERR)
    elif order == Order.LOSE:
        poke(peek(queue + QUEUE_ENDPOINT * WORD) + ENDPOINT_LOST * WORD, 1)
        break_queue(ctl, worker, queue, WcStatus.REM_ABORT_ERR)
        if state == QueueState.DRAINED:
            answer_held(ctl, worker, queue, WcStatus.REM_ABORT_ERR)
        else:
            look_drained(ctl, worker, queue)
    elif order == Order.PROBE and state == QueueState.CLOSED:
        poke(peek(queue + QUEUE_ENDPOINT * WORD) + ENDPOINT_LOST * WORD, 0)
        reincarnate(queue)
        poke(queue + QUEUE_STATE * WORD, QueueState.PROBING)
        poke(worker + WORKER_OWES * WORD, 1)


@kernel
def expire(ctl, worker, index):
    """Stop this worker's batches whose deadline has passed, and note when to look again.

    Looks at all rows, some hundred microseconds, but only when a deadline has passed.
    """
    now = clock(ctl)
    poke(worker + WORKER_NEXT_DEADLINE * WORD, 0)
    for slot in range(word(ctl, BATCHES)):
        row = batch_row(ctl, slot)
        generation, state = load(row + BATCH_GENERATION * WORD), load(row + BATCH_STATE * WORD)
        if state != SEALED and state != DRAINING:
            continue
        if load(row + BATCH_REMAINING * WORD) == 0 or peek(row + BATCH_DEADLINE * WORD) == 0:
            continue
        if load(row + BATCH_WORKER * WORD) != index or load(row + BATCH_TAKEN * WORD) == 0:
            continue
        if load(row + BATCH_GENERATION * WORD) != generation:  # closed just now, or another batch
            note_deadline(worker, now + LOOK_AGAIN_NS)
        else:
            note_deadline(worker, stop_overdue(ctl, worker, index, row, now))


@kernel
def note_deadline(worker, at):
    """Let the worker look for overdue batches at this time, ns; 0: no need to."""
    due = peek(worker + WORKER_NEXT_DEADLINE * WORD)
    if at != 0 and (due == 0 or at < due):
        poke(worker + WORKER_NEXT_DEADLINE * WORD, at)


@kernel
def stop_overdue(ctl, worker, index, row, now):
    """Stop a batch if its deadline has passed; returns when to look at it again, 0 for never.

    What is not posted fails now. What is posted has a grace for answers on their way; then its wire gives it back.
    """
    deadline, posted = peek(row + BATCH_DEADLINE * WORD), peek(row + BATCH_POSTED * WORD)
    if now < deadline:
        return deadline
    if posted > 0 and now >= deadline + GRACE_NS:
        take_posted_back(ctl, worker, index, row)
    if peek(row + BATCH_CANCELLED * WORD) == 0:
        stop_posting(ctl, worker, index, row, Status.TIMED_OUT)
    if posted == 0:
        return np.int64(0)
    return max(deadline, now) + GRACE_NS


@kernel
def busy(ctl, worker):
    """Whether the worker has anything to do or to wait for."""
    return (
        peek(worker + WORKER_OUTSTANDING * WORD) > 0
        or peek(worker + WORKER_QUEUED * WORD) > 0
        or first(peek(worker + WORKER_RING * WORD)) != RING_EMPTY
        or peek(worker + WORKER_RETRY_FIRST * WORD) >= 0
        or peek(worker + WORKER_UNDECIDED * WORD) > 0
        or load(worker + WORKER_ORDERS * WORD) > 0
        or load(worker + WORKER_LOOKED * WORD) != 0
        or retired_waits(ctl)
    )


@kernel
def retired_waits(ctl):
    """Whether the epoch policy has batches to free in an idle moment."""
    return word(ctl, POLICY) == Policy.EPOCH and first(word(ctl, RETIRED_RING)) != RING_EMPTY


@kernel
def nap(ctl, worker, ns):
    """How long to sleep, ns: no longer than until the next deadline, or the next look around."""
    ns, due = min(ns, HEARTBEAT_NS), peek(worker + WORKER_NEXT_DEADLINE * WORD)
    return ns if due == 0 else max(min(ns, due - clock(ctl)), np.int64(0))


@kernel
def sleep_on_descriptors(ctl, worker, ns):
    """Sleep until the worker's eventfd, or a descriptor of its wire, stirs; for at most `ns`."""
    ms = -(-nap(ctl, worker, ns) // NS_PER_MS)
    epoll_wait(word(ctl, SYSCALL), peek(worker + WORKER_EPOLL * WORD), ctl + SLEEPING * WORD, 1, ms)


@kernel
def work_waits(ctl, worker):
    """Whether there is something to do that no descriptor will tell of."""
    if peek(worker + WORKER_SPINS * WORD) != 0:
        return busy(ctl, worker)
    return (
        first(peek(worker + WORKER_RING * WORD)) != RING_EMPTY
        or load(worker + WORKER_ORDERS * WORD) > 0
        or load(worker + WORKER_LOOKED * WORD) != 0
        or retired_waits(ctl)
    )


@kernel
def park(ctl, worker):
    """Sleep until there is work. The worker announces itself as asleep first, looks once more, and lets its turn go."""
    seen = load(worker + WORKER_BELL * WORD)
    store(worker + WORKER_PARKED * WORD, 1)
    fence()
    if not work_waits(ctl, worker) and load(word(ctl, SHARED) + SHARED_STOP * WORD) == 0:
        account(ctl, Kind.PARKS, 1)
        end_turn(ctl, worker)
        if peek(worker + WORKER_EPOLL * WORD) < 0:
            sleep_on(ctl, worker + WORKER_BELL * WORD, seen, nap(ctl, worker, HEARTBEAT_NS))
        else:
            sleep_on_descriptors(ctl, worker, HEARTBEAT_NS)
        take_turn(ctl, worker)
    store(worker + WORKER_PARKED * WORD, 0)


@kernel
def idle_real(ctl, worker):
    """Nothing happened: poll on while the NIC has work requests; else spin briefly, then sleep."""
    if peek(worker + WORKER_SPINS * WORD) == 0:
        if not lingers(ctl, worker + WORKER_IDLE * WORD):
            park(ctl, worker)
        return
    if peek(worker + WORKER_OUTSTANDING * WORD) > 0:
        pause()
        return
    since = clock(ctl)
    while first(peek(worker + WORKER_RING * WORD)) == RING_EMPTY:
        announce_epoch(ctl, worker)  # it looks at nothing meanwhile
        for _ in range(PAUSES):
            pause()
        if busy(ctl, worker) or load(word(ctl, SHARED) + SHARED_STOP * WORD) != 0:
            return
        if clock(ctl) - since > word(ctl, SPIN):
            park(ctl, worker)
            return


@kernel
def idle_virtual(ctl, worker):
    """Nothing happened: let virtual time pass up to the next completion. False when that lies beyond the horizon."""
    if peek(worker + WORKER_OUTSTANDING * WORD) == 0:
        return False
    due = np.int64(word(ctl, HORIZON) + 1)
    for i in range(peek(worker + WORKER_CQ_COUNT * WORD)):
        cq = peek(worker + WORKER_CQS * WORD) + i * CQ_WORDS * WORD
        due = min(due, call_word(word(ctl, NEXT_COMPLETION), peek(cq + CQ_ADDRESS * WORD)))
    if due > word(ctl, HORIZON):
        return False
    poke(ctl + NOW * WORD, max(due, word(ctl, NOW)))
    return True


@kernel
def turn(ctl, worker, index):
    """One round of the worker; returns how much happened. The order is that of a slice's life."""
    announce_epoch(ctl, worker)
    happened = take(ctl, worker, index)
    if peek(worker + WORKER_NEXT_DEADLINE * WORD) != 0 and clock(ctl) >= peek(worker + WORKER_NEXT_DEADLINE * WORD):
        expire(ctl, worker, index)
    if load(worker + WORKER_ORDERS * WORD) > 0:
        happened += decide(ctl, worker)
    if load(worker + WORKER_LOOKED * WORD) != 0:
        store(worker + WORKER_LOOKED * WORD, 0)
        resume(ctl, worker)
    happened += post(ctl, worker, index)
    if peek(worker + WORKER_OUTSTANDING * WORD) > 0 or peek(worker + WORKER_SERVES * WORD) != 0:
        happened += poll(ctl, worker)
    if happened > 0:
        poke(worker + (WORKER_IDLE + IDLE_SINCE) * WORD, 0)
    return happened


@kernel("int64(int64)", nogil=True)
def pump(ctl):
    """Run the worker of this control block until it stops (production) or must let others act (simulation)."""
    index = word(ctl, ACTOR)
    worker = worker_row(ctl, index)
    virtual = word(ctl, VIRTUAL) != 0
    finished = word(ctl, COUNTERS) + Kind.BATCHES_FINISHED * WORD
    if not virtual:
        take_turn(ctl, worker)
    before, since = peek(finished), clock(ctl)
    while True:
        happened = turn(ctl, worker, index) > 0
        if not happened:
            happened = on_idle(ctl)
        if virtual:
            if peek(finished) != before:
                return np.int64(Pump.FINISHED)
            if not happened and not idle_virtual(ctl, worker):
                return np.int64(Pump.IDLE)
            if word(ctl, NOW) >= word(ctl, HORIZON):
                return np.int64(Pump.HORIZON)
        elif not happened:
            raise_word(ctl + TIME_BUSY * WORD, clock(ctl) - since)
            stop = load(word(ctl, SHARED) + SHARED_STOP * WORD)
            if stop == ABANDONED or (stop != 0 and not busy(ctl, worker)):
                end_turn(ctl, worker)
                return np.int64(Pump.STOPPED)
            idle_real(ctl, worker)
            since = clock(ctl)


@kernel("int64(int64)", nogil=True)
def reaper(ctl):
    """Run the reaper of the `deferred` policy until the engine stops: free a lot, pause for a period, again."""
    shared = word(ctl, SHARED)
    bell, parked = shared + SHARED_REAPER_BELL * WORD, shared + SHARED_REAPER_PARKED * WORD
    ring = word(ctl, RETIRED_RING)
    while load(shared + SHARED_REAPER_STOP * WORD) == 0 or first(ring) != RING_EMPTY:
        seen = load(bell)
        if reap_lot(ctl) > 0:
            if load(shared + SHARED_REAPER_STOP * WORD) == 0:
                sleep_on(ctl, bell, seen, word(ctl, REAPER_PERIOD))
            continue
        store(parked, 1)
        fence()
        if first(ring) == RING_EMPTY and load(shared + SHARED_REAPER_STOP * WORD) == 0:
            account(ctl, Kind.PARKS, 1)
            sleep_on(ctl, bell, seen, HEARTBEAT_NS)
        store(parked, 0)
    return np.int64(Pump.STOPPED)
