"""Policy epoch: whole batches are freed once no worker can still hold them: epoch-based reclamation.

Each retired batch is stamped with an epoch that its retirement ends. A worker announces, at the start of each round,
the epoch it sees; a batch is free when every worker has announced a later one or sleeps.

Source: Fraser, Practical Lock-Freedom, 2004, section 5.2.3.
"""

from mooncache.kernels.atomics import fence
from mooncache.kernels.batch import release_row
from mooncache.kernels.handle import batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.reclaim.base import free_whole
from mooncache.kernels.reclaim.traits import FreesIn, Traits
from mooncache.kernels.records.base import acquire, release, swap
from mooncache.kernels.records.ring import RING_EMPTY, ring_at
from mooncache.kernels.records.shared import shared_at
from mooncache.kernels.records.worker import EPOCH_QUIET
from mooncache.kernels.ring import first, pop
from mooncache.kernels.worker import worker_row

TRAITS = Traits(FreesIn.WORKER, whole_chain=True, retires=True)


@kernel
def announce_epoch(ctl, worker):
    """Announce that this worker's new round can hold nothing retired before now.

    The fence after a rest: whoever still sees it at rest has withdrawn what this round will no longer find.
    """
    rested = worker.epoch == EPOCH_QUIET
    release(worker, "epoch", acquire(shared_at(ctl.shared), "epoch"))
    if rested:
        fence()


@kernel
def oldest_epoch(ctl):
    """Return the earliest epoch that any worker's round may still be in."""
    oldest = EPOCH_QUIET
    for i in range(ctl.workers):
        oldest = min(oldest, acquire(worker_row(ctl, i), "epoch"))
    return oldest


@kernel
def on_idle(ctl):
    """Free every retired batch that no worker can hold. Return how many; 0 when another worker is at it."""
    shared, ring, freed = shared_at(ctl.shared), ring_at(ctl.retired_ring), 0
    if first(ring) == RING_EMPTY or swap(shared, "retired_lock", 1) != 0:
        return freed
    oldest = oldest_epoch(ctl)
    while True:
        slot = first(ring)
        if slot == RING_EMPTY or batch_row(ctl, slot).retired_at >= oldest:
            break
        pop(ring)
        free_whole(ctl, batch_row(ctl, slot))
        release_row(ctl, batch_row(ctl, slot))
        freed += 1
    release(shared, "retired_lock", 0)
    return freed
