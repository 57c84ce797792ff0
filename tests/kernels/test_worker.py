"""A worker's turn: one holder at a time, and nobody who waits for it is forgotten."""

import numpy as np
import pytest

from mooncache.kernels.arrays import address_of
from mooncache.kernels.settings import Settings
from mooncache.kernels.state import Block, State
from tests.helpers import LIMIT, Pair, in_threads
from tests.kernels import entries

N = 100_000


def test_only_one_holds_the_turn():
    state = State(Settings(slices=256, batches=1, peers=1))
    row, cell = address_of(state.worker_rows), np.zeros(1, np.int64)
    in_threads(*[lambda: entries.turn_many(row, cell.ctypes.data, N)] * 2)
    assert cell[0] == 2 * N
    assert state.worker_rows[0]["turn"] == 0


def test_a_worker_knows_its_control_block():
    state = State(Settings(slices=256, batches=1, peers=1, workers=2))
    blocks = [Block(state, i) for i in range(2)]
    Block(state)  # a caller's
    assert [block.ctl for block in blocks] == state.worker_rows["ctl"].tolist()


@pytest.mark.parametrize("wire", ["tcp", "shm"])
@pytest.mark.parametrize("workers", [1, 2])
def test_submitters_and_waiters_that_turn_the_worker_lose_nothing(wire, workers):
    """Small batches are posted by their submitters and fetched by their waiters, large ones by the worker."""
    pair = Pair(wire, wire, workers=workers)
    pair.write(0).wait(LIMIT).close()

    def play(seed: int) -> None:
        stream = np.random.Generator(np.random.Philox(key=[seed, 0]))
        for n in stream.choice([1, 1, 1, 2, 4, 300, 1000], 150):
            batch = pair.scattered(int(n)) if n > 1 else pair.write(int(seed))
            if n < 300 or seed % 2:
                batch.wait(LIMIT)
            batch.close()

    in_threads(*[lambda seed=seed: play(seed) for seed in range(4)])
    pair.close()


def test_a_small_batch_waited_for_wakes_no_worker():
    pair = Pair("shm", "shm")
    pair.write(0).wait(LIMIT).close()
    rows = pair.state.worker_rows
    before = pair.here.stats().counts["wakes"]
    for _ in range(500):
        pair.write(0).wait(LIMIT).close()
    # The worker's own thread may have had the turn now and then: its first batch, a heartbeat.
    assert pair.here.stats().counts["wakes"] - before < 50
    assert rows[0]["held"] == 0
    pair.close()
