"""Many threads and event loops over one engine: nobody hangs, nobody is forgotten, an idle engine sleeps."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from mooncache import TransferFailed
from tests.helpers import POLICIES, STORES, assert_balanced, awaited, in_threads, until
from tests.wires.conftest import OVER_SOCKETS, WIRES, Joined, over

KiB, MiB = 1 << 10, 1 << 20
LATE_S = 0.1  # nothing here takes that long; a wake-up that is lost costs that or, until the next heartbeat, 0.5 s
FEW = 1 / 200  # of all: what a machine may do to threads that have to share two cores with others


class Watch:
    """How long waits took."""

    def __init__(self) -> None:
        self.late: list[float] = []

    def wait(self, wait: Callable[[], object]) -> None:
        since = time.monotonic()
        wait()
        took = time.monotonic() - since
        if took > LATE_S:
            self.late.append(took)


def blocks(pair: Joined, k: int, n: int, length: int = 64) -> np.ndarray:
    """Offsets of n blocks, in a part of both ranges that is thread k's."""
    return k * 64 * KiB + np.arange(n, dtype=np.int64) * (length + 1)


def waiting(pair: Joined, k: int, rounds: int, watch: Watch) -> None:
    """Submit and wait, writes and reads, one slice and several, with and without a time limit."""
    many = blocks(pair, k, 20)
    for i in range(rounds):
        at = many if i % 8 == 0 else int(many[i % 20])
        batch = (pair.read if i % 3 == 0 else pair.write)(at, None, 64)
        if i % 5 == 0:
            with contextlib.suppress(TimeoutError):
                batch.wait(1e-4)
        watch.wait(lambda batch=batch: batch.wait(30))
        batch.close()


def awaiting(pair: Joined, k: int, rounds: int, watch: Watch) -> None:
    """The same in an event loop, three at a time."""
    many = blocks(pair, k, 20)

    async def run() -> None:
        for i in range(rounds // 3):
            batches = [pair.write(int(many[(i + j) % 20]), None, 64) for j in range(3)]
            since = time.monotonic()
            await asyncio.wait_for(asyncio.gather(*map(awaited, batches)), 30)
            watch.wait(lambda: None)
            if time.monotonic() - since > LATE_S:
                watch.late.append(time.monotonic() - since)
            for batch in batches:
                batch.close()

    asyncio.run(run())


def closing(pair: Joined, k: int, rounds: int, watch: Watch) -> None:
    """Submit and close at once."""
    many = blocks(pair, k, 20)
    for _ in range(rounds // 20):
        batch = pair.write(many, None, 64)
        batch.close()
        until(lambda batch=batch: batch.quiesced, "a closed batch, quiesced")


@over("tcp", "mapped", "process")
@pytest.mark.parametrize("workers", [1, 2])
def test_no_waiting_thread_or_loop_is_forgotten(join, wire, workers):
    """20,000 small batches, waited for by six threads and two event loops at once."""
    pair = join(wire, MiB, workers=workers)
    watch, rounds, since = Watch(), 2500, time.monotonic()
    parts = [waiting] * 5 + [closing] + [awaiting] * 2
    in_threads(*[lambda k=k, part=part: part(pair, k, rounds, watch) for k, part in enumerate(parts)])
    took = time.monotonic() - since
    print(f"{wire.provider}, {workers} workers: {len(watch.late)} late, {sorted(watch.late)[-5:]}, all in {took:.1f} s")
    assert len(watch.late) <= FEW * 8 * rounds
    stats = pair.here.stats()
    assert all(0 <= busy <= took + 1 for busy in stats.worker_busy_s), "a clock was read while another wrote it"
    pair.here.close()
    assert_balanced(pair.here)


@over("tcp", "mapped")
def test_who_waits_for_a_slow_peer_keeps_nobody_from_a_quick_one(join, wire):
    """The waiting thread sleeps in the worker's place; what others submit meanwhile must wake it."""
    slow = join(WIRES["tcp"] if wire.provider == "tcp" else WIRES["by_lanes"], MiB)
    quick = join(wire, MiB, here=slow.here)
    pauses = np.random.Generator(np.random.Philox(key=[9, 9])).uniform(0, 2e-4, 3000).tolist()
    watch, ended = Watch(), threading.Event()
    slow.far.stop()
    stuck = slow.write(0, 0, 64)

    def wait_for_slow() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                stuck.wait(0.3)

    def use_quick() -> None:
        try:
            for i, pause in enumerate(pauses):
                since = time.monotonic()
                while time.monotonic() < since + pause:  # so that it comes at every moment of the other's way to sleep
                    pass
                batch = quick.write(i, None, 64)
                watch.wait(lambda batch=batch: batch.wait(30))
                batch.close()
        finally:
            ended.set()

    in_threads(wait_for_slow, use_quick)
    slow.far.go_on()
    stuck.wait(20).close()
    print(f"{len(watch.late)} of 3,000 late: {sorted(watch.late)[-5:]}")
    assert len(watch.late) <= FEW * len(pauses)


@pytest.mark.parametrize(("store", "policy"), list(itertools.product(STORES, POLICIES)))
def test_every_policy_gives_back_what_many_threads_take(join, store, policy):
    """On both wires at once, half of the threads each; some close what is in flight."""
    options = {"store": store, "policy": policy, "workers": 2, "slices": 1 << 20, "batches": 2048, "cache_slices": 512}
    pair = join(WIRES["auto"], MiB, **options)
    other = join(WIRES["by_lanes"], MiB, here=pair.here)
    watch = Watch()
    parts = [(pair, waiting), (other, waiting), (pair, closing), (other, awaiting)]
    in_threads(*[lambda k=k, on=on, part=part: part(on, k, 100, watch) for k, (on, part) in enumerate(parts)])
    pair.here.close()
    assert_balanced(pair.here)


def test_large_and_small_batches_of_several_threads_all_arrive(join, wire):
    pair = join(wire, 16 * MiB, workers=2)
    large = 4 * MiB + np.arange(90, dtype=np.int64) * 66_000

    def move_large() -> None:
        for i in range(10):
            (pair.write if i % 2 else pair.read)(large, None, 65_999).wait(30).close()

    watch = Watch()
    in_threads(move_large, move_large, *[lambda k=k: waiting(pair, k, 300, watch) for k in range(3)])
    pair.write(large, None, 65_999).wait(20).close()
    got = pair.there()
    for at in large.tolist():
        assert (got[at : at + 65_999] == pair.data[at : at + 65_999]).all()


def test_hundreds_of_batches_are_awaited_at_once(join, wire):
    pair = join(wire, MiB, workers=2)

    async def run() -> None:
        for _ in range(5):
            batches = [pair.write(i * 100, None, 99) for i in range(200)]
            await asyncio.wait_for(asyncio.gather(*map(awaited, batches)), 30)
            assert all(batch.done for batch in batches)
            for batch in batches:
                batch.close()

    asyncio.run(run())
    assert (
        pair.there()[: 200 * 100].reshape(200, 100)[:, :99] == pair.data[: 200 * 100].reshape(200, 100)[:, :99]
    ).all()


@over(*OVER_SOCKETS)
def test_awaiting_a_peer_that_is_killed_ends(join, wire):
    pair = join(wire, MiB)
    pair.far.stop()

    async def run() -> None:
        batches = [pair.write(0, 0, MiB) for _ in range(5)]
        tasks = [asyncio.ensure_future(awaited(batch)) for batch in batches]
        await asyncio.sleep(0)
        pair.far.kill()
        for task in tasks:
            with pytest.raises(TransferFailed, match="PEER_GONE"):
                await asyncio.wait_for(task, 30)
        for batch in batches:
            batch.close()

    asyncio.run(run())
    pair.here.close()
    assert_balanced(pair.here)


def test_idle_engines_sleep(join):
    """Connected by either wire, after a transfer: all three processes together use next to nothing of a core."""
    pairs = [join(WIRES[name], MiB, workers=2, there={"workers": 2}) for name in ("tcp", "mapped")]
    for pair in pairs:
        pair.write(0, 0, MiB).wait(20).close()
    parks = sum(pair.here.stats().counts["parks"] for pair in pairs)
    before, since = [time.process_time(), *(pair.far(time.process_time) for pair in pairs)], time.monotonic()
    threading.Event().wait(3)  # what is measured is that nothing happens
    after = [time.process_time(), *(pair.far(time.process_time) for pair in pairs)]
    assert sum(after) - sum(before) < 0.03 * (time.monotonic() - since)
    assert sum(pair.here.stats().counts["parks"] for pair in pairs) <= parks + 2 * 2 * 10
    for pair in pairs:
        pair.write(0, 0, MiB).wait(20).close()
