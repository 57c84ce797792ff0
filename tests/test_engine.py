"""An engine: settings, threads, figures, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import threading

import numpy as np
import pytest

from mooncache import (
    Engine,
    EngineClosed,
    TransportError,
    UsageError,
)
from mooncache.kernels import enums
from mooncache.providers.inprocess.emulated import Emulated
from mooncache.providers.inprocess.loopback import Loopback
from tests.helpers import SMALL, Pair, Task, assert_balanced, awaited, batch_field, in_threads, run_python, until


# ------------------------------------------------------------------------------ settings and names
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slices": 0}, "slices must be an integer from 1 to .*, got 0"),
        ({"workers": -1}, "workers must be an integer from 1 to 16, got -1"),
        ({"workers": 17}, "workers must be an integer from 1 to 16, got 17"),
        ({"retries": -1}, "retries must be an integer from 0"),
        ({"chain": 1.5}, "chain must be an integer .*, got 1.5"),
        ({"batches": True}, "batches must be an integer .*, got True"),
        ({"slice_bytes": "64K"}, "slice_bytes must be an integer .*, got '64K'"),
        ({"slizes": 5}, "unknown setting 'slizes'; there are: .*slices"),
        ({"policy": "hope"}, "a policy of .*'bulk'.*, got 'pool' .str. and 'hope' .str."),
        ({"store": "disk"}, "expected a store of .*'heap'"),
        (
            {"provider": "pigeon"},
            "expected a Provider or one of 'loopback', 'emulated', 'tcp', 'shm', 'rdma', 'auto', got 'pigeon'",
        ),
        ({"provider": 5}, "expected a Provider or one of"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(options, message):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match=message):
        Engine(**options)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_name_in_use_is_refused_and_can_be_used_after_the_engine_was_closed(engines):
    first = engines("twin")
    gc.collect()  # what other tests have left
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match="an engine named 'twin' is open in this process"):
        engines("twin")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    first.close()
    assert engines("twin").name == "twin"


def test_engines_without_a_name_get_one_each(engines):
    assert engines().name != engines().name


@pytest.mark.parametrize("make", [Loopback, Emulated])
def test_a_provider_serves_one_engine(engines, make):
    provider = make()
    engine = engines("first", provider=provider)
    with pytest.raises((UsageError, TransportError), match="open"):
        engines("second", provider=provider)
    region = engine.register(np.zeros(64, np.uint8))
    engine.write("first", region.address, region.address + 32, 16).wait(20).close()


# ------------------------------------------------------------------------------ several of everything
@pytest.mark.parametrize("workers", [1, 3])
def test_three_submitting_threads_and_several_workers(pairs, workers):
    pair = pairs(workers=workers, slices=32 * 1024, arena=1 << 20)
    third = (1 << 20) // 3

    def run(k: int) -> None:
        batches = []
        for i in range(20):
            offsets = k * third + (i * 200 + np.arange(200, dtype=np.int64)) * 80
            batches.append(pair.write(offsets, length=70))
        for batch in batches:
            batch.wait(20).close()

    in_threads(lambda: run(0), lambda: run(1), lambda: run(2))
    for k in range(3):
        at = k * third
        seen, sent = (a[at : at + 4000 * 80].reshape(4000, 80) for a in (pair.target, pair.source))
        np.testing.assert_array_equal(seen[:, :70], sent[:, :70])
        assert not seen[:, 70:].any()
    stats = pair.here.stats()
    assert stats.counts["batches_taken"] == 60
    assert len(stats.worker_busy_s) == len(stats.worker_freeing_s) == workers
    pair.close()
    assert_balanced(pair.here)


def test_batches_go_to_the_workers_in_turn(pairs):
    pair = pairs(workers=3)
    for _ in range(9):
        pair.scattered(2).wait(20).close()
    assert [int(b.counters[enums.Kind.BATCHES_TAKEN]) for b in pair.here._runtime.actors.workers] == [3, 3, 3]


def test_a_thread_that_ended_leaves_its_control_block_to_the_next(pair):
    before = None
    for n in range(1, 11):
        in_threads(lambda: pair.scattered(5).wait(20).close())
        counts = pair.here.stats().counts
        assert counts["batches_submitted"] == counts["batches_closed"] == n  # nothing that ended threads did is lost
        before = before or len(pair.here._callers.blocks)
    assert len(pair.here._callers.blocks) <= before + 1


def test_chunks_cached_by_a_thread_that_ended_are_not_lost(pairs):
    pair = pairs(policy="thread_cache", slices=512, cache_slices=512)
    for _ in range(5):
        in_threads(lambda: pair.scattered(512, timeout=20).wait(20).close())
        assert pair.here.stats().free_slices == 512


def test_threads_at_the_same_time_have_a_control_block_each(pair):
    together = threading.Barrier(8)

    def own() -> int:
        ctl = pair.here.ctl
        together.wait(20)
        return ctl

    assert len(set(in_threads(*[own] * 8))) == 8


def test_a_thread_that_python_did_not_start_has_a_control_block_of_its_own(pair):
    import _thread

    seen, go, done = [], threading.Event(), threading.Event()

    def foreign() -> None:
        seen.append(pair.here.ctl)
        go.wait(20)
        done.set()

    _thread.start_new_thread(foreign, ())
    until(lambda: seen, "the foreign thread")
    mine = Task(lambda: pair.here.ctl).result()
    go.set()
    assert done.wait(20)
    assert mine != seen[0]


# ------------------------------------------------------------------------------ looking
def test_stats_add_up(pair):
    pair.scattered(300).wait(20)  # forgotten at once: closed
    batch = pair.scattered(300).wait(20)
    stats = pair.here.stats()
    assert stats.capacity_slices == 4096
    assert stats.free_slices == 4096 - 512
    assert stats.high_water_slices >= 512
    assert stats.open_batches == 1
    assert stats.counts["slices_filled"] == stats.counts["completed"] == 600
    assert stats.counts["requests"] == 600
    assert set(stats.counts) == {kind.name.lower() for kind in enums.Kind}
    assert stats.caller_freeing_s >= 0
    assert stats.reaper_freeing_s == 0
    batch.close()
    assert pair.here.stats().free_slices == 4096


def test_an_engine_says_what_it_is(engines):
    engine = engines("plain")
    assert repr(engine) == "<Engine 'plain' on loopback, pool + bulk, 0 regions, 0 peers, 4096 of 4096 slots free>"
    engine.close()
    assert repr(engine).endswith("closed>")


# ------------------------------------------------------------------------------ the end
def test_a_closed_engine_refuses_everything_and_can_be_closed_again(pair):
    batch = pair.scattered(3).wait(20)
    pair.here.close()
    pair.here.close()
    for call in (
        lambda: pair.scattered(3),
        lambda: pair.write(0),
        lambda: pair.read(0),
        lambda: pair.here.register(bytearray(8)),
        lambda: pair.here.connect(pair.peer),
    ):
        with pytest.raises(EngineClosed, match="is closed"):
            call()
    with pytest.raises(EngineClosed, match="was closed while"):
        batch.wait()
    with pytest.raises(EngineClosed):
        batch.cancel()
    assert batch.done
    assert batch.quiesced
    batch.close()
    assert pair.here.stats().free_slices == 4096


def test_closing_an_engine_ends_the_waits_for_its_batches(gated):
    batch = gated.scattered(3)
    waiter = Task(batch.wait)
    until(lambda: batch_field(gated.here, batch, "waiters") == 1, "the waiter, asleep")
    closing = Task(gated.here.close)
    until(lambda: batch.done, "the batch, closed by its engine")
    gated.here.provider.open_gate()
    closing.result()
    with pytest.raises(EngineClosed, match="was closed while"):
        waiter.result()


def test_closing_an_engine_ends_the_awaits_for_its_batches(gated):
    async def main() -> None:
        batch = gated.scattered(3)
        waiting = asyncio.ensure_future(awaited(batch))
        await asyncio.sleep(0)
        gated.here.provider.open_gate()  # the worker can leave; whether it finishes the batch first is chance
        await asyncio.to_thread(gated.here.close)
        with contextlib.suppress(EngineClosed):
            await asyncio.wait_for(waiting, 20)
        with pytest.raises(EngineClosed):
            await batch

    asyncio.run(main())


def test_closing_an_engine_ends_the_waits_for_capacity(pairs):
    for _ in range(20):
        pair = pairs(slices=256)
        held = pair.scattered(256).wait(20)
        waiter = Task(pair.scattered, 256)
        until(lambda pair=pair: pair.state.shared["waiters"] == 1, "the submitter, asleep")
        pair.here.close()
        with pytest.raises(EngineClosed):
            waiter.result()
        assert held.done
        assert_balanced(pair.here)


def test_closing_an_engine_while_threads_submit_leaves_nobody_waiting(pairs):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            pair = pairs()
            started = threading.Barrier(3)

            def submit(pair: Pair = pair, started: threading.Barrier = started) -> bool:
                started.wait(20)
                with contextlib.suppress(EngineClosed):
                    while True:
                        pair.scattered(3).wait(20).close()
                return True

            tasks = [Task(submit), Task(submit)]
            started.wait(20)
            pair.here.close()
            assert all(task.result() for task in tasks)
    finally:
        sys.setswitchinterval(interval)


def test_an_engine_is_a_context(engines):
    with engines("inside") as engine:
        assert not engine.closed
    assert engine.closed


def test_an_engine_that_is_forgotten_closes_itself():
    """Nothing in it refers back to it, so it goes with its last reference."""
    engine = Engine("forgotten", **SMALL)
    threads = list(engine._runtime.actors.threads)
    del engine
    Engine("forgotten", **SMALL).close()  # its name is free at once
    until(lambda: not any(thread.is_alive() for thread in threads), "the threads, gone")


def test_an_engine_may_be_collected_wherever_its_own_threads_are():
    """They hold locks that closing takes, and closing waits for them."""
    script = """
import gc, weakref
import numpy as np, mooncache
there = mooncache.Engine(provider="tcp")
target = there.register(np.zeros(4096, np.uint8))
def forgotten(k):
    engine = mooncache.Engine(f"forgotten-{k}", provider="tcp", slices=256, batches=4, peers=2)
    region = engine.register(np.zeros(4096, np.uint8))  # which refers to the engine: only the collector ends this
    engine.write(there.address, region.address, target.address, 64).wait(20).close()
    # Its listener's thread collects it, with a lock of its provider's held.
    loop, held, reference = engine._service._listener._loop, engine.provider._lock, weakref.ref(engine)
    def collect():
        with held:
            del region_of[k]
            gc.collect()
    region_of = {k: region}
    loop.call_soon_threadsafe(collect)
    return reference
gc.disable()
references = [forgotten(k) for k in range(3)]
del there, target
while any(reference() for reference in references):
    gc.collect()
print("end")
"""
    done = run_python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_an_interpreter_with_running_batches_and_open_engines_ends_by_itself():
    script = """
import numpy as np, mooncache
engines = [mooncache.Engine(policy=p, slices=256, batches=4, peers=2) for p in ("bulk", "deferred", "epoch")]
for engine in engines:
    region = engine.register(np.zeros(4096, np.uint8))
    batch = engine.write(engine.name, region.address, region.address + 100, 64)
print("end")
"""
    done = run_python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
