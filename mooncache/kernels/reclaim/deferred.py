"""Free each slice in a reaper thread, a lot of them every period: off the worker's path and off the caller's."""

from mooncache.kernels.account import word
from mooncache.kernels.atomics import peek
from mooncache.kernels.batch import release_row
from mooncache.kernels.handle import batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import BATCH_FIRST, REAPER_LOT, RETIRED_RING, RING_EMPTY, WORD
from mooncache.kernels.reclaim.base import free_chunk
from mooncache.kernels.ring import first, pop


@kernel
def on_idle(ctl):
    """Free one lot of retired slices, chunk by chunk. The reaper only. Returns how many slices."""
    ring, freed = word(ctl, RETIRED_RING), 0
    while freed < word(ctl, REAPER_LOT):
        slot = first(ring)
        if slot == RING_EMPTY:
            return freed
        row = batch_row(ctl, slot)
        chunk = peek(row + BATCH_FIRST * WORD)
        if chunk >= 0:
            freed += free_chunk(ctl, row, chunk)
        if peek(row + BATCH_FIRST * WORD) < 0:
            pop(ring)
            release_row(ctl, row)
    return freed
