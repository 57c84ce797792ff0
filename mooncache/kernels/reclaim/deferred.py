"""Policy deferred: a reaper thread frees the slices, a lot every period: off the worker's and the caller's path."""

from mooncache.kernels.batch import release_row
from mooncache.kernels.handle import batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.reclaim.base import free_chunk
from mooncache.kernels.reclaim.traits import FreesIn, Traits
from mooncache.kernels.records.ring import RING_EMPTY, ring_at
from mooncache.kernels.ring import first, pop

TRAITS = Traits(FreesIn.REAPER, whole_chain=False, retires=True)


@kernel
def on_idle(ctl):
    """Free one lot of retired slices, chunk by chunk. The reaper only. Return how many slices."""
    ring, freed = ring_at(ctl.retired_ring), 0
    while freed < ctl.reaper_lot:
        slot = first(ring)
        if slot == RING_EMPTY:
            return freed
        batch = batch_row(ctl, slot)
        chunk = batch.first
        if chunk >= 0:
            freed += free_chunk(ctl, batch, chunk)
        if batch.first < 0:
            pop(ring)
            release_row(ctl, batch)
    return freed
