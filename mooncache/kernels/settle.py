"""Answering slices with a failure, and ending batches whose slices are all answered."""

from mooncache.kernels.account import account
from mooncache.kernels.atomics import i16
from mooncache.kernels.batch import finish
from mooncache.kernels.enums import Kind
from mooncache.kernels.jit import kernel
from mooncache.kernels.note import settle_note
from mooncache.kernels.reclaim.dispatch import retire
from mooncache.kernels.records.base import fetch_add, release
from mooncache.kernels.worker import peer_table


@kernel
def settle(ctl, batch):
    """End the batch if all its slices are answered; post its notification if that is the last."""
    if batch.note >= 0 and batch.remaining <= 1:
        settle_note(ctl, batch)
    if batch.remaining == 0 and finish(ctl, batch):
        retire(ctl, batch)


@kernel
def fail_slice(ctl, batch, slot, status):
    """Answer one slice with a failure. The caller settles the batch."""
    i16(ctl.slice_state)[slot] = status
    batch.failed += 1
    release(batch, "remaining", batch.remaining - 1)
    account(ctl, Kind.FAILED, 1)


@kernel
def doubt(ctl, batch):
    """Note that slices of a batch end unanswered: until the peer confirms, some of them may still land."""
    fetch_add(peer_table(ctl, batch.peer), "breaks", 1)
