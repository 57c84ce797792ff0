"""A queue pair's work requests: which completion answers which, what names none of them, and how many there may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.errors import Status
from mooncache.kernels import calls
from mooncache.kernels.enums import Order, QueueState, Slice
from mooncache.kernels.verbs import EINVAL, ENOMEM, WcStatus
from tests.helpers import assert_at_rest
from tests.kernels.slate import FLUSHED, OK, SlateRig
from tests.oracles import answered_by

DONE, POSTED = int(Slice.DONE), int(Slice.POSTED)
BIG = 1 << 20  # completions that a slate's completion queue holds


def at_sequence(rig: SlateRig, start: int) -> SlateRig:
    """Let a queue with nothing in flight go on from this sequence number."""
    rig.rows[0].row.set(head=start, tail=start)
    return rig


# ------------------------------------------------------------------------------ who is asked
@pytest.mark.parametrize("chain", [1, 3, 16, 50])
@pytest.mark.parametrize("signal", [1, 2, 16, 4096])
def test_every_kth_work_request_and_each_chains_last_ask_for_a_completion(signal, chain):
    rig = SlateRig({"signal": signal}, chain=chain, queue_depth=100)
    rig.submit(50)
    rig.turn()
    expected, loose = [], 0
    for i in range(50):
        loose += 1
        expected.append(loose == signal or (i + 1) % chain == 0 or i == 49)
        loose = 0 if expected[-1] else loose
    assert [p.signaled for p in rig.posted()] == expected


def test_the_engines_setting_comes_before_the_wires_preference():
    rig = SlateRig({"signal": 2}, signal=5, chain=50, queue_depth=100)
    rig.submit(10)
    rig.turn()
    assert [i for i, p in enumerate(rig.posted()) if p.signaled] == [4, 9]


# ------------------------------------------------------------------------------ what a completion answers
@pytest.fixture
def ten():
    """Ten slices on the wire in groups of four, four and two, and their batch."""
    rig = SlateRig({"signal": 4}, chain=50, queue_depth=100)
    handle = rig.submit(10)
    rig.turn()
    return rig, handle


def test_a_completion_answers_those_before_it_that_asked_for_none(ten):
    rig, handle = ten
    rig.answer(rig.posted()[3].wr_id)
    rig.turn()
    assert rig.states(handle, 10) == [DONE] * 4 + [POSTED] * 6


def test_a_completion_out_of_order_answers_its_own_group_only(ten):
    rig, handle = ten
    rig.answer(rig.posted()[7].wr_id)
    rig.turn()
    assert rig.states(handle, 10) == [POSTED] * 4 + [DONE] * 4 + [POSTED] * 2
    assert rig.word("tail") == 0
    rig.answer(rig.posted()[3].wr_id)
    rig.turn()
    assert rig.word("tail") == 8


def test_a_failure_without_a_request_for_a_completion_answers_those_before_it_as_arrived(ten):
    rig, handle = ten
    rig.answer(rig.posted()[6].wr_id, int(WcStatus.REM_OP_ERR))
    rig.turn()
    assert rig.states(handle, 10) == [POSTED] * 4 + [DONE] * 2 + [int(Status.REMOTE_ERROR)] + [POSTED] * 3
    rig.answer(rig.posted()[7].wr_id)
    rig.turn()
    assert rig.states(handle, 10)[7] == DONE
    assert rig.states(handle, 10)[:4] == [POSTED] * 4


@given(
    signal=st.integers(1, 9), chain=st.integers(1, 20), slices=st.integers(1, 40),
    start=st.sampled_from([0, (1 << 32) - 1, (1 << 32) - 20, (1 << 33) - 3, (1 << 40) + 5]), data=st.data(),
)  # fmt: skip
def test_completions_in_any_order_answer_what_the_oracle_says(signal, chain, slices, start, data):
    """Also where sequence numbers wrap around."""
    rig = at_sequence(SlateRig({"signal": signal}, chain=chain, queue_depth=64, retries=0), start)
    handle = rig.submit(slices)
    rig.turn()
    posted = rig.posted()
    assert [p.sequence for p in posted] == [(start + i) & 0xFFFFFFFF for i in range(slices)]
    reported = data.draw(st.permutations([i for i, p in enumerate(posted) if p.signaled]))
    failed = data.draw(st.sets(st.sampled_from(range(slices)), max_size=5))
    expected = [POSTED] * slices
    # A failure is reported while those behind it in its group are still under way: before its group's completion.
    for last in [*sorted(failed - set(reported)), *reported]:
        bad = last in failed
        rig.answer(posted[last].wr_id, int(WcStatus.REM_ACCESS_ERR) if bad else OK)
        rig.turn()
        answered = answered_by(last, [p.signaled for p in posted], [state != POSTED for state in expected])
        for i in answered:
            expected[i] = DONE
        if bad:
            expected[last] = int(Status.REMOTE_ACCESS)
        if calls.status(rig.ctl, handle) == Status.NOT_FINISHED:
            assert rig.states(handle, slices) == expected
        assert rig.state.worker_rows[0]["outstanding"] == expected.count(POSTED)
    assert calls.status(rig.ctl, handle) == Status.OK
    assert rig.failures(handle, slices) == dict.fromkeys(sorted(failed), Status.REMOTE_ACCESS)
    assert_at_rest(rig.state, BIG)


# ------------------------------------------------------------------------------ what names nothing in flight
INDEX, INCARNATION = 1 << 48, 1 << 32


def assert_stale(rig, *wr_ids):
    """These answer nothing, succeeded or failed, and say so."""
    stale, states = rig.counts["stale"], rig.array("slice_state").copy()
    rows = [row.row.array.copy() for row in rig.rows]
    rig.state.worker_rows[0]["outstanding"] += 1  # so that the worker polls
    for wr_id in wr_ids:
        rig.answer(wr_id)
        rig.answer(wr_id, FLUSHED)
        rig.turn()
    rig.state.worker_rows[0]["outstanding"] -= 1
    assert rig.counts["stale"] == stale + 2 * len(wr_ids)
    np.testing.assert_array_equal(states, rig.array("slice_state"))
    for before, row in zip(rows, rig.rows, strict=True):
        np.testing.assert_array_equal(before, row.row.array)


@pytest.mark.parametrize("by", [INDEX, -INDEX, 500 * INDEX, INCARNATION, -INCARNATION, 1 << 62, -(1 << 63)])
def test_a_completion_for_another_queue_or_incarnation_is_stale(ten, by):
    rig, _ = ten
    assert_stale(rig, rig.posted()[3].wr_id + by)


@pytest.mark.parametrize("sequence", [10, 11, 1000, 1 << 31, (1 << 32) - 1])
def test_a_completion_whose_sequence_number_is_not_in_flight_is_stale(ten, sequence):
    rig, _ = ten
    assert_stale(rig, rig.posted()[0].wr_id | sequence)


def test_a_second_completion_of_a_group_is_stale_whether_the_tail_has_passed_it_or_not(ten):
    rig, _ = ten
    posted = rig.posted()
    rig.answer(posted[7].wr_id)
    rig.turn()
    assert_stale(rig, *(p.wr_id for p in posted[4:8]))  # behind the tail's gap
    rig.answer(posted[3].wr_id)
    rig.turn()
    assert_stale(rig, *(p.wr_id for p in posted[:8]))


def test_what_was_in_flight_before_a_queue_was_connected_anew_is_stale():
    rig = SlateRig({"signal": 4, "breaks": True}, chain=50, queue_depth=100)
    handle = rig.submit(10)
    rig.turn()
    before = rig.posted(since=1)
    rig.serve(fail=lambda p: int(WcStatus.RETRY_EXC_ERR))
    rig.finish(handle)
    again = rig.submit(10)
    rig.turn()
    assert rig.posted()[-1].wr_id - before[0].wr_id >= INCARNATION
    assert_stale(rig, *(p.wr_id for p in before))
    rig.finish(again)
    assert rig.failures(again, 10) == {}


def test_incarnations_start_again_after_the_last_and_leave_the_queues_index_alone():
    rig = SlateRig({}, {"breaks": True})
    last = 1 * INDEX | 0xFFFF * INCARNATION
    rig.rows[1].row.set(tag=last, state=QueueState.CLOSED)
    rig.order(1, Order.PROBE)
    rig.turn()
    assert rig.word("tag", 1) == INDEX


# ------------------------------------------------------------------------------ credits
@given(
    depths=st.lists(st.integers(2, 40), min_size=1, max_size=3), entries=st.integers(20, 60),
    signal=st.integers(1, 16), gathers=st.integers(1, 4), chain=st.integers(1, 20), data=st.data(),
)  # fmt: skip
def test_neither_a_queue_nor_a_shared_completion_queue_is_ever_overrun(depths, entries, signal, gathers, chain, data):
    rails = [{"depth": d, "cq": 0, "signal": signal, "gathers": gathers} for d in depths]
    rig = SlateRig(*rails, cq_entries=entries, queue_depth=40, chain=chain)
    handle = rig.submit(300)
    for _ in range(2000):
        rig.turn()
        on_the_wire = [total - served for total, served in zip(rig.totals, rig.served, strict=True)]
        assert all(n <= depth for n, depth in zip(on_the_wire, depths, strict=True))
        # Whatever of it asks for none may still fail, and then each makes a completion.
        assert rig.waiting() + sum(on_the_wire) <= entries
        assert sum(on_the_wire) <= int(rig.state.worker_rows[0]["outstanding"])
        if calls.status(rig.ctl, handle) == Status.OK:
            break
        rig.serve(data.draw(st.integers(0, len(depths) - 1)), most=data.draw(st.integers(1, 40)))
    assert calls.status(rig.ctl, handle) == Status.OK
    assert rig.counts["completed"] == 300
    assert_at_rest(rig.state, entries)


# ------------------------------------------------------------------------------ short posts
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("rails", [1, 2])
def test_a_full_queue_at_any_place_in_a_chain_leaves_no_slice_unanswered(rails, at, times):
    """The second and third refusal strike the marker too. Nobody posts there any more: the other queue does better."""
    rig = SlateRig(*[{"signal": 16}] * rails, chain=8, queue_depth=100)
    rig.provider.refuse(0, at, ENOMEM, times)
    handle = rig.submit(8)
    rig.finish(handle)
    assert rig.failures(handle, 8) == {}
    assert rig.counts["completed"] == 8
    assert_at_rest(rig.state, BIG)


def test_a_queue_that_is_full_with_nothing_in_it_never_takes_the_work_request():
    rig = SlateRig({"signal": 16}, chain=8, queue_depth=100)
    rig.provider.refuse(0, 0, ENOMEM)
    handle = rig.submit(8)
    rig.finish(handle)
    assert rig.failures(handle, 8) == {0: Status.LOCAL_ERROR}


def test_a_cancelled_batch_that_was_posted_in_part_gets_its_last_answers():
    rig = SlateRig({"signal": 16}, chain=8, queue_depth=100)
    rig.provider.refuse(0, 5, ENOMEM, times=1000)
    handle = rig.submit(8)
    rig.turn()
    calls.cancel(rig.ctl, handle)
    rig.turn()
    rig.serve()
    rig.turn()
    assert rig.counts["completed"] == 0
    rig.provider.refuse(0, 5, ENOMEM, times=0)
    rig.finish(handle)
    assert rig.failures(handle, 8) == dict.fromkeys((5, 6, 7), Status.CANCELLED)
    assert_at_rest(rig.state, BIG)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("at", range(8))
def test_a_work_request_that_is_refused_for_good_fails_alone(at, breaks):
    rig = SlateRig({"signal": 16, "breaks": breaks}, chain=8, queue_depth=100)
    rig.provider.refuse(0, at + breaks, EINVAL)  # the probe was number 0
    handle = rig.submit(8)
    rig.finish(handle)
    assert rig.failures(handle, 8) == {at: Status.LOCAL_ERROR}
    assert rig.counts["completed"] == 7
    assert_at_rest(rig.state, BIG)


@pytest.mark.parametrize("at", range(1, 8))
def test_a_marker_that_is_refused_for_good_breaks_its_queue_and_what_it_was_for_comes_back(at):
    rig = SlateRig({"signal": 16, "breaks": True}, chain=8, queue_depth=100)
    rig.provider.refuse(0, 1 + at, EINVAL, times=9 - at)  # the rest of the batch and then the marker
    handle = rig.submit(8)
    rig.turn()
    assert rig.rows[0].state == QueueState.BROKEN
    rig.mend()
    rig.serve()
    rig.finish(handle)
    assert rig.failures(handle, 8) == dict.fromkeys(range(at, 8), Status.LOCAL_ERROR)
    assert rig.counts["retried"] == at
    assert_at_rest(rig.state, BIG)


def test_a_marker_moves_nothing_and_asks_for_its_completion():
    rig = SlateRig({"signal": 16}, chain=8, queue_depth=100)
    rig.provider.refuse(0, 5, ENOMEM, times=2)  # the chain, and the one with the rest
    rig.submit(8)
    rig.turn()
    marker = rig.posted()[5]
    assert marker.signaled
    assert (marker.ranges, marker.remote, marker.rkey) == ([], 0, 0)
