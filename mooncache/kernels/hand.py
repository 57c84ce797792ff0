"""A worker's turn in other hands while its thread sleeps: a waiting thread takes it, or a submitter.

A thread that waits has given the GIL up and may do all that the worker would. A submitter holds it: it does what its
own small batch needs and nothing else, whatever else there is to do.
"""

import numpy as np

from mooncache.kernels.account import clock
from mooncache.kernels.atomics import i64
from mooncache.kernels.batch import slot_of
from mooncache.kernels.complete import apply_lot
from mooncache.kernels.enums import AtOnce, Note
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.post import post_batches, post_note
from mooncache.kernels.pump import HEARTBEAT_NS, take_batch, turn, work_waits
from mooncache.kernels.reclaim.dispatch import on_idle
from mooncache.kernels.reclaim.epoch import announce_epoch
from mooncache.kernels.records.base import missing
from mooncache.kernels.records.batch import batch_at
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.queue import cq_at, queue_at
from mooncache.kernels.records.ring import RING_EMPTY, ring_at
from mooncache.kernels.ring import first
from mooncache.kernels.verbs import push
from mooncache.kernels.worker import endpoint_row, worker_row


@callback("int64(int64, int64)")
def turn_once(ctl, batch):
    """Run one round of the worker that `ctl` belongs to, whose turn the caller holds; return how much happened.

    With the row of a batch that no worker knows of yet: what `post_at_once` does.
    """
    ctl = control_at(ctl)
    batch = batch_at(batch)
    since, index = clock(ctl), ctl.actor
    if not missing(batch):
        happened = np.int64(post_at_once(ctl, worker_row(ctl, index), index, batch))
    else:
        happened = np.int64(turn(ctl, worker_row(ctl, index), index))
        if happened == 0 and on_idle(ctl):
            happened = np.int64(1)
    ctl.time_busy += clock(ctl) - since
    return happened


@kernel
def post_at_once(ctl, worker, index, batch):
    """Post a small batch of a submitter, which holds the GIL, send or copy it, and do nothing else.

    Returns an AtOnce: REFUSED, with nothing changed, where other batches are before it.
    """
    announce_epoch(ctl, worker)
    endpoint = endpoint_row(ctl, index, batch.peer)
    if first(ring_at(worker.ring)) != RING_EMPTY or endpoint.to_post.first >= 0:
        return np.int64(AtOnce.REFUSED)
    if endpoint.count == 0:
        return np.int64(AtOnce.REFUSED)
    worker.idle.since = 0
    queue = queue_at(i64(endpoint.queues)[0])
    head = queue.head
    take_batch(ctl, worker, index, batch)
    post_batches(ctl, worker, index, endpoint)
    left = push_posted(ctl, worker, queue, head)
    if batch.note >= 0 and batch.note_state == Note.TURN:
        left = not note_at_once(ctl, worker, index, endpoint, batch) or left
    left = left or worker.retry.first >= 0 or worker.owes != 0
    if left or wakes_late(ctl, batch) or work_waits(ctl, worker):
        return np.int64(AtOnce.BEGUN)
    return np.int64(AtOnce.POSTED)


@kernel
def wakes_late(ctl, batch):
    """Return whether the worker, which went to sleep without knowing the batch, may sleep beyond its deadline."""
    deadline = batch.deadline
    return deadline != 0 and batch.remaining > 0 and deadline - clock(ctl) < HEARTBEAT_NS


@kernel
def note_at_once(ctl, worker, index, endpoint, batch):
    """Post and send a batch's notification, if its turn has come; return whether descriptors tell of the rest."""
    queue = queue_at(endpoint.notes)
    head = queue.head
    if endpoint.to_notify.first != slot_of(ctl, batch):
        return False
    return post_note(ctl, worker, index, endpoint) > 0 and not push_posted(ctl, worker, queue, head)


@kernel
def push_posted(ctl, worker, queue, head):
    """Send or copy what was posted to a queue since `head`; return whether the worker has to go on with it."""
    posted = queue.head - head
    if posted == 0 or queue.push == 0:
        return False
    if posted > ctl.poll_lot:
        return True
    taken = push(queue.push, queue.qp, posted, ctl.completions)
    if taken > 0:
        apply_lot(ctl, worker, cq_at(queue.cq), taken)
    return taken < 0
