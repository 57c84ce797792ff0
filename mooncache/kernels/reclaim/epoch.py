"""Free whole batches once no worker can still hold them: epoch-based reclamation.

Each retired batch is stamped with an epoch that its retirement ends. A worker announces, at the start of each round,
the epoch it sees; a batch is free when every worker has announced a later one or sleeps.

Source: Fraser, Practical Lock-Freedom, 2004, section 5.2.3.
"""

from mooncache.kernels.account import word
from mooncache.kernels.atomics import exchange, fence, load, peek, store
from mooncache.kernels.batch import release_row
from mooncache.kernels.handle import batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_RETIRED_AT,
    EPOCH_QUIET,
    RETIRED_RING,
    RING_EMPTY,
    SHARED,
    SHARED_EPOCH,
    SHARED_RETIRED_LOCK,
    WORD,
    WORKER_EPOCH,
    WORKER_ROWS,
    WORKER_WORDS,
    WORKERS,
)
from mooncache.kernels.reclaim.base import free_whole
from mooncache.kernels.ring import first, pop


@kernel
def announce_epoch(ctl, worker):
    """Say that this worker's new round can hold nothing retired before now.

    The fence after a rest: whoever still sees it at rest has withdrawn what this round will no longer find.
    """
    rested = peek(worker + WORKER_EPOCH * WORD) == EPOCH_QUIET
    store(worker + WORKER_EPOCH * WORD, load(word(ctl, SHARED) + SHARED_EPOCH * WORD))
    if rested:
        fence()


@kernel
def oldest_epoch(ctl):
    """The earliest epoch that any worker's round may still be in."""
    oldest = EPOCH_QUIET
    for i in range(word(ctl, WORKERS)):
        oldest = min(oldest, load(word(ctl, WORKER_ROWS) + (i * WORKER_WORDS + WORKER_EPOCH) * WORD))
    return oldest


@kernel
def on_idle(ctl):
    """Free every retired batch that no worker can hold. Returns how many; 0 when another worker is at it."""
    lock, ring, freed = word(ctl, SHARED) + SHARED_RETIRED_LOCK * WORD, word(ctl, RETIRED_RING), 0
    if first(ring) == RING_EMPTY or exchange(lock, 1) != 0:
        return freed
    oldest = oldest_epoch(ctl)
    while True:
        slot = first(ring)
        if slot == RING_EMPTY or peek(batch_row(ctl, slot) + BATCH_RETIRED_AT * WORD) >= oldest:
            break
        pop(ring)
        free_whole(ctl, batch_row(ctl, slot))
        release_row(ctl, batch_row(ctl, slot))
        freed += 1
    store(lock, 0)
    return freed
