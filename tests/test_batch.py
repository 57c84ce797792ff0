"""A batch from submission to close, as a caller sees it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from mooncache import (
    Batch,
    EngineClosed,
    Status,
    TransferFailed,
    UsageError,
)
from mooncache.kernels import waits
from tests.helpers import POLICIES, Task, assert_balanced, awaited, batch_field, in_threads, run_python, until
from tests.kernels.entries import Gated


def test_a_batch_runs_is_done_and_is_closed(gated):
    batch = gated.scattered(10)
    assert not batch.done
    assert not batch.quiesced
    assert (batch.requests, batch.slices, batch.peer) == (10, 10, gated.peer)
    assert repr(batch) == f"<Batch of 10 requests to {gated.peer!r}, running>"
    with pytest.raises(UsageError, match="not finished; wait for it"):
        _ = batch.failures
    with pytest.raises(TimeoutError, match=r"running> was not done within 0.001 s"):
        batch.wait(0.001)
    with pytest.raises(TimeoutError):
        batch.wait(0)
    with pytest.raises(TimeoutError):
        batch.wait(-1)
    gated.here.provider.open_gate()
    assert batch.wait(20) is batch
    assert batch.wait() is batch
    assert batch.done
    assert batch.quiesced
    assert batch.failures == ()
    assert repr(batch).endswith("done>")
    batch.close()
    assert batch.done
    assert batch.quiesced
    assert batch.slices == 0
    assert batch.failures == ()
    assert repr(batch).endswith("closed>")
    with pytest.raises(UsageError, match="closed already"):
        batch.close()
    with pytest.raises(UsageError, match="closed"):
        batch.wait()
    with pytest.raises(UsageError, match="closed"):
        batch.cancel()


def test_failures_can_be_asked_for_after_the_batch_was_closed(pair):
    pair.write(0, length=8).wait(20).close()
    pair.remote.unregister()
    batch = pair.scattered(2)
    until(lambda: batch.done, "the end")
    batch.close()  # closed without a look at them
    assert [f.request for f in batch.failures] == [0, 1]


def test_failures_of_a_batch_closed_while_it_ran_were_not_kept(gated):
    batch = gated.scattered(2)
    batch.close()
    with pytest.raises(UsageError, match="closed before it finished; its failures were not kept"):
        _ = batch.failures


def test_a_batch_is_a_context(gated):
    with gated.scattered(3) as batch:
        assert not batch.done
        until(lambda: gated.here.provider.queues[0][0].outstanding == 3, "the slices, posted")
    assert batch.done  # closed
    assert not batch.quiesced  # but the NIC still has it
    gated.here.provider.open_gate()
    until(lambda: batch.quiesced, "the end of the detached batch")
    with gated.scattered(3) as batch:
        batch.wait(20)
        batch.close()  # already, and the context does not mind


def test_a_batch_that_is_forgotten_closes_itself(gated):
    gated.here.provider.open_gate()
    gated.scattered(300).wait(20)
    gc.collect()
    stats = gated.here.stats()
    assert stats.open_batches == 0
    assert stats.free_slices == stats.capacity_slices
    gated.here.provider.shut_gate()
    running = gated.scattered(300)
    del running
    gc.collect()
    gated.here.provider.open_gate()
    until(lambda: gated.here.stats().open_batches == 0, "the end of the forgotten batch")


def test_a_cancelled_batch_ends_with_what_was_posted(pairs):
    pair = pairs(Gated(), Gated(), queue_depth=8)
    batch = pair.scattered(50)
    until(lambda: pair.here.provider.queues[0][0].outstanding == 8, "eight slices, posted")
    batch.cancel()
    batch.cancel()  # once more changes nothing
    with pytest.raises(TimeoutError):
        batch.wait(0.001)  # the NIC still has eight
    pair.here.provider.open_gate()
    with pytest.raises(TransferFailed, match=r"42 of 50 requests .* the first is request 8: CANCELLED"):
        batch.wait(20)
    assert [f.request for f in batch.failures] == list(range(8, 50))
    batch.cancel()  # done: no effect
    batch.close()
    np.testing.assert_array_equal(
        pair.target[: 8 * 65].reshape(8, 65)[:, :64], pair.source[: 8 * 65].reshape(8, 65)[:, :64]
    )
    assert not pair.target[8 * 65 :].any()
    pair.close()
    assert_balanced(pair.here)


def test_a_batch_behind_a_cancelled_one_is_posted(pairs):
    pair = pairs(Gated(), Gated(), queue_depth=8)
    first, second, third = pair.scattered(50), pair.scattered(50), pair.scattered(50)
    until(lambda: pair.here.provider.queues[0][0].outstanding == 8, "eight slices, posted")
    second.cancel()
    second.close()
    pair.here.provider.open_gate()
    first.wait(20)
    third.wait(20)
    first.close()
    third.close()
    pair.close()
    counts = assert_balanced(pair.here).counts
    assert (counts["completed"], counts["failed"]) == (100, 50)


def test_a_batch_past_its_deadline_fails_what_was_not_posted(pairs):
    pair = pairs(Gated(), Gated(), queue_depth=8)
    blocking = pair.scattered(8)
    until(lambda: pair.here.provider.queues[0][0].outstanding == 8, "the queue, full")
    late = pair.scattered(5, timeout=0.01)
    with pytest.raises(TransferFailed, match="TIMED_OUT"):
        late.wait(20)
    assert [f.request for f in late.failures] == list(range(5))
    assert "deadline passed" in late.failures[0].reason
    late.close()
    pair.here.provider.open_gate()
    blocking.wait(20).close()


def test_two_threads_may_wait_for_one_batch_and_one_may_close_it(gated):
    batch = gated.scattered(3)
    waiting = [Task(batch.wait) for _ in range(2)]
    gated.here.provider.open_gate()
    assert [task.result() for task in waiting] == [batch, batch]
    gated.here.provider.shut_gate()
    other = gated.scattered(3)
    waiter = Task(other.wait)
    until(lambda: batch_field(gated.here, other, "waiters") == 1, "the waiter, asleep")
    other.close()
    with pytest.raises(UsageError, match="closed"):
        waiter.result()


def told_by(wait: Callable[[], object]) -> str:
    """What a waiter hears."""
    try:
        wait()
    except (TransferFailed, UsageError, EngineClosed) as error:
        return type(error).__name__
    return "all arrived"


WAYS: dict[str, Callable[[Batch], object]] = {
    "wait": lambda batch: batch.wait(20),
    "await": lambda batch: asyncio.run(awaited(batch)),
    "failures": lambda batch: check_failures(batch),
}


def check_failures(batch: Batch) -> None:
    until(lambda: batch.done, "the end")
    if failures := batch.failures:
        raise TransferFailed(failures, batch.requests, batch.peer)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_that_failed_never_counts_as_arrived_whoever_closes_it_meanwhile(pairs, policy, way):
    pair = pairs(policy=policy, slices=64 * 1024)
    pair.write(0).wait(20).close()
    heard = set()
    for n in (10, 250) * 30:
        batch = pair.scattered(n, timeout=0)  # every request fails as TIMED_OUT
        until(lambda batch=batch: batch.done, "the end")
        told, _ = in_threads(partial(told_by, partial(WAYS[way], batch)), partial(told_by, batch.close))
        heard.add(told)
    assert heard <= {"TransferFailed", "UsageError"}, heard
    pair.close()
    assert_balanced(pair.here)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_that_failed_never_counts_as_arrived_when_its_engine_closes_meanwhile(pairs, policy, way):
    heard = set()
    for _ in range(5):
        pair = pairs(policy=policy)
        pair.write(0).wait(20).close()
        batch = pair.scattered(10, timeout=0)
        told, _ = in_threads(partial(told_by, partial(WAYS[way], batch)), pair.here.close)
        heard.add(told)
    assert heard <= {"TransferFailed", "UsageError", "EngineClosed"}, heard
    assert way == "failures" or "UsageError" not in heard


def test_who_waits_is_told_the_outcome_that_the_closing_thread_has_seen(gated):
    gated.here.provider.open_gate()
    gated.write(0).wait(20).close()
    gated.remote.unregister()
    batch = gated.scattered(3)
    until(lambda: batch.done, "the end")
    batch.close()
    with pytest.raises(TransferFailed, match="3 of 3 requests"):
        batch._tell()  # what a waiter does that was woken only now
    with pytest.raises(UsageError, match="this batch is closed"):
        batch.wait()


def test_of_two_threads_that_close_a_batch_one_is_told(pair):
    for _ in range(50):
        batch = pair.write(0).wait(20)
        assert sorted(in_threads(*[partial(told_by, batch.close)] * 2)) == ["UsageError", "all arrived"]


def test_a_wait_does_not_hold_the_gil(gated):
    """Were it held, nothing here could open the gate, and the kernel would come back unfinished after its 60 s."""
    batch = gated.scattered(3)
    waiter = Task(waits.wait, gated.here.ctl, batch._handle, 60_000_000_000)
    count = 0
    until(lambda: batch_field(gated.here, batch, "waiters") == 1, "the waiter, asleep")
    while count < 100_000:
        count += 1
    assert waiter.running
    gated.here.provider.open_gate()
    assert waiter.result() == Status.OK
    assert count == 100_000


INTERRUPT = """
import os, signal, threading
import numpy as np
import mooncache, mooncache.actors
from mooncache.providers.inprocess.emulated import Emulated, Nic
from mooncache.kernels import calls
from mooncache.kernels import waits

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
mooncache.actors.JOIN_SECONDS = 0.05
far = Nic(latency_ns=3600e9)
here = mooncache.Engine("here", provider=Emulated(far), slices=256, batches=4, peers=2)
there = mooncache.Engine("there", provider=Emulated(far), slices=256, batches=4, peers=2)
a, b = here.register(np.zeros(64, np.uint8)), there.register(np.zeros(64, np.uint8))
batch = here.write("there", a.address, b.address, 64)
ctl = here.ctl

def interrupt():
    row = here._state.batch_rows[batch._handle & 0xFFFFFFFF]
    while row["waiters"] == 0 or not here.provider.queues[0][0].outstanding:
        pass
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    {wait}
except KeyboardInterrupt:
    print("interrupted")
assert not batch.done
assert len(batch.failures if batch.done else ()) == 0
batch.close()
assert not batch.quiesced
try:
    here.close()
except mooncache.TransportError as error:
    print(error)
while any(thread.name.startswith("here") for thread in threading.enumerate()):
    pass
print("its thread has left")
here.close()  # a second one does nothing
del here, there, batch
import gc
gc.collect()
print("still alive")
"""


@pytest.mark.parametrize("wait", ["batch.wait()", "batch.wait(timeout=3000)"])
def test_ctrl_c_ends_a_wait_and_a_nic_that_never_answers_does_not_hang_the_end(wait):
    done = run_python(INTERRUPT.replace("{wait}", wait))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "interrupted",
        "here-worker-0 still wait for the NIC; buffers in flight are not quiesced",
        "its thread has left",
        "still alive",
    ]
