"""Several NICs: slices are spread over them, and when some break down the others carry on."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncache import Status, TransferFailed, UsageError
from mooncache.kernels.enums import QueueState
from mooncache.kernels.verbs import WcStatus
from mooncache.limits import NICS, SLICES_GATHERED
from mooncache.providers.inprocess.emulated import Emulated, Nic
from mooncache.providers.inprocess.faults import Action, Fault, random_faults
from tests.helpers import POLICIES, Pair, assert_balanced, until

RAIL = {"latency_ns": 1000, "breaks": True, "signal": 16, "gathers": 4}
LENGTH = 64


def rails(*nics: Nic, n: int = 2) -> tuple[Emulated, Emulated]:
    """Both ends of a wire of these NICs, or of two that break."""
    return Emulated(*(nics or [Nic(**RAIL)] * n)), Emulated(*[Nic(**RAIL)] * n)


def finish(batch) -> dict[int, Status]:
    with contextlib.suppress(TransferFailed):
        batch.wait(30)
    return {f.request: f.status for f in batch.failures}


def side_by_side(n: int):
    """n requests that lie side by side at the target and apart here: offsets of source and target."""
    at = np.arange(n, dtype=np.int64)
    return 2 * LENGTH * at, LENGTH * at


def assert_arrived(pair: Pair, n: int, failed=()) -> None:
    source, target = side_by_side(n)
    for i in range(n):
        there = pair.target[target[i] : target[i] + LENGTH]
        if i not in failed:
            np.testing.assert_array_equal(there, pair.source[source[i] : source[i] + LENGTH], err_msg=f"request {i}")


def write(pair: Pair, n: int, **options):
    return pair.write(*side_by_side(n), LENGTH, **options)


def states(pair: Pair, rail: int) -> set[QueueState]:
    rows = [row for queues in pair.state.queues.values() for row in queues]
    return {row.state for row in rows if row.pair.lkeys == rail}


def posted(pair: Pair, rail: int) -> int:
    """Work requests that went over one rail, probes and markers included."""
    return sum(row.row["head"] for queues in pair.state.queues.values() for row in queues if row.pair.lkeys == rail)


# ------------------------------------------------------------------------------ both up
@pytest.mark.parametrize("breaks", [False, True])
def test_slices_travel_over_all_rails_and_all_arrive(pairs, breaks):
    nic = Nic(**{**RAIL, "breaks": breaks})
    pair = pairs(*rails(nic, nic), workers=2, chain=16, queue_depth=64)
    for _ in range(4):
        assert finish(write(pair, 2000)) == {}
        assert_arrived(pair, 2000)
        pair.target[:] = 0
    assert min(posted(pair, 0), posted(pair, 1)) > 4 * 500 // 4 // 2
    pair.close()
    assert_balanced(pair.here)


def test_a_slower_rail_weighs_less(pairs):
    fast, slow = Nic(bits_per_s=400 * 10**9), Nic(bits_per_s=100 * 10**9)
    pair = pairs(*rails(fast, slow))
    pair.scattered(1).wait()
    assert [row.pair.weight for row in pair.state.queues[0, 0]] == [1024, 256]


def test_engines_with_different_numbers_of_rails_reach_each_other(pairs):
    pair = pairs(Emulated(*[Nic(**RAIL)] * 3), Emulated(Nic(**RAIL)))
    assert finish(write(pair, 500)) == {}
    assert_arrived(pair, 500)
    assert [row.pair.rkeys for row in pair.state.queues[0, 0]] == [0, 0, 0]


def test_a_peer_that_comes_back_under_its_name_keeps_its_queue_pairs(engines):
    here = engines("here", provider=rails()[0])
    arena = np.ones(1000, np.uint8)
    local = here.register(arena)
    for _ in range(2):
        there = engines("there", provider=rails()[1])
        memory = np.zeros(1000, np.uint8)
        region = there.register(memory)
        with contextlib.suppress(TransferFailed):  # the first time after it came back the keys are old
            here.write("there", local.address, region.address, 1000).wait(20)
        here.write("there", local.address, region.address, 1000).wait(20).close()
        assert memory.all()
        there.close()
    assert len(here._state.queues[0, 0]) == 2


# ------------------------------------------------------------------------------ one goes down
@pytest.mark.parametrize("down", [0, 1])
@pytest.mark.parametrize("reading", [False, True])
def test_a_rail_that_goes_down_in_mid_batch_leaves_its_slices_to_the_other(pairs, reading, down):
    slow = Nic(**{**RAIL, "messages_per_s": 200_000})  # 5 µs each, so that the batch is under way for milliseconds
    pair = pairs(*rails(slow, slow), queue_depth=64, chain=8)
    provider = pair.here.provider
    if reading:
        pair.target[:] = pair.source[::-1]
    source, target = side_by_side(4000)
    batch = pair.read(target, source, LENGTH) if reading else pair.write(source, target, LENGTH)
    until(lambda: posted(pair, down) > 100, "slices on that rail")
    provider.take_down(down)
    assert finish(batch) == {}
    if reading:
        for s, t in zip(source, target, strict=True):
            np.testing.assert_array_equal(pair.source[s : s + LENGTH], pair.target[t : t + LENGTH])
    else:
        assert_arrived(pair, 4000)
    batch.close()
    until(lambda: states(pair, down) == {QueueState.CLOSED}, "the queue, closed")
    assert states(pair, 1 - down) == {QueueState.READY}
    before = posted(pair, down)
    assert finish(write(pair, 100)) == {}
    assert posted(pair, down) == before
    pair.close()
    assert_balanced(pair.here)


def test_a_rail_that_returns_carries_slices_again(pairs):
    pair = pairs(*rails(), queue_depth=32, chain=8, workers=2)
    provider = pair.here.provider
    for _ in range(3):
        for rail in (0, 1):
            provider.take_down(rail)
            assert finish(write(pair, 500)) == {}
            provider.bring_up(rail)
            until(lambda rail=rail: states(pair, rail) == {QueueState.READY}, "the queue, ready again")
            before = posted(pair, rail)
            assert finish(write(pair, 500)) == {}
            assert finish(write(pair, 500)) == {}  # each worker had one
            assert posted(pair, rail) > before
    pair.close()
    assert_balanced(pair.here)


def stranded(pairs):
    """A pair all of whose rails are down, and a batch that waits for them."""
    pair = pairs(*rails())
    pair.scattered(1).wait(20)
    for rail in (0, 1):
        pair.here.provider.take_down(rail)
    return pair, write(pair, 300)


def test_while_all_rails_are_down_batches_wait_and_when_one_returns_they_arrive(pairs):
    pair, batch = stranded(pairs)
    batches = [batch, write(pair, 300), write(pair, 300)]
    until(lambda: states(pair, 0) == states(pair, 1) == {QueueState.CLOSED}, "both, closed")
    assert not any(batch.done for batch in batches)
    pair.here.provider.bring_up(1)
    assert [finish(batch) for batch in batches] == [{}] * 3
    assert_arrived(pair, 300)
    pair.close()
    assert_balanced(pair.here)


def test_a_peer_that_is_connected_to_while_a_rail_is_down_is_reached_by_the_other(pairs):
    pair = pairs(*rails())
    pair.here.provider.take_down(0)
    assert finish(write(pair, 300)) == {}
    until(lambda: states(pair, 0) == {QueueState.CLOSED}, "the queue whose probe failed, closed")
    pair.here.provider.bring_up(0)
    until(lambda: states(pair, 0) == {QueueState.READY}, "the queue, ready")
    pair.close()
    assert_balanced(pair.here)


def test_an_engine_can_be_closed_while_all_its_rails_are_down(pairs):
    pair, batch = stranded(pairs)
    pair.close()
    assert batch.quiesced
    assert_balanced(pair.here)


def test_a_batch_that_is_cancelled_while_all_rails_are_down_ends(pairs):
    _, batch = stranded(pairs)
    batch.cancel()
    assert finish(batch) == dict.fromkeys(range(300), Status.CANCELLED)


# ------------------------------------------------------------------------------ errors
PASSING = (WcStatus.WR_FLUSH_ERR, WcStatus.RETRY_EXC_ERR, WcStatus.RNR_RETRY_EXC_ERR, WcStatus.LOC_QP_OP_ERR)


@pytest.mark.parametrize(
    "status", [s for s in WcStatus if s not in (WcStatus.SUCCESS, WcStatus.REM_ACCESS_ERR)], ids=lambda s: s.name
)
def test_one_error_breaks_the_queue_and_fails_no_slice_but_its_own(pairs, status):
    faulty = Nic(**RAIL, faults=[Fault(20, Action.FAIL, status)])
    pair = pairs(*rails(faulty, n=1), chain=64)
    failed = finish(pair.scattered(200))  # scattered: one slice a work request
    assert len(failed) <= 1
    assert (failed == {}) == (status in PASSING)
    until(lambda: states(pair, 0) == {QueueState.READY}, "the queue, ready again")
    assert finish(pair.scattered(200)) == {}
    pair.close()
    assert_balanced(pair.here)


def test_notifications_survive_a_rail_that_goes_down(pairs):
    pair = pairs(*rails())
    provider, told = pair.here.provider, []
    for k in range(20):
        if k == 5:
            provider.take_down(1)
        if k == 15:
            provider.bring_up(1)
        assert finish(write(pair, 50, notify=b"%d" % k)) == {}
    told = [int(note.message) for note in pair.there.notifications()]
    assert told == list(range(20))


@pytest.mark.fuzz
@given(
    seed=st.integers(0, 1 << 30),
    policy=st.sampled_from(POLICIES),
    store=st.sampled_from(["pool", "heap"]),
    count=st.integers(1, 3),
    signal=st.sampled_from([1, 2, 16, 100]),
    gathers=st.sampled_from([1, 3, SLICES_GATHERED]),
    breaks=st.booleans(),
    workers=st.integers(1, 2),
    depth=st.sampled_from([2, 16, 256]),
    retries=st.sampled_from([0, 1, 3]),
    batches=st.lists(st.tuples(st.integers(1, 300), st.sampled_from(["wait", "close", "cancel", "down"])), max_size=5),
)
@settings(max_examples=settings().max_examples if settings().max_examples > 100 else 30)
def test_whatever_the_faults_bytes_are_right_or_their_request_failed(
    seed, policy, store, count, signal, gathers, breaks, workers, depth, retries, batches
):
    draw = np.random.Generator(np.random.Philox(key=[seed, 8]))
    nics = []
    for rail in range(count):
        delay, fail, flush = draw.random(3) * 0.03
        faults = random_faults(seed + rail, 2000, delay=delay, fail=fail, flush=flush, delay_ns=5000)
        nics.append(Nic(latency_ns=1000, signal=signal, gathers=gathers, breaks=breaks, faults=faults))
    pair = Pair(
        *rails(*nics, n=count), arena=64 << 10, policy=policy, store=store, queue_depth=depth, chain=16,
        retries=retries, workers=workers, slices=8192,
    )  # fmt: skip
    try:
        for n, what in batches:
            pair.target[:] = 0
            batch = write(pair, n)
            if what == "close":
                batch.close()
                until(lambda batch=batch: batch.quiesced, "the end of a detached batch")
                continue
            if what == "cancel":
                batch.cancel()
            rail = n % count
            if what == "down" and breaks:
                pair.here.provider.take_down(rail)
                pair.here.provider.bring_up(rail)
            failed = finish(batch)
            assert_arrived(pair, n, failed)
            if what != "cancel":
                assert Status.CANCELLED not in failed.values()
            batch.close()
    finally:
        pair.close()
    assert_balanced(pair.here)


# ------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize("nic", [{"signal": 0}, {"gathers": 0}, {"gathers": SLICES_GATHERED + 1}], ids=lambda n: str(n))
def test_a_nic_that_cannot_be_is_refused(nic):
    with pytest.raises(UsageError, match=f"signal >= 1 and gathers 1 to {SLICES_GATHERED}"):
        Nic(**nic)


@pytest.mark.parametrize("nic", [{"signal": 2}, {"breaks": True}])
def test_reordering_is_refused_where_completions_speak_for_others(nic):
    with pytest.raises(UsageError, match="reorder with signal=1 only"):
        Nic(faults=[Fault(3, Action.REORDER, 1)], **nic)


def test_more_nics_than_an_engine_may_have_are_refused():
    with pytest.raises(UsageError, match=f"at most {NICS} NICs, got {NICS + 1}"):
        Emulated(*[Nic()] * (NICS + 1))


def test_only_a_rail_that_breaks_can_be_taken_down(pairs):
    pair = pairs(Emulated(Nic(), Nic(breaks=True)), Emulated())
    for change in (pair.here.provider.take_down, pair.here.provider.bring_up):
        with pytest.raises(UsageError, match="only a rail whose NIC breaks"):
            change(0)
    pair.close()
    with pytest.raises(UsageError, match="of an open engine"):
        pair.here.provider.take_down(1)
