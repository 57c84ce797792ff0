"""One contract for every wire, policy and store: bytes arrive, and everything that was taken comes back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mooncache import Status, TransferFailed
from mooncache.providers.inprocess.emulated import Emulated, Nic
from mooncache.providers.inprocess.loopback import Loopback
from mooncache.providers.shm.provider import Shm
from mooncache.providers.stream.tcp import Tcp
from tests.helpers import POLICIES, STORES, Pair, Task, assert_balanced, in_threads, until
from tests.kernels.entries import Gated

WIRES = {
    "loopback": Loopback,
    "emulated": lambda: Emulated(Nic(latency_ns=5000)),
    "rails": lambda: Emulated(*[Nic(latency_ns=5000, signal=16, gathers=4)] * 2),
    "breaking rails": lambda: Emulated(*[Nic(latency_ns=5000, signal=16, gathers=4, breaks=True)] * 2),
    "tcp": lambda: Tcp(lanes=2),
    "shm": Shm,
}
ARENA = 1 << 20
SIZES = (1, 7, 64, 511, 512, 513, 4096, 10_000)


@pytest.fixture(params=itertools.product(WIRES, STORES, POLICIES), ids="-".join)
def matched(request):
    wire, store, policy = request.param
    # Two workers and a short queue, so that batches interleave; 2,048 cached slots, so that some fit and some do not.
    pair = Pair(
        WIRES[wire](), WIRES[wire](), arena=ARENA, store=store, policy=policy, workers=2, slices=32 * 1024,
        queue_depth=64, chain=16, cache_slices=2048, slice_bytes=4096,
    )  # fmt: skip
    yield pair
    pair.close()


def scattered(seed: int, base: int, room: int, n: int):
    """n requests of many sizes whose sources, and whose targets, do not overlap: offsets and lengths."""
    stream = np.random.Generator(np.random.Philox(key=[seed, 1]))
    length = stream.choice(SIZES, n).astype(np.int64)

    def places():
        order = stream.permutation(n)
        gaps = stream.integers(0, 3, n)  # some lie side by side
        starts = np.zeros(n, np.int64)
        starts[order] = base + np.cumsum(length[order] + gaps) - length[order]
        assert starts.max() + max(SIZES) < base + room
        return starts

    return places(), places(), length


def transfer(pair: Pair, seed: int, base: int, room: int) -> None:
    """Several batches in flight, half written and half read; all bytes verified."""
    running = []
    for k in range(6):
        part = room // 6
        source, target, length = scattered(100 * seed + k, base + k * part, part, 12)
        if k % 2:
            batch = pair.write(source, target, length)
        else:
            batch = pair.read(target, source, length)
        running.append((batch, k % 2, source, target, length))
    for batch, written, source, target, length in running:
        assert batch.wait(timeout=20) is batch
        assert batch.failures == ()
        for s, t, n in zip(source, target, length, strict=True):
            np.testing.assert_array_equal(pair.source[s : s + n], pair.target[t : t + n])
            assert written or pair.source[s] == 0  # reads bring the zeros of the untouched target
        batch.close()


def test_the_contract(matched):
    pair = matched
    half = ARENA // 2
    in_threads(lambda: transfer(pair, 1, 0, half), lambda: transfer(pair, 2, half, half))

    # Closed at once, while it runs.
    for n in (1, 300, 2000):
        batch = pair.scattered(n)
        batch.close()
        assert batch.done
    # Cancelled: what was not posted fails, the rest arrives.
    batch = pair.scattered(3000)
    batch.cancel()
    try:
        batch.wait(timeout=20)
        failures = ()
    except TransferFailed as failed:
        failures = failed.failures
    assert {f.status for f in failures} <= {Status.CANCELLED}
    assert batch.failures == failures
    batch.close()
    # Finished and not closed: the end of the engine does it.
    left_open = pair.scattered(10).wait(timeout=20)
    # Failed, all of it: the target takes its permission back.
    pair.remote.unregister()
    batch = pair.scattered(500)
    with pytest.raises(TransferFailed, match=f"500 of 500 requests to peer '{pair.peer}' failed"):
        batch.wait(timeout=20)
    assert [f.request for f in batch.failures] == list(range(500))
    assert {f.status for f in batch.failures} == {Status.REMOTE_ACCESS}
    with batch:
        pass
    # Nothing to do.
    pair.write(np.zeros(0, np.int64), length=8).wait().close()

    pair.close()
    assert left_open.done
    stats = assert_balanced(pair.here)
    assert stats.counts["batches_submitted"] == 12 + 3 + 1 + 1 + 1 + 1
    assert stats.counts["requests"] == 12 * 12 + 2301 + 3000 + 10 + 500
    if pair.here._settings.policy.name == "LEAK":
        # The one closed by the engine leaks too.
        assert stats.counts["slices_leaked"] == stats.counts["slices_filled"]
    else:
        assert stats.counts["slices_leaked"] == 0
        assert stats.free_slices == stats.capacity_slices


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_failures_until_the_batch_is_closed(pairs, policy):
    pair = pairs(policy=policy, slices=2048)
    target = pair.there.register(kept := np.zeros(300 * 65, np.uint8))
    pair.write(0, target.address - pair.remote.address, 8).wait(20).close()  # the peer's table is fresh
    target.unregister()
    to = np.arange(400, dtype=np.int64) * 65
    to[50:350] += target.address - pair.remote.address - 50 * 65
    batch = pair.write(np.arange(400, dtype=np.int64) * 65, to, 64)
    with pytest.raises(TransferFailed):
        batch.wait(20)
    assert [f.request for f in batch.failures] == list(range(50, 350))
    batch.close()
    assert [f.request for f in batch.failures] == list(range(50, 350))
    assert not kept[8:].any()
    pair.close()
    assert_balanced(pair.here)


@pytest.mark.parametrize("policy", ["epoch", "deferred"])
def test_what_idle_moments_free_can_be_used_again(pairs, policy):
    """Each batch needs the whole pool: it can only start when the one before has been freed by someone else."""
    pair = pairs(policy=policy, slices=512, workers=2)
    for _ in range(50):
        pair.scattered(512, timeout=20).wait(20).close()
    pair.close()
    assert assert_balanced(pair.here).counts["slices_filled"] == 50 * 512


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_that_finishes_after_the_others_have_left_still_frees(policy):
    pair = Pair(Gated(), Gated(), policy=policy, workers=3)
    batches = [pair.scattered(300) for _ in range(2)]  # for workers 0 and 1; 2 has nothing to do
    until(lambda: all(q[0].outstanding == 300 for q in pair.here.provider.queues[:2]), "the slices, posted")
    closing = Task(pair.here.close)
    until(lambda: not pair.here._runtime.actors.threads[2].is_alive(), "the idle worker, gone")
    assert closing.running
    pair.close()
    closing.result()
    assert all(batch.quiesced for batch in batches)
    assert_balanced(pair.here)


@pytest.mark.parametrize("store", STORES)
def test_a_thread_cache_gives_its_own_thread_what_it_kept(pairs, store):
    pair = pairs(policy="thread_cache", store=store, slices=1024, cache_slices=512)
    for _ in range(20):
        pair.scattered(700).wait(20).close()
        assert pair.here.stats().free_slices == 1024
    pair.close()
    counts = assert_balanced(pair.here).counts
    if store == "heap":
        assert counts["heap_reused"] == 19 * 512
        assert counts["heap_cached"] == 20 * 512


@pytest.mark.parametrize("store", STORES)
def test_leaking_runs_out_and_says_so(pairs, store):
    from mooncache import CapacityError

    pair = pairs(policy="leak", store=store, slices=1024)
    for _ in range(4):
        pair.scattered(200).wait(20).close()
    with pytest.raises(CapacityError, match="the leak policy never frees any"):
        pair.scattered(1)
    assert pair.here.stats().counts["slices_leaked"] == 800
    pair.close()
    assert_balanced(pair.here)
