"""Handles: `generation << 32 | slot`, so that a stale, forged or twice closed one is an error, never corruption."""

from mooncache.kernels.account import word
from mooncache.kernels.atomics import load
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import BATCH_GENERATION, BATCH_ROWS, BATCH_STATE, BATCH_WORDS, BATCHES, WORD, BatchState

SLOT_MASK = (1 << 32) - 1
GENERATION_MASK = (1 << 31) - 1
FREE, DRAINING = int(BatchState.FREE), int(BatchState.DRAINING)  # nobody may hold a handle to such a row


@kernel
def handle_of(generation, slot):
    """The handle of a batch row, or a slice's work request id: never negative."""
    return ((generation & GENERATION_MASK) << 32) | slot


@kernel
def batch_row(ctl, slot):
    """Address of the batch row `slot`."""
    return word(ctl, BATCH_ROWS) + slot * BATCH_WORDS * WORD


@kernel
def row_of(ctl, handle):
    """Address of the batch row whose generation `handle` has, in whatever state, or 0 when there is none."""
    slot = handle & SLOT_MASK
    if handle < 0 or slot >= word(ctl, BATCHES):
        return 0
    row = batch_row(ctl, slot)
    if load(row + BATCH_GENERATION * WORD) & GENERATION_MASK != handle >> 32:
        return 0
    return row


@kernel
def resolve(ctl, handle):
    """Address of the batch row that `handle` names, or 0 when it names none: stale, forged or closed."""
    row = row_of(ctl, handle)
    if row == 0:
        return 0
    state = load(row + BATCH_STATE * WORD)
    return 0 if state == FREE or state == DRAINING else row
