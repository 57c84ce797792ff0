"""A bounded queue of words: many producers, one consumer, no lock.

A producer draws a ticket by fetch-add and writes its entry; the consumer takes entries in ticket order. Rings are
sized so that they cannot overflow (each entry is a batch, and those are bounded); a producer that finds
its place still taken waits for the consumer.
"""

import numpy as np

from mooncache.kernels.arrays import WORD, aligned, power_of_two
from mooncache.kernels.atomics import pause
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import acquire, behind, cell_at, fetch_add, release
from mooncache.kernels.records.ring import RING, RING_EMPTY


def new_ring(least: int) -> np.ndarray:
    """Allocate int64 words of an empty ring for at least `least` entries: a RING, and the entries behind it."""
    entries, header = power_of_two(least), RING.itemsize // WORD
    ring = aligned(header + entries)
    ring[:header].view(RING)["mask"] = entries - 1
    ring[header:] = RING_EMPTY
    return ring


@kernel
def place_of(ring, ticket):
    """Return the place of the entry with this ticket, a CELL."""
    return cell_at(behind(ring), ticket & ring.mask)


@kernel
def push(ring, value):
    """Append `value` (anything but RING_EMPTY). Any thread."""
    ticket = fetch_add(ring, "tail", 1)
    place = place_of(ring, ticket)
    while acquire(place, "value") != RING_EMPTY:
        pause()
    release(place, "value", value)


@kernel
def first(ring):
    """Return the oldest entry, or RING_EMPTY. The consumer only."""
    return acquire(place_of(ring, ring.head), "value")


@kernel
def pop(ring):
    """Take the oldest entry, or RING_EMPTY. The consumer only."""
    place = place_of(ring, ring.head)
    value = acquire(place, "value")
    if value != RING_EMPTY:
        release(place, "value", RING_EMPTY)
        ring.head += 1
    return value
