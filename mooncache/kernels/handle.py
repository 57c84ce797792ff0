"""Handles: `generation << 32 | slot`, so that a stale, forged or twice closed one is an error, never corruption."""

from mooncache.kernels.enums import BatchState
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import acquire, missing
from mooncache.kernels.records.batch import batch_at

SLOT_MASK = (1 << 32) - 1
GENERATION_MASK = (1 << 31) - 1
FREE, DRAINING = int(BatchState.FREE), int(BatchState.DRAINING)  # nobody may hold a handle to such a row


@kernel
def handle_of(generation, slot):
    """Return the handle of a batch row, or a slice's work request id: never negative."""
    return ((generation & GENERATION_MASK) << 32) | slot


@kernel
def batch_row(ctl, slot):
    """Return the batch's row `slot`."""
    return batch_at(ctl.batch_rows, slot)


@kernel
def row_of(ctl, handle):
    """Return the batch's row whose generation `handle` has, in whatever state; missing when there is none."""
    slot = handle & SLOT_MASK
    if handle < 0 or slot >= ctl.batches:
        return batch_at(0)
    batch = batch_row(ctl, slot)
    if acquire(batch, "generation") & GENERATION_MASK != handle >> 32:
        return batch_at(0)
    return batch


@kernel
def resolve(ctl, handle):
    """Return the row of the batch that `handle` names; missing when it is stale, forged or closed."""
    batch = row_of(ctl, handle)
    if missing(batch):
        return batch
    state = acquire(batch, "state")
    return batch_at(0) if state == FREE or state == DRAINING else batch
