"""Threads that submit at once, with and without the GIL, beside others that change what submits go by."""

import threading

import numpy as np
import pytest

from mooncache import EngineClosed
from mooncache.kernels.submit import ASIDE_REQUESTS
from tests.helpers import Pair, Task, assert_balanced

N = ASIDE_REQUESTS
SLICE = 8


@pytest.fixture
def pair():
    """Two engines with room for three batches that are filled without the GIL."""
    pair = Pair(arena=2 * N * SLICE, slices=4 * N, slice_bytes=4096)
    yield pair
    pair.close()


def test_large_batches_arrive_whole_while_other_threads_register_and_unregister(pair):
    """What they unregister is never used here, and what is used stays: so no batch may fail or be refused."""
    at, done = np.arange(N, dtype=np.int64) * 2 * SLICE, threading.Event()
    other = np.zeros(1 << 16, np.uint8)

    def change(engine) -> int:
        turns = 0
        while not done.is_set():
            engine.register(other).unregister()
            turns += 1
        return turns

    def send() -> None:
        for _ in range(8):
            pair.write(at, length=SLICE).wait(20).close()

    changers = [Task(change, engine) for engine in (pair.here, pair.there)]
    senders = [Task(send) for _ in range(2)]
    for task in senders:
        task.result()
    done.set()
    assert all(task.result() > 0 for task in changers)
    words = slice(0, None, 2)
    np.testing.assert_array_equal(pair.target.view(np.int64)[words], pair.source.view(np.int64)[words])
    assert not pair.target.view(np.int64)[1::2].any()
    assert assert_balanced(pair.here).counts["failed"] == 0


@pytest.mark.parametrize("turn", range(6))
def test_an_engine_that_is_closed_while_batches_are_filled_refuses_them_and_loses_nothing(pair, turn):
    at, begun = np.arange(N, dtype=np.int64) * 2 * SLICE, threading.Barrier(3)

    def send() -> None:
        begun.wait()
        while True:
            pair.write(at, length=SLICE).close()

    senders = [Task(send) for _ in range(2)]
    begun.wait()
    for _ in range(turn):
        pair.write(0).wait(20).close()
    pair.here.close()
    for task in senders:
        with pytest.raises(EngineClosed):
            task.result()
    assert_balanced(pair.here)
