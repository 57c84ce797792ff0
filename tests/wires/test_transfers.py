"""Between two processes: all bytes arrive where they belong and none elsewhere, whatever the sizes and depths."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from mooncache import Status, TransferFailed
from mooncache.providers.shm.provider import Shm
from mooncache.providers.stream.tcp import Tcp
from tests.helpers import Task, assert_balanced, in_threads, random_bytes, until
from tests.wires import there
from tests.wires.conftest import OVER_SOCKETS, over

KiB, MiB = 1 << 10, 1 << 20


def scattered(n: int, longest: int, room: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n requests of odd sizes: offsets on either side that do not overlap, and lengths."""
    stream = np.random.Generator(np.random.Philox(key=[seed, 3]))
    length = (stream.integers(0, longest // 2, n) * 2 + 1).astype(np.int64)

    def places() -> np.ndarray:
        order, gaps = stream.permutation(n), stream.integers(0, 5, n)
        starts = np.zeros(n, np.int64)
        starts[order] = np.cumsum(length[order] + gaps) - length[order]
        assert (starts + length).max() <= room
        return starts

    return places(), places(), length


def moved(source: np.ndarray, target: np.ndarray, first: np.ndarray, to: np.ndarray, length: np.ndarray) -> np.ndarray:
    """What `target` holds afterwards."""
    after = target.copy()
    for s, t, n in zip(first, to, length, strict=True):
        after[t : t + n] = source[s : s + n]
    return after


def test_requests_of_odd_sizes_arrive_and_nothing_beside_them_changes(join, wire):
    pair = join(wire, 12 * MiB)
    first, to, length = scattered(100, 200 * KiB, 12 * MiB, seed=5)
    expected = moved(pair.data, pair.there_at_first, first, to, length)
    pair.write(first, to, length).wait(20).close()
    assert (pair.there() == expected).all()
    here = moved(expected, pair.data, to, first[::-1], np.minimum(length, length[::-1]))
    pair.read(to, first[::-1].copy(), np.minimum(length, length[::-1])).wait(20).close()
    assert (pair.data == here).all()
    pair.here.close()
    assert_balanced(pair.here)


def test_one_request_of_64_MiB_there_and_back(join, wire):
    pair = join(wire, 64 * MiB)
    sent = pair.data.copy()
    pair.write(0, 0, 64 * MiB).wait(20).close()
    pair.data[:] = 0
    pair.read(0, 0, 64 * MiB).wait(20).close()
    assert (pair.data == sent).all()


@pytest.mark.parametrize("depth", [1, 5])
def test_more_batches_than_the_queue_is_deep(join, wire, depth):
    pair = join(wire, 2 * MiB, queue_depth=depth)
    at = np.arange(20, dtype=np.int64) * 1025
    batches = [pair.write(at + 20 * 1025 * k, None, 1024) for k in range(50)]
    for batch in batches:
        batch.wait(20).close()
    for batch in [pair.read(at + 20 * 1025 * k, at + MiB + 20 * 1025 * k, 1024) for k in range(45)]:
        batch.wait(20).close()
    got, blocks = pair.there(), np.arange(50 * 20) * 1025
    for b in blocks:
        assert (got[b : b + 1024] == pair.data[b : b + 1024]).all()
    for b in blocks[: 45 * 20]:
        assert (got[b : b + 1024] == pair.data[MiB + b : MiB + b + 1024]).all()
    pair.here.close()
    assert_balanced(pair.here)


@pytest.mark.parametrize("provider", ["tcp", "shm", "auto"])
def test_several_lanes_workers_and_peers_both_ways_at_once(engines, fars, provider):
    """Three processes write to and read from this one, which writes to and reads from them; some memory is mapped."""
    made = {"tcp": lambda: Tcp(lanes=3), "shm": lambda: Shm(lanes=2), "auto": lambda: Shm(elsewhere=True, lanes=3)}
    here = engines(provider=made[provider](), workers=2, slices=64 * KiB)
    others = [fars() for _ in range(3)]
    block, n = 5001, 200
    size = n * (block + 1)
    for k, far in enumerate(others):
        far(there.open_engine, provider=provider, lanes=2, workers=1 + k % 2, slices=8192)
    mine = [here.allocate(4 * size) if k % 2 else np.zeros(4 * size, np.uint8) for k in range(3)]
    for k, array in enumerate(mine):
        array[: 2 * size] = random_bytes(2 * size, k)
    local = [here.register(array) for array in mine]
    places = []
    for k, far in enumerate(others):
        far(there.hold, 2 * size, name="theirs", mapped=k % 2 == 0, seed=10 + k)
        far(there.hold, 2 * size, name="ours")
        places.append(far(there.register, "ours"))
        far(there.register, "theirs")
    # Each of them writes "theirs" into the second half of ours, in a loop; we write the first half into "ours".
    for k, far in enumerate(others):
        far(there.hammer, here.address, local[k].address + 2 * size, name="theirs", block=block)
    at = np.arange(2 * n, dtype=np.int64) * (block + 1)

    def transfer(k: int) -> None:
        place, back = places[k], np.zeros(2 * size, np.uint8)
        region = here.register(back)
        for _ in range(3):
            here.write(place.address, local[k].address + at, place.base + at, block).wait(30).close()
            here.read(place.address, place.base + at, region.address + at, block).wait(30).close()
            assert (back.reshape(2 * n, -1)[:, :block] == mine[k][: 2 * size].reshape(2 * n, -1)[:, :block]).all()
            back[:] = 0

    in_threads(*[lambda k=k: transfer(k) for k in range(3)])
    for k, far in enumerate(others):
        until(lambda far=far: far(there.hammered) > [1], "some rounds of the others")
        ((_, error, _, _),) = far(there.end_hammers)
        assert error == ""
        got = np.frombuffer(far(there.read, "ours"), np.uint8).reshape(2 * n, -1)
        assert (got[:, :block] == mine[k][: 2 * size].reshape(2 * n, -1)[:, :block]).all()
        assert not got[:, block:].any()
        came = mine[k][2 * size :].reshape(2 * n, -1)
        assert (came[:, :block] == random_bytes(2 * size, 10 + k).reshape(2 * n, -1)[:, :block]).all()
        assert not came[:, block:].any()
    here.close()
    assert_balanced(here)


# ------------------------------------------------------------------------------ ended early
@over(*OVER_SOCKETS)
def test_a_deadline_that_passes_while_the_peer_is_stopped_fails_all_of_it_and_nothing_arrives_later(join, wire):
    pair = join(wire, 4 * MiB, queue_depth=16)
    n = 256
    at = np.arange(n, dtype=np.int64) * 16000
    pair.far.stop()
    batch = pair.write(at, None, 15999, timeout=0.1)
    with pytest.raises(TransferFailed) as caught:
        batch.wait(20)
    assert {f.status for f in caught.value.failures} == {Status.TIMED_OUT}
    assert [f.request for f in caught.value.failures] == list(range(n))
    pair.far.go_on()
    batch.wait_quiesced(20)
    assert (pair.there() == pair.there_at_first).all()
    batch.close()
    pair.write(at, None, 15999).wait(20).close()
    got = pair.there()[: n * 16000].reshape(n, -1)
    assert (got[:, :15999] == pair.data[: n * 16000].reshape(n, -1)[:, :15999]).all()
    pair.here.close()
    assert_balanced(pair.here)


@over(*OVER_SOCKETS)
def test_a_batch_closed_in_flight_is_quiesced_when_the_peer_has_answered(join, wire):
    pair = join(wire, 4 * MiB)
    pair.far.stop()
    before = pair.here.stats().counts["work_requests"]
    closed, cancelled = pair.write(0, 0, MiB), pair.write(MiB, MiB, MiB)
    # What is not posted yet when a batch is closed is never sent, and then there is nothing to wait for.
    until(
        lambda: pair.here.stats().counts["work_requests"] - before == closed.slices + cancelled.slices, "both, posted"
    )
    closed.close()
    cancelled.cancel()
    assert closed.done
    assert not closed.quiesced
    assert not cancelled.quiesced
    pair.far.go_on()
    until(lambda: closed.quiesced and cancelled.quiesced, "both, quiesced")
    with contextlib.suppress(TransferFailed):
        cancelled.wait(20)
    assert {f.status for f in cancelled.failures} <= {Status.CANCELLED}
    cancelled.close()
    pair.here.close()
    assert_balanced(pair.here)


def test_batches_cancelled_and_closed_at_any_moment_all_come_back(join, wire):
    pair = join(wire, 4 * MiB, queue_depth=32, workers=2)
    at = np.arange(256, dtype=np.int64) * 16000
    open_ones = []
    for k in range(60):
        move = pair.write if k % 2 else pair.read
        batch = move(at[k::7].copy(), None, 15999)
        if k % 3 == 0:
            batch.close()
            until(lambda batch=batch: batch.quiesced, "a closed batch, quiesced")
        else:
            if k % 3 == 1:
                batch.cancel()
            open_ones.append(batch)
    for batch in open_ones:
        with contextlib.suppress(TransferFailed):
            batch.wait(20)
        assert {f.status for f in batch.failures} <= {Status.CANCELLED}
        batch.close()
    pair.here.close()
    assert_balanced(pair.here)


# ------------------------------------------------------------------------------ the end of engines
def test_an_engine_can_be_closed_while_it_transfers(join, wire):
    pair = join(wire, 16 * MiB, workers=2)
    batches = [pair.write(0, 0, 16 * MiB) for _ in range(8)] + [pair.read(0, 0, 16 * MiB) for _ in range(8)]
    Task(pair.here.close).result()
    assert all(batch.done and batch.quiesced for batch in batches)
    assert_balanced(pair.here)
    pair.far(there.balanced)  # that process is well


def test_an_engine_can_be_closed_while_peers_write_to_it_and_read_from_it(join, wire):
    pair = join(wire, 4 * MiB)
    for op in ("write", "read"):
        pair.far(there.hammer, pair.here.address, pair.local.address, op, by_lanes=wire.by_lanes, block=65_537)
    until(lambda: min(pair.far(there.hammered)) > 1, "transfers")
    Task(pair.here.close).result()
    pair.data[:] = 170
    until(lambda: all(pair.far(there.failed)), "the end of the transfers")
    for _, error, statuses, _ in pair.far(there.end_hammers):
        assert pair.here.address in error
        assert statuses in (["PEER_GONE"], ["REMOTE_ACCESS"], ["PEER_GONE", "REMOTE_ACCESS"], []), error
    assert (pair.data == 170).all()
    pair.far(there.balanced)
