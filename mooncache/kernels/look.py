"""Regions that a peer has refused, and looks at what it has registered by now.

A NIC that refuses a key does so for every slice of that region: so the region is marked, and its slices are kept
(`retry`) until the peer was asked. Looks at a peer are numbered; a batch waits for one that began after its refusal.
"""

import numpy as np

from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import cas, i16, i64
from mooncache.kernels.handle import batch_row
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import acquire, fetch_add, release, swap
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.table import table_at
from mooncache.kernels.worker import peer_table, ring_bell, worker_row
from mooncache.limits import CHUNK_BITS

NOWHERE = -1  # region of what goes to none, a notification


@kernel
def table_of(ctl, slot):
    """Return the region table of a slice's peer."""
    batch = batch_row(ctl, i64(ctl.chunk_batch)[slot >> CHUNK_BITS])
    return peer_table(ctl, batch.peer)


@kernel
def region_refused(ctl, slot):
    """Return whether the peer has refused the key of a slice's remote region. A notification goes to none."""
    region, table = np.int64(i16(ctl.slice_remote)[slot]), table_of(ctl, slot)
    return region != NOWHERE and i64(table.refused)[region] > i64(table.renewed)[region]


@kernel
def refuse_region(ctl, queue, sequence, slot):
    """Note that the peer's NIC refused a key: it will for every slice of that region, each of which would break a
    queue.

    An answer that comes late says nothing about the key that the region has been given meanwhile.
    """
    region, table = np.int64(i16(ctl.slice_remote)[slot]), table_of(ctl, slot)
    if region != NOWHERE and sequence >= queue.renewed_from:
        known = i64(table.refused)[region]
        if known <= queue.renewals:
            cas(table.refused + WORD * region, known, queue.renewals + 1)
            table.refusals = 1


# ------------------------------------------------------------------------------ in the looker
@kernel("int64(int64)")
def begin(table):
    """Begin a look at the peer with this region table, if one was asked for; return its number, or 0."""
    table = table_at(table)
    if swap(table, "asked", 0) == 0:
        return np.int64(0)
    return fetch_add(table, "begun", 1) + 1


@kernel("int64(int64, int64, int64)")
def end(ctl, table, number):
    """End look number `number`, well or not: workers post again what waits for it."""
    ctl = control_at(ctl)
    table = table_at(table)
    release(table, "looked", max(number, acquire(table, "looked")))
    for i in range(ctl.workers):
        worker = worker_row(ctl, i)
        release(worker, "looked", 1)
        ring_bell(ctl, worker)
    return np.int64(0)
