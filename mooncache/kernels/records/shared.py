"""Words of an engine that several threads write."""

import numpy as np

from mooncache.kernels.records.base import record_at, spread

SHARED = spread(
    [
        ("free_chunks", np.int64),  # tag << 24 | chunk + 1: head of the pool's free list
        ("free_batches", np.int64),  # the same for batch rows
        ("free_count", np.int64),  # chunks in the free list
        ("bell", np.int64),  # futex: rises whenever chunks or batch rows come back
        ("waiters", np.int64),  # threads asleep on it
        ("next_worker", np.int64),  # round robin of batches over workers
        ("epoch", np.int64),
        ("retired_lock", np.int64),  # held by whoever takes from the retired ring
        ("stop", np.int64),  # 1: workers leave when idle; 2: at once
        ("reaper_bell", np.int64),  # futex
        ("reaper_parked", np.int64),
        ("low", np.int64),  # fewest free chunks ever seen
        ("leaked_chunks", np.int64),  # tag << 24 | chunk + 1: chunks that the leak policy forgot
        ("leaked_count", np.int64),
        ("reaper_stop", np.int64),  # 1: the reaper leaves when it has freed all; set when the workers have left
        ("filling", np.int64),  # threads that fill a batch without the GIL
        ("awaited", np.int64),  # 1: a coroutine awaits the bell, so the next ring also writes to the engine's eventfd
    ]
)
shared_at = record_at(SHARED)
