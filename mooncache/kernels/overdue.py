"""Batches whose deadline has passed: they are stopped by their worker, which notes when it has to look at the next."""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import clock
from mooncache.kernels.batch import DRAINING, SEALED
from mooncache.kernels.handle import batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.post import stop_posting, take_posted_back
from mooncache.kernels.records.base import acquire

GRACE_NS = 20_000_000  # past its deadline a batch waits so long for the answers of what it has posted
LOOK_AGAIN_NS = 1_000_000  # at a batch that changed while its deadline was looked at


@kernel
def expire(ctl, worker, index):
    """Stop this worker's batches whose deadline has passed, and note when to look again.

    Looks at all rows, some hundred microseconds, but only when a deadline has passed.
    """
    now = clock(ctl)
    worker.next_deadline = 0
    for slot in range(ctl.batches):
        batch = batch_row(ctl, slot)
        generation, state = acquire(batch, "generation"), acquire(batch, "state")
        if state != SEALED and state != DRAINING:
            continue
        if acquire(batch, "remaining") == 0 or batch.deadline == 0:
            continue
        if acquire(batch, "worker") != index or acquire(batch, "taken") == 0:
            continue
        if acquire(batch, "generation") != generation:  # closed just now, or another batch
            note_deadline(worker, now + LOOK_AGAIN_NS)
        else:
            note_deadline(worker, stop_overdue(ctl, worker, index, batch, now))


@kernel
def note_deadline(worker, at):
    """Note this time, ns, at which to look for overdue batches; 0: no need to."""
    due = worker.next_deadline
    if at != 0 and (due == 0 or at < due):
        worker.next_deadline = at


@kernel
def stop_overdue(ctl, worker, index, batch, now):
    """Stop a batch if its deadline has passed; return when to look at it again, 0 for never.

    What is not posted fails now. What is posted has a grace for answers on their way; then its wire gives it back.
    """
    deadline, posted = batch.deadline, batch.posted
    if now < deadline:
        return deadline
    if posted > 0 and now >= deadline + GRACE_NS:
        take_posted_back(ctl, worker, index, batch)
    if batch.cancelled == 0:
        stop_posting(ctl, worker, index, batch, Status.TIMED_OUT)
    if posted == 0:
        return np.int64(0)
    return max(deadline, now) + GRACE_NS
