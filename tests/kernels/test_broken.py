"""Slices, batches and notifications on a queue pair that breaks: what becomes of them, whatever happens meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.errors import Status
from mooncache.kernels import calls, submit
from mooncache.kernels.enums import Opcode, Policy, QueueState, Slice
from mooncache.kernels.verbs import WcStatus
from tests.helpers import assert_at_rest, assert_free_list_whole
from tests.kernels.broken import (
    BIG,
    BREAK,
    BREAKS,
    BROKEN,
    CLOSED,
    DRAINED,
    LOSE,
    LOST,
    PROBE,
    PROBING,
    READY,
    RETURN,
    fail_all,
    reach,
    rig_of,
)
from tests.kernels.slate import OK, SlateRig


# ------------------------------------------------------------------------------ what was on it
def test_what_came_back_is_not_posted_again_before_it_is_returned():
    """The other queue is ready and would take it."""
    rig = rig_of(BREAKS, BREAKS)
    handle = rig.submit(40)
    rig.turn()
    rig.serve(1)
    before = rig.totals
    for most in (1, 2, 100):
        rig.serve(0, fail=fail_all, most=most)
        rig.turn()
        assert rig.totals == before
    assert rig.rows[0].state == DRAINED
    assert rig.word("head") > rig.word("tail")  # held
    rig.order(0, RETURN)
    rig.turn()
    assert rig.totals[1] > before[1]
    assert rig.totals[0] == before[0]
    rig.finish(handle)
    assert rig.failures(handle, 40) == {}


def test_what_arrived_before_the_error_is_done_and_not_posted_again():
    rig = rig_of()
    handle = rig.submit(20)
    rig.turn()
    rig.serve(fail=lambda p: LOST if p.sequence == 7 else OK)  # the probe was number 0
    rig.turn()
    assert rig.states(handle, 20) == [Slice.DONE] * 6 + [Slice.POSTED] * 14
    rig.finish(handle)
    assert rig.counts["completed"] == 20
    assert rig.counts["retried"] == 14


def test_a_slice_at_fault_fails_at_once_and_those_behind_it_are_posted_again():
    rig = rig_of()
    handle = rig.submit(20)
    rig.turn()
    rig.finish(handle, fail=lambda p: int(WcStatus.REM_OP_ERR) if p.sequence == 7 else OK)
    assert rig.failures(handle, 20) == {6: Status.REMOTE_ERROR}
    assert rig.counts["retried"] == 13
    assert_at_rest(rig.state, BIG)


@pytest.mark.parametrize("first", [0, 1])
def test_a_batch_whose_slices_are_at_fault_uses_up_no_other_batchs_attempts(first):
    """The one breaks the queue at each of its slices; all of the other's are behind some of them, and arrive."""
    rig = rig_of({"breaks": True, "depth": 8}, chain=2, retries=1)
    handles = [rig.submit(12), rig.submit(12)]
    guilty = handles[first]
    slots = set(range(*[int(rig.batch(guilty)["first"]) * 256 + n for n in (0, 12)]))

    def status(posted) -> int:
        entry = int(rig.rows[0]._entries[posted.sequence & rig.word("mask")])
        return int(WcStatus.REM_OP_ERR) if posted.ranges and entry & 0xFFFFFFFF in slots else OK

    rig.finish(*handles, fail=status)
    assert rig.failures(guilty, 12) == dict.fromkeys(range(12), Status.REMOTE_ERROR)
    assert rig.failures(handles[1 - first], 12) == {}
    rig.finish(rig.submit(1))  # once the queue is ready again
    assert_at_rest(rig.state, BIG)


def test_a_notification_that_finds_the_inbox_full_fails_at_once_though_it_breaks_its_queue():
    rig = rig_of({}, {**BREAKS, "notes": True})
    handle = noted(rig)
    rig.finish(handle, fail=lambda p: int(WcStatus.RNR_RETRY_EXC_ERR) if p.opcode == Opcode.SEND else OK)
    assert rig.failures(handle, 4) == {3: Status.INBOX_FULL}
    assert sent(rig) == 1


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_slice_whose_queue_breaks_more_often_than_is_retried_fails_as_flushed(retries):
    rig = rig_of(retries=retries)
    handle = rig.submit(5)
    rig.finish(handle, fail=lambda p: LOST if p.ranges else OK)
    assert rig.failures(handle, 5) == dict.fromkeys(range(5), Status.FLUSHED)
    assert rig.counts["retried"] >= 5 * retries  # what was only behind it pays nothing
    assert_at_rest(rig.state, BIG)


def test_a_refused_key_fails_all_slices_of_its_region_at_once_and_is_tried_again_when_the_peer_has_spoken():
    rig = rig_of({"breaks": True, "depth": 8}, chain=4)
    handle = rig.submit(40)
    rig.turn()
    rig.finish(handle, fail=lambda p: int(WcStatus.REM_ACCESS_ERR) if p.ranges else OK)
    assert rig.failures(handle, 40) == dict.fromkeys(range(40), Status.REMOTE_ACCESS)
    assert rig.counts["retried"] == 0
    again = rig.submit(3)
    rig.finish(again)
    assert rig.failures(again, 3) == dict.fromkeys(range(3), Status.REMOTE_ACCESS)
    rig.remote.forgive()
    after = rig.submit(3)
    rig.finish(after)
    assert rig.failures(after, 3) == {}
    assert_at_rest(rig.state, BIG)


def test_a_refusal_that_arrives_late_says_nothing_about_the_key_that_the_region_was_given_meanwhile():
    """Refused is the key that a work request carried: one posted since then, under the new key, gets through."""
    rig = rig_of({"breaks": True}, retries=0)
    slot = rig.remote.ranges()[0][2]
    former = rig.submit(3)
    rig.turn()
    keys = rig.remote.keys[:1, slot].tolist()
    rig.remote.refuse(slot)
    rig.remote.grant(slot, keys, 3, renewed=True)
    rig.serve(0, fail=lambda p: int(WcStatus.REM_ACCESS_ERR) if p.ranges else OK)
    after = rig.submit(3)
    rig.finish(former, after)
    assert rig.failures(after, 3) == {}
    assert rig.failures(former, 3)[0] == Status.REMOTE_ACCESS  # nobody is here to ask the peer
    rig.finish(last := rig.submit(3), fail=lambda p: int(WcStatus.REM_ACCESS_ERR) if p.ranges else OK)
    rig.finish(refused := rig.submit(3))
    for handle in (last, refused):
        assert rig.failures(handle, 3) == dict.fromkeys(range(3), Status.REMOTE_ACCESS)
    assert_at_rest(rig.state, BIG)


def test_all_that_a_deep_queue_held_is_returned_though_nothing_else_takes_it():
    """More slices than the work requests of all queues; the queue is ready again only after all were taken from it."""
    rig = rig_of({**BREAKS, "gathers": 16}, queue_depth=16, peers=1, bare=True)
    keys = rig.provider.register(0, 0, 0)
    rig.state.regions.add(1 << 40, 1 << 20, keys.lkeys, 7)
    rig.remote.add(1 << 41, 1 << 20, keys.rkeys, 3)
    at = np.arange(240, dtype=np.int64)
    handle = rig.requests((1 << 40) + 16 * at, (1 << 41) + 8 * at, np.full(240, 8, np.int64))
    rig.publish(handle)
    rig.turn()
    reach(rig, CLOSED)
    rig.finish(handle)
    assert rig.failures(handle, 240) == {}
    assert rig.counts["retried"] == 240


@pytest.mark.parametrize("state", list(QueueState), ids=lambda s: s.name)
@pytest.mark.parametrize("policy", list(Policy), ids=lambda p: p.name.lower())
def test_when_the_peer_is_lost_everything_fails_and_all_slots_come_back(policy, state):
    """What is on the queue, what waits to be posted again, and what was never posted."""
    rig = rig_of(policy=policy)
    capacity = rig.state.free_slices
    handles = [rig.submit(100), rig.submit(30)]
    rig.turn()
    reach(rig, state)
    rig.order(0, LOSE)
    rig.turn()
    rig.broken[0] = True
    rig.serve()
    rig.turn()
    assert rig.rows[0].state == CLOSED
    for handle, n in zip(handles, (100, 30), strict=True):
        assert rig.failures(handle, n) == dict.fromkeys(range(n), Status.PEER_GONE)
        calls.close(rig.ctl, handle, False)
    late = rig.submit(5)
    rig.turn()
    assert rig.failures(late, 5) == dict.fromkeys(range(5), Status.PEER_GONE)
    calls.close(rig.ctl, late, False)
    rig.turn()
    assert_at_rest(rig.state, BIG)
    if policy in (Policy.INLINE, Policy.ON_CLOSE, Policy.BULK, Policy.EPOCH):
        assert rig.state.free_slices == capacity
        assert_free_list_whole(rig.state)


def test_when_the_peer_is_lost_what_is_on_other_queues_still_gets_its_answers():
    rig = rig_of(BREAKS, BREAKS)
    handle = rig.submit(32)
    rig.turn()
    assert rig.totals == [17, 17]
    rig.order(0, LOSE)
    rig.broken[0] = True
    rig.turn()
    rig.serve()
    rig.turn()
    assert calls.status(rig.ctl, handle) == Status.OK
    assert len(rig.failures(handle, 32)) == 16
    assert rig.rows[1].state == READY


def test_a_peer_that_is_probed_again_is_not_lost_any_more():
    rig = rig_of()
    rig.order(0, LOSE)
    rig.turn()
    rig.order(0, PROBE)
    rig.turn()
    rig.serve()
    rig.turn()
    handle = rig.submit(5)
    rig.finish(handle)
    assert rig.failures(handle, 5) == {}


# ------------------------------------------------------------------------------ batches that end meanwhile
@pytest.mark.parametrize("state", [BROKEN, DRAINED, CLOSED, PROBING], ids=lambda s: s.name)
def test_a_batch_that_is_cancelled_while_its_slices_are_held_fails_as_cancelled(state):
    rig = rig_of()
    handle = rig.submit(100)
    rig.turn()
    reach(rig, state)
    calls.cancel(rig.ctl, handle)
    rig.finish(handle)
    failed = rig.failures(handle, 100)
    assert set(failed.values()) == {Status.CANCELLED}
    assert rig.counts["completed"] == 100 - len(failed) == 0
    rig.serve()
    rig.turn()
    assert_at_rest(rig.state, BIG)


@pytest.mark.parametrize("state", [BROKEN, DRAINED, CLOSED, PROBING], ids=lambda s: s.name)
def test_a_batch_that_is_closed_while_its_slices_are_held_is_freed_when_they_have_come_back(state):
    rig = rig_of()
    capacity = rig.state.free_slices
    handle = rig.submit(100)
    rig.turn()
    reach(rig, state)
    assert calls.close(rig.ctl, handle, False) == Status.NOT_FINISHED
    rig.turn()
    # Held slices are still the queue's: their bytes may yet move.
    assert calls.quiesced(rig.ctl, handle) == (state in (CLOSED, PROBING))
    for _ in range(4):
        rig.mend()
        rig.serve()
        rig.turn()
    assert calls.quiesced(rig.ctl, handle)
    assert rig.state.free_slices == capacity
    assert_at_rest(rig.state, BIG)


def test_slices_that_no_queue_takes_until_the_deadline_fail_as_timed_out():
    rig = rig_of()
    offsets = rig.arena.ctypes.data + np.arange(20, dtype=np.int64) * 16
    handle = int(submit.submit(rig.ctl, 0, Opcode.WRITE, 1000, offsets, offsets, np.full(20, 8, np.int64)))
    rig.turn()
    reach(rig, CLOSED)
    assert calls.status(rig.ctl, handle) == Status.NOT_FINISHED
    rig.worker.row["now"] = 1000
    rig.turn()
    assert rig.failures(handle, 20) == dict.fromkeys(range(20), Status.TIMED_OUT)
    assert_at_rest(rig.state, BIG)


# ------------------------------------------------------------------------------ notifications
def noted(rig: SlateRig, slices: int = 3, deadline: int = 0) -> int:
    offsets = rig.arena.ctypes.data + np.arange(slices, dtype=np.int64) * 16
    note = np.ones(8, np.uint8)
    operands = (offsets, offsets, np.full(slices, 8, np.int64), note)
    handle = int(submit.submit_noted(rig.ctl, 0, Opcode.WRITE, deadline, *operands))
    assert handle >= 0
    return handle


def sent(rig: SlateRig) -> int:
    """Notifications that were posted."""
    return sum(p.opcode == Opcode.SEND for rail in range(len(rig.rows)) for p in rig.posted(rail))


@pytest.mark.parametrize("state", [DRAINED, CLOSED, PROBING], ids=lambda s: s.name)
def test_a_notification_waits_until_its_queue_is_ready(state):
    rig = rig_of({}, {**BREAKS, "notes": True})
    reach(rig, state, 1)
    handle = noted(rig)
    rig.turn()
    rig.serve(0)
    rig.turn()
    assert sent(rig) == 0
    rig.finish(handle)
    assert rig.failures(handle, 4) == {}
    assert sent(rig) == 1


def test_a_notification_that_came_back_waits_until_its_queue_is_ready():
    rig = rig_of({}, {**BREAKS, "notes": True})
    handle = noted(rig)
    rig.turn()
    rig.serve(0)
    rig.turn()
    assert sent(rig) == 1
    reach(rig, CLOSED, 1)
    assert sent(rig) == 1
    rig.finish(handle)
    assert sent(rig) == 2
    assert rig.failures(handle, 4) == {}


@pytest.mark.parametrize("state", list(QueueState), ids=lambda s: s.name)
def test_a_notification_to_a_lost_peer_fails_wherever_it_is(state):
    rig = rig_of({}, {**BREAKS, "notes": True})
    handle = noted(rig)
    rig.turn()
    if state == BROKEN:
        rig.serve(0)
        rig.turn()
        second = noted(rig)  # waits for its turn behind the first
        rig.turn()
        rig.order(1, BREAK)
    else:
        second = noted(rig)
        reach(rig, state, 1)
        rig.serve(0)
    rig.turn()
    rig.serve(0)
    rig.turn()
    rig.order(1, LOSE)
    rig.broken[1] = True
    for _ in range(3):
        rig.turn()
        rig.serve()
    rig.turn()
    for batch in (handle, second):
        assert rig.failures(batch, 4) == {3: Status.PEER_GONE}
    assert_at_rest(rig.state, BIG)


def test_a_notification_that_no_queue_takes_until_the_deadline_fails_as_timed_out():
    rig = rig_of({}, {**BREAKS, "notes": True})
    reach(rig, CLOSED, 1)
    handle = noted(rig, deadline=1000)
    rig.turn()
    rig.serve(0)
    rig.turn()
    assert calls.status(rig.ctl, handle) == Status.NOT_FINISHED
    rig.worker.row["now"] = 1000
    rig.turn()
    assert rig.failures(handle, 4) == {3: Status.TIMED_OUT}
    assert_at_rest(rig.state, BIG)


# ------------------------------------------------------------------------------ anything goes
@given(
    rails=st.lists(
        st.fixed_dictionaries(
            {"breaks": st.booleans(), "signal": st.integers(1, 8), "gathers": st.integers(1, 4)}
        ),
        min_size=1, max_size=3,
    ),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(1, 60)),
            st.tuples(st.just("serve"), st.integers(0, 2), st.integers(1, 30), st.sampled_from([OK, OK, LOST, 10])),
            st.tuples(st.just("order"), st.integers(0, 2), st.sampled_from([BREAK, RETURN, LOSE, PROBE])),
            st.tuples(st.just("cancel"), st.integers(0, 5)),
            st.tuples(st.just("mend")),
        ),
        max_size=30,
    ),
)  # fmt: skip
def test_whatever_happens_in_whatever_order_every_batch_ends_and_everything_comes_back(rails, steps):
    rig = rig_of(*rails, chain=8, queue_depth=32, batches=32)
    capacity = rig.state.free_slices
    handles: list[tuple[int, int]] = []
    for what, *how in steps:
        if what == "submit":
            if (handle := rig.submit(*how)) >= 0:
                handles.append((handle, how[0]))
        elif what == "serve":
            rail, most, status = how
            rig.serve(rail % len(rails), most=most, fail=lambda p, status=status: status)
        elif what == "order" and rails[how[0] % len(rails)]["breaks"]:
            rail, order = how[0] % len(rails), how[1]
            if order in (BREAK, LOSE):
                rig.broken[rail] = True
            elif order == PROBE and rig.rows[rail].state == CLOSED:
                rig.broken[rail] = False
            rig.order(rail, order)
        elif what == "cancel" and how[0] < len(handles):
            calls.cancel(rig.ctl, handles[how[0]][0])
        elif what == "mend":
            rig.mend()
        rig.turn()
    rig.finish(*(handle for handle, _ in handles))
    completed = 0
    for handle, n in handles:
        failed = rig.failures(handle, n)
        completed += n - len(failed)
        assert set(failed.values()) <= {
            Status.FLUSHED, Status.RETRIES_EXCEEDED, Status.REMOTE_ACCESS, Status.PEER_GONE, Status.CANCELLED,
        }  # fmt: skip
        calls.close(rig.ctl, handle, False)
    assert rig.counts["completed"] == completed
    assert rig.counts["stale"] == 0
    rig.turn()
    rig.mend()
    for _ in range(4):
        rig.serve()
        rig.turn()
        rig.mend()
    assert_at_rest(rig.state, BIG)
    assert rig.state.free_slices == capacity
