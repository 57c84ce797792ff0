"""What a NIC can do to an engine: delay, refuse, break down, answer out of order, and be short of room."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncache import Status, TransferFailed, UsageError
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.inprocess.emulated import Emulated, Nic
from mooncache.providers.inprocess.faults import Action, Fault, random_faults
from tests.helpers import POLICIES, Pair, assert_balanced, until
from tests.kernels.test_complete import EXPECTED, PASSING

LENGTH = 64
FAST = {"latency_ns": 1000}


def emulated(*faults: Fault, **nic):
    return Emulated(Nic(**{**FAST, **nic}, faults=faults)), Emulated(Nic(**FAST))


def finish(batch) -> dict[int, Status]:
    """Wait, and say which requests failed and why."""
    with contextlib.suppress(TransferFailed):
        batch.wait(20)
    return {f.request: f.status for f in batch.failures}


def assert_exactly(pair: Pair, failed, n: int, length: int = LENGTH, stride: int = LENGTH + 1) -> None:
    """The bytes of all other requests arrived; of these none did."""
    for i in range(n):
        at = slice(i * stride, i * stride + length)
        if i in failed:
            assert not pair.target[at].any(), f"request {i} is said to have failed, but bytes of it arrived"
        else:
            np.testing.assert_array_equal(pair.source[at], pair.target[at], err_msg=f"request {i}")


@pytest.mark.parametrize("wc_status", list(EXPECTED), ids=lambda s: s.name)
def test_a_failed_work_request_fails_its_request_only(pairs, wc_status):
    pair = pairs(*emulated(Fault(17, Action.FAIL, wc_status), Fault(40, Action.FAIL, wc_status)), retries=0)
    batch = pair.scattered(60)
    assert finish(batch) == {17: EXPECTED[wc_status], 40: EXPECTED[wc_status]}
    assert_exactly(pair, {17, 40}, 60)
    assert all(f.reason for f in batch.failures)
    batch.close()
    pair.close()
    assert assert_balanced(pair.here).counts["failed"] == 2


@pytest.mark.parametrize("wc_status", PASSING, ids=lambda s: s.name)
def test_a_passing_failure_is_retried_and_arrives(pairs, wc_status):
    pair = pairs(*emulated(Fault(3, Action.FAIL, wc_status)))
    batch = pair.scattered(60)
    assert finish(batch) == {}
    assert_exactly(pair, set(), 60)
    batch.close()
    pair.close()
    assert assert_balanced(pair.here).counts["retried"] == 1


def test_a_broken_connection_flushes_what_is_outstanding_and_all_of_it_arrives_in_the_end(pairs):
    # All 60 are posted as one chain: the fault strikes the 41st and takes the 40 before it along.
    pair = pairs(*emulated(Fault(40, Action.FLUSH), latency_ns=1_000_000))
    batch = pair.scattered(60)
    assert finish(batch) == {}
    assert_exactly(pair, set(), 60)
    batch.close()
    pair.close()
    assert assert_balanced(pair.here).counts["retried"] == 41


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_connection_that_breaks_more_often_than_is_retried_fails_as_flushed(pairs, retries):
    # One slice alone: it is work request 0, 1, 2 ... as often as it is tried.
    pair = pairs(*emulated(*[Fault(i, Action.FLUSH) for i in range(retries + 1)]), retries=retries)
    batch = pair.scattered(1)
    assert finish(batch) == {0: Status.FLUSHED}
    assert_exactly(pair, {0}, 1)
    batch.close()
    again = pair.scattered(1)
    assert finish(again) == {}
    pair.close()
    assert assert_balanced(pair.here).counts["retried"] == retries


def test_a_connection_that_breaks_as_often_as_is_retried_delivers(pairs):
    pair = pairs(*emulated(*[Fault(i, Action.FLUSH) for i in range(3)]), retries=3)
    assert finish(pair.scattered(1)) == {}
    assert_exactly(pair, set(), 1)


def test_delayed_completions_hold_up_those_behind_them_and_lose_none(pairs):
    faults = [Fault(i, Action.DELAY, 200_000_000) for i in (0, 5, 30)]  # 200 µs
    pair = pairs(*emulated(*faults))
    assert finish(pair.scattered(60)) == {}
    assert_exactly(pair, set(), 60)


@pytest.mark.parametrize("back", [1, 7, 59, 500])
def test_completions_out_of_order_reach_their_requests(pairs, back):
    # Request 10 fails and then changes places: the failure must stay with it.
    faults = [Fault(10, Action.FAIL, WcStatus.REM_OP_ERR), *[Fault(i, Action.REORDER, back) for i in range(11, 60)]]
    pair = pairs(*emulated(*faults, latency_ns=100_000))
    assert finish(pair.scattered(60)) == {10: Status.REMOTE_ERROR}
    assert_exactly(pair, {10}, 60)


@pytest.mark.parametrize("chain", [1, 128])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_short_queues_only_take_longer(pairs, depth, chain):
    faults = [Fault(5, Action.FLUSH), Fault(9, Action.FAIL, WcStatus.REM_ACCESS_ERR), Fault(20, Action.REORDER, 3)]
    pair = pairs(*emulated(*faults), queue_depth=depth, chain=chain)
    batches = [pair.scattered(50), pair.scattered(50)]
    failed = [finish(batch) for batch in batches]
    assert sum(map(len, failed)) == 1
    assert {s for f in failed for s in f.values()} == {Status.REMOTE_ACCESS}
    assert_exactly(pair, set(), 50)  # what one of them could not deliver, the other did
    for batch in batches:
        batch.close()
    pair.close()
    assert_balanced(pair.here)


def test_a_slow_wire_is_cancelled_by_the_deadline_and_says_which_requests_were_not_posted(pairs):
    # 4 slots on the wire, 1 ms each way; the deadline has passed when the worker sees the batch.
    pair = pairs(*emulated(latency_ns=1_000_000), queue_depth=4)
    pair.here.connect(pair.peer)
    batch = pair.scattered(50, timeout=0)
    assert finish(batch) == dict.fromkeys(range(50), Status.TIMED_OUT)
    assert_exactly(pair, set(range(50)), 50)
    batch.close()
    pair.close()
    assert_balanced(pair.here)


def test_a_detached_batch_is_given_back_when_the_nic_has_answered(pairs):
    pair = pairs(*emulated(latency_ns=2_000_000), slices=512)
    batch = pair.scattered(512)
    batch.close()
    # The next one needs the whole pool; that it can start means that the first was given back.
    second = pair.scattered(512, timeout=20)
    assert batch.quiesced
    assert finish(second) == {}
    second.close()
    pair.close()
    assert_balanced(pair.here)


@pytest.mark.fuzz
@given(
    seed=st.integers(0, 1 << 30),
    policy=st.sampled_from(POLICIES),
    store=st.sampled_from(["pool", "heap"]),
    depth=st.sampled_from([1, 3, 16, 512]),
    chain=st.sampled_from([1, 5, 128]),
    retries=st.sampled_from([0, 1, 3]),
    batches=st.lists(st.tuples(st.integers(0, 120), st.sampled_from(["wait", "close", "cancel"])), max_size=6),
)
@settings(max_examples=settings().max_examples if settings().max_examples > 100 else 40)
def test_whatever_the_faults_failures_are_exact_and_everything_comes_back(
    seed, policy, store, depth, chain, retries, batches
):
    chances = np.random.Generator(np.random.Philox(key=[seed, 7])).random(4) * 0.1
    plan = random_faults(
        seed, 2000, delay=chances[0], fail=chances[1], flush=chances[2], reorder=chances[3], delay_ns=5000
    )
    pair = Pair(
        *emulated(*plan), arena=64 << 10, policy=policy, store=store, queue_depth=depth, chain=chain, retries=retries,
        slices=8192,
    )  # fmt: skip
    try:
        for n, what in batches:
            pair.target[:] = 0
            batch = pair.scattered(n)
            if what == "close":
                batch.close()
                until(lambda batch=batch: batch.quiesced, "the end of a detached batch")
                continue
            if what == "cancel":
                batch.cancel()
            failed = finish(batch)
            assert_exactly(pair, failed, n)
            if what == "wait":
                assert Status.CANCELLED not in failed.values()
            batch.close()
    finally:
        pair.close()
    assert_balanced(pair.here)


# ------------------------------------------------------------------------------ plans
def test_the_same_seed_makes_the_same_plan():
    make = lambda seed: random_faults(seed, 500, delay=0.1, fail=0.1, flush=0.1, reorder=0.1)  # noqa: E731
    assert make(3) == make(3)
    assert make(3) != make(4)
    assert {f.action for f in make(3)} == set(Action)
    assert [f.at for f in make(3)] == sorted({f.at for f in make(3)})


@pytest.mark.parametrize("chances", [{"delay": -0.1}, {"fail": 0.6, "flush": 0.5}])
def test_chances_that_are_none_are_refused(chances):
    with pytest.raises(UsageError, match="chances must be >= 0 and sum to at most 1"):
        random_faults(1, 10, **chances)


def test_two_faults_of_one_work_request_are_refused():
    with pytest.raises(UsageError, match="one fault a work request"):
        Emulated(Nic(faults=[Fault(1, Action.FLUSH), Fault(1, Action.DELAY, 5)]))


@pytest.mark.parametrize("nic", [{"bits_per_s": 0}, {"messages_per_s": -1}, {"latency_ns": -1}])
def test_a_nic_that_cannot_be_is_refused(nic):
    with pytest.raises(UsageError, match="a NIC needs a rate > 0"):
        Nic(**nic)
