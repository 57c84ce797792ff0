"""The life of a queue pair: how it breaks, and comes to be posted to again.

    READY --an error--> BROKEN --all flushed--> DRAINED --order: post it all again--------------> CLOSED
      ^                   ^                        \\--order: the peer is gone, all of it fails----/ |
      |                   +--it did not--\\                                                          |
      +--an empty write got through-- PROBING <------------order: it is connected anew--------------+

What came back from a broken queue is held, not posted again at once: until the peer has closed its end, a packet of
it might still arrive, over bytes that by then belong to somebody else. Who owns the connection sees to that, and gives
the order.
"""

from enum import IntEnum

import numpy as np

from mooncache.kernels.enums import Order, QueueState
from mooncache.kernels.handle import SLOT_MASK
from mooncache.kernels.jit import kernel
from mooncache.kernels.look import region_refused
from mooncache.kernels.queue import ANSWERED, BLAMED, HELD, INCARNATION, SLICES_MASK, SLICES_SHIFT, entry_at, in_flight
from mooncache.kernels.records.base import acquire, fetch_add, release, swap
from mooncache.kernels.records.endpoint import endpoint_at
from mooncache.kernels.retry import answer_entry
from mooncache.kernels.verbs import WcStatus
from mooncache.kernels.worker import write_one


class Event(IntEnum):
    """The events that move a queue pair on."""

    BREAK = 0  # an error came, or the order to break
    DRAIN = 1  # all that was in flight has come back
    CLOSE = 2  # what it held was answered
    PROBE = 3  # it was connected anew
    PASS = 4  # a work request got through


REFUSED = -1
NEXT = np.full((len(QueueState), len(Event)), REFUSED, np.int64)
NEXT[QueueState.READY, Event.BREAK] = QueueState.BROKEN
NEXT[QueueState.BROKEN, Event.DRAIN] = QueueState.DRAINED
NEXT[QueueState.BROKEN, Event.CLOSE] = QueueState.CLOSED  # at once, where the peer is gone
NEXT[QueueState.DRAINED, Event.CLOSE] = QueueState.CLOSED
NEXT[QueueState.CLOSED, Event.PROBE] = QueueState.PROBING
NEXT[QueueState.PROBING, Event.BREAK] = QueueState.BROKEN
NEXT[QueueState.PROBING, Event.PASS] = QueueState.READY

BREAK, DRAIN, CLOSE, PROBE, PASS = (int(event) for event in Event)


@kernel
def after(queue, event):
    """Return the state that an event moves a queue pair to; REFUSED where the event changes nothing."""
    return NEXT[queue.state, event]


@kernel
def move(ctl, worker, queue, state):
    """Move a queue pair on, and let the owner of its connection know."""
    release(queue, "state", state)
    if worker.trouble_fd >= 0:
        write_one(ctl, worker.trouble_fd)


# ------------------------------------------------------------------------------ moving on
@kernel
def break_queue(ctl, worker, queue, cause):
    """Post nothing more on a queue with an error. Its owner sees to it that all that is in flight comes back."""
    broken = after(queue, BREAK)
    if broken != REFUSED:
        queue.cause = cause
        worker.undecided += 1
        move(ctl, worker, queue, broken)


@kernel
def look_drained(ctl, worker, queue):
    """Move a broken queue on once all in flight has come back: to wait for an order, or to fail if its peer is gone."""
    drained = after(queue, DRAIN)
    if drained == REFUSED or not all_back(queue):
        return
    if endpoint_at(queue.endpoint).lost != 0:
        answer_held(ctl, worker, queue, WcStatus.REM_ABORT_ERR)
    else:
        move(ctl, worker, queue, drained)


@kernel
def all_back(queue):
    """Return whether all that a queue had in flight has come back: it does so in order."""
    return in_flight(queue) == 0 or entry_at(queue, queue.head - 1).value & (ANSWERED | HELD) != 0


@kernel
def look_on(ctl, worker, queue):
    """Note that a work request got through on a queue that is not ready: a probe makes it so; or it has drained."""
    passed = after(queue, PASS)
    if passed != REFUSED:
        move(ctl, worker, queue, passed)
    else:
        look_drained(ctl, worker, queue)


@kernel
def answer_held(ctl, worker, queue, wc_status):
    """Answer what a drained queue holds: as flushed, so that it is posted again, or as the end of the peer.

    What broke the queue pays with one of its attempts; where nothing did, as when a port went down, all do.
    """
    nobody = queue.cause == WcStatus.WR_FLUSH_ERR
    for sequence in range(queue.tail, queue.head):
        entry = entry_at(queue, sequence).value
        if entry & ANSWERED == 0:
            status = wc_status
            if entry >> SLICES_SHIFT & SLICES_MASK > 0 and region_refused(ctl, entry & SLOT_MASK):
                status = np.int64(WcStatus.REM_ACCESS_ERR)
            answer_entry(ctl, worker, entry, status, nobody or entry & BLAMED != 0)
    queue.tail = queue.head
    queue.loose = 0
    worker.undecided -= 1
    move(ctl, worker, queue, after(queue, CLOSE))


@kernel
def reincarnate(queue):
    """Reset a queue that is connected anew: completions from before name nothing."""
    tag = queue.tag
    queue.tag = (tag & ~(0xFFFF << 32)) | ((tag + INCARNATION) & (0xFFFF << 32))


# ------------------------------------------------------------------------------ orders
@kernel
def give_order(worker, queue, order):
    """Leave an order for the worker, in place of one that was not seen yet. Any thread; ring the worker's bell then."""
    if swap(queue, "order", order) == Order.NONE:
        fetch_add(worker, "orders", 1)


@kernel
def take_order(worker, queue):
    """Take the order given to a queue, if any."""
    if acquire(queue, "order") == Order.NONE:
        return np.int64(Order.NONE)
    fetch_add(worker, "orders", -1)
    return swap(queue, "order", Order.NONE)


@kernel
def obey(ctl, worker, queue, order):
    """Carry out one order. One that a queue pair in its state cannot follow changes nothing."""
    drained = queue.state == QueueState.DRAINED
    if order == Order.BREAK:
        break_queue(ctl, worker, queue, WcStatus.WR_FLUSH_ERR)
        look_drained(ctl, worker, queue)
    elif order == Order.RETURN and drained:
        answer_held(ctl, worker, queue, WcStatus.WR_FLUSH_ERR)
    elif order == Order.LOSE:
        endpoint_at(queue.endpoint).lost = 1
        break_queue(ctl, worker, queue, WcStatus.REM_ABORT_ERR)
        if drained:
            answer_held(ctl, worker, queue, WcStatus.REM_ABORT_ERR)
        else:
            look_drained(ctl, worker, queue)
    elif order == Order.PROBE and after(queue, PROBE) != REFUSED:
        endpoint_at(queue.endpoint).lost = 0
        reincarnate(queue)
        queue.state = after(queue, PROBE)
        worker.owes = 1
