"""A worker's turn in other hands, while its thread sleeps: a waiting thread's, or a submitter's.

A thread that waits has given the GIL up and may do all that the worker would. A submitter holds it: it does what its
own small batch needs and nothing else, whatever else there is to do.
"""

import numpy as np

from mooncache.kernels.account import clock, raise_word, word
from mooncache.kernels.atomics import i64, peek, poke
from mooncache.kernels.batch import slot_of
from mooncache.kernels.complete import apply_lot
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.layout import (
    ACTOR,
    BATCH_DEADLINE,
    BATCH_NOTE,
    BATCH_NOTE_STATE,
    BATCH_PEER,
    BATCH_REMAINING,
    COMPLETIONS,
    ENDPOINT_COUNT,
    ENDPOINT_FIRST,
    ENDPOINT_NOTE_FIRST,
    ENDPOINT_NOTES,
    ENDPOINT_QUEUES,
    IDLE_SINCE,
    POLL_LOT,
    QUEUE_CQ,
    QUEUE_HEAD,
    QUEUE_PUSH,
    QUEUE_QP,
    RING_EMPTY,
    TIME_BUSY,
    WORD,
    WORKER_IDLE,
    WORKER_OWES,
    WORKER_RETRY_FIRST,
    WORKER_RING,
    AtOnce,
    Note,
)
from mooncache.kernels.post import post_batches, post_note
from mooncache.kernels.pump import HEARTBEAT_NS, take_batch, turn, work_waits
from mooncache.kernels.reclaim.dispatch import on_idle
from mooncache.kernels.reclaim.epoch import announce_epoch
from mooncache.kernels.ring import first
from mooncache.kernels.verbs import push
from mooncache.kernels.worker import endpoint_row, worker_row


@callback("int64(int64, int64)")
def turn_once(ctl, row):
    """By whoever holds the turn of the worker that `ctl` belongs to: one round; returns how much happened.

    With the row of a batch that no worker knows of yet: what `post_at_once` does.
    """
    since, index = clock(ctl), word(ctl, ACTOR)
    if row != 0:
        happened = np.int64(post_at_once(ctl, worker_row(ctl, index), index, row))
    else:
        happened = np.int64(turn(ctl, worker_row(ctl, index), index))
        if happened == 0 and on_idle(ctl):
            happened = np.int64(1)
    raise_word(ctl + TIME_BUSY * WORD, clock(ctl) - since)
    return happened


@kernel
def post_at_once(ctl, worker, index, row):
    """For a submitter, which holds the GIL: post its small batch, send or copy it, and nothing else.

    Returns an AtOnce: REFUSED, with nothing changed, where other batches are before it.
    """
    announce_epoch(ctl, worker)
    endpoint = endpoint_row(ctl, index, peek(row + BATCH_PEER * WORD))
    if first(peek(worker + WORKER_RING * WORD)) != RING_EMPTY or peek(endpoint + ENDPOINT_FIRST * WORD) >= 0:
        return np.int64(AtOnce.REFUSED)
    if peek(endpoint + ENDPOINT_COUNT * WORD) == 0:
        return np.int64(AtOnce.REFUSED)
    poke(worker + (WORKER_IDLE + IDLE_SINCE) * WORD, 0)
    queue = i64(peek(endpoint + ENDPOINT_QUEUES * WORD))[0]
    head = peek(queue + QUEUE_HEAD * WORD)
    take_batch(ctl, worker, index, row)
    post_batches(ctl, worker, index, endpoint)
    left = push_posted(ctl, worker, queue, head)
    if peek(row + BATCH_NOTE * WORD) >= 0 and peek(row + BATCH_NOTE_STATE * WORD) == Note.TURN:
        left = not note_at_once(ctl, worker, index, endpoint, row) or left
    left = left or peek(worker + WORKER_RETRY_FIRST * WORD) >= 0 or peek(worker + WORKER_OWES * WORD) != 0
    if left or wakes_late(ctl, row) or work_waits(ctl, worker):
        return np.int64(AtOnce.BEGUN)
    return np.int64(AtOnce.POSTED)


@kernel
def wakes_late(ctl, row):
    """Whether the worker, which went to sleep without knowing the batch, may sleep on beyond its deadline."""
    deadline = peek(row + BATCH_DEADLINE * WORD)
    return deadline != 0 and peek(row + BATCH_REMAINING * WORD) > 0 and deadline - clock(ctl) < HEARTBEAT_NS


@kernel
def note_at_once(ctl, worker, index, endpoint, row):
    """Post and send a batch's notification, if its turn has come; whether descriptors tell of the rest."""
    queue = peek(endpoint + ENDPOINT_NOTES * WORD)
    head = peek(queue + QUEUE_HEAD * WORD)
    if peek(endpoint + ENDPOINT_NOTE_FIRST * WORD) != slot_of(ctl, row):
        return False
    return post_note(ctl, worker, index, endpoint) > 0 and not push_posted(ctl, worker, queue, head)


@kernel
def push_posted(ctl, worker, queue, head):
    """Send or copy what was posted to a queue since `head`; whether the worker has to go on with it."""
    posted = peek(queue + QUEUE_HEAD * WORD) - head
    if posted == 0 or peek(queue + QUEUE_PUSH * WORD) == 0:
        return False
    if posted > word(ctl, POLL_LOT):
        return True
    wc = word(ctl, COMPLETIONS)
    taken = push(peek(queue + QUEUE_PUSH * WORD), peek(queue + QUEUE_QP * WORD), posted, wc)
    if taken > 0:
        apply_lot(ctl, worker, peek(queue + QUEUE_CQ * WORD), wc, taken)
    return taken < 0
