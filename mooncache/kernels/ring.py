"""A bounded queue of words: many producers, one consumer, no lock.

A producer draws a ticket by fetch-add and writes its entry; the consumer takes entries in ticket order. Rings are
sized so that they cannot overflow (each entry is a batch, and those are bounded); a producer that finds
its place still taken waits for the consumer.
"""

import numpy as np

from mooncache.kernels.atomics import add, load, pause, peek, poke, store
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    RING_EMPTY,
    RING_ENTRIES,
    RING_HEAD,
    RING_MASK,
    RING_TAIL,
    WORD,
    aligned,
    power_of_two,
)


def new_ring(least: int) -> np.ndarray:
    """int64 words of an empty ring for at least `least` entries."""
    entries = power_of_two(least)
    ring = aligned(RING_ENTRIES + entries)
    ring[RING_MASK] = entries - 1
    ring[RING_ENTRIES:] = RING_EMPTY
    return ring


@kernel
def push(ring, value):
    """Append `value` (anything but RING_EMPTY). Any thread."""
    ticket = add(ring + RING_TAIL * WORD, 1)
    place = ring + (RING_ENTRIES + (ticket & peek(ring + RING_MASK * WORD))) * WORD
    while load(place) != RING_EMPTY:
        pause()
    store(place, value)


@kernel
def first(ring):
    """The oldest entry, or RING_EMPTY. The consumer only."""
    head = peek(ring + RING_HEAD * WORD)
    return load(ring + (RING_ENTRIES + (head & peek(ring + RING_MASK * WORD))) * WORD)


@kernel
def pop(ring):
    """Take the oldest entry, or RING_EMPTY. The consumer only."""
    head = peek(ring + RING_HEAD * WORD)
    place = ring + (RING_ENTRIES + (head & peek(ring + RING_MASK * WORD))) * WORD
    value = load(place)
    if value != RING_EMPTY:
        store(place, RING_EMPTY)
        poke(ring + RING_HEAD * WORD, head + 1)
    return value
