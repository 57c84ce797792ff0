"""Policy leak: nothing is ever freed.

The upstream engine of February to April 2025: fast, then out of memory. A baseline.
"""

from mooncache.kernels.account import account
from mooncache.kernels.atomics import i64
from mooncache.kernels.enums import Kind
from mooncache.kernels.jit import kernel
from mooncache.kernels.pool import INDEX_MASK, push_chain
from mooncache.kernels.reclaim.traits import FreesIn, Traits
from mooncache.kernels.records.base import acquire, fetch_add, swap, where
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.shared import shared_at

TRAITS = Traits(FreesIn.NOBODY, whole_chain=True)


@kernel
def on_close(ctl, batch):
    """Forget the chain: it leaves circulation and is counted."""
    if batch.first < 0:
        return
    shared = shared_at(ctl.shared)
    account(ctl, Kind.SLICES_LEAKED, batch.slices)
    fetch_add(shared, "leaked_count", batch.chunks)
    push_chain(
        where(shared, "leaked_chunks"),
        ctl.chunk_next,
        batch.first,
        batch.last,
    )
    batch.first = -1
    batch.last = -1
    batch.chunks = 0


@kernel("int64(int64)")
def restart(ctl):
    """Put all leaked chunks back, as a new process would; return how many. Only while no other thread uses the pool.

    The simulation calls it when a leaking engine has run out, so that the baseline can be as long as the run.
    """
    ctl = control_at(ctl)
    shared = shared_at(ctl.shared)
    first = (swap(shared, "leaked_chunks", 0) & INDEX_MASK) - 1
    if first < 0:
        return 0
    next_, last = i64(ctl.chunk_next), first
    while next_[last] >= 0:
        last = next_[last]
    count = acquire(shared, "leaked_count")
    fetch_add(shared, "leaked_count", -count)
    push_chain(where(shared, "free_chunks"), ctl.chunk_next, first, last)
    fetch_add(shared, "free_count", count)
    return count
