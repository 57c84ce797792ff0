"""The ring of words: many producers, one consumer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.kernels.records.ring import RING, RING_EMPTY
from mooncache.kernels.ring import new_ring
from tests.helpers import in_threads
from tests.kernels import entries

N = 50_000


def test_three_producers_lose_nothing_and_each_keeps_its_order():
    words = new_ring(3 * N)
    taken = np.zeros(3 * N, np.int64)
    producers = [lambda k=k: entries.push_many(words.ctypes.data, k * N, N) for k in range(3)]
    in_threads(*producers, lambda: entries.pop_many(words.ctypes.data, taken))
    np.testing.assert_array_equal(np.sort(taken), np.arange(3 * N))
    for k in range(3):
        own = taken[taken // N == k]
        np.testing.assert_array_equal(own, np.arange(k * N, (k + 1) * N))
    assert entries.pop_one(words.ctypes.data) == RING_EMPTY


def test_a_producer_that_finds_the_ring_full_waits_for_the_consumer():
    words, taken = new_ring(4), np.zeros(500, np.int64)
    in_threads(lambda: entries.push_many(words.ctypes.data, 0, 500), lambda: entries.pop_many(words.ctypes.data, taken))
    np.testing.assert_array_equal(taken, np.arange(500))


@given(st.lists(st.one_of(st.none(), st.integers(-(1 << 62), 1 << 62)), max_size=60))
def test_a_ring_is_a_queue(steps):
    """None takes, a number appends (as long as there is room)."""
    words, queue = new_ring(8), []
    for step in steps:
        assert entries.look(words.ctypes.data) == (queue[0] if queue else RING_EMPTY)
        if step is None:
            assert entries.pop_one(words.ctypes.data) == (queue.pop(0) if queue else RING_EMPTY)
        elif len(queue) < 8:
            entries.push_many(words.ctypes.data, step, 1)
            queue.append(step)


@pytest.mark.parametrize(("least", "places"), [(1, 1), (2, 2), (3, 4), (1000, 1024)])
def test_a_ring_has_a_power_of_two_of_places(least, places):
    words = new_ring(least)
    assert words.size - RING.itemsize // 8 == places
    assert words.ctypes.data % 64 == 0
