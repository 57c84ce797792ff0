"""Completions, honest and forged: what a NIC says is believed only where it can be true."""

import numpy as np
import pytest

from mooncache.errors import Status
from mooncache.kernels import calls, enums
from mooncache.kernels.enums import Slice
from mooncache.kernels.verbs import WcStatus
from tests.helpers import Rig

OK, FLUSHED = int(WcStatus.SUCCESS), int(WcStatus.WR_FLUSH_ERR)


@pytest.fixture
def rig():
    return Rig(queue_depth=64)


def failures(rig, handle, requests):
    request, why = np.zeros(requests, np.int64), np.zeros(requests, np.int64)
    n = calls.failures(rig.ctl, handle, request, why, np.zeros((request.size, 3), np.int64))
    return {int(r): Status(int(w)) for r, w in zip(request[:n], why[:n], strict=True)}


def everything_but_counts(rig):
    return [a.copy() for a in (*rig.state.arrays, *rig.state.rings)]


def assert_counted_not_applied(rig, wr_id, status=OK):
    before, counts = everything_but_counts(rig), rig.counts
    rig.provider.inject(wr_id, status)
    rig.provider.let(1)
    # With nothing outstanding a worker does not poll; say that there is something, as a late answer would have it.
    rig.state.worker_rows[0]["outstanding"] += 1
    rig.turn()
    rig.state.worker_rows[0]["outstanding"] -= 1
    for a, b in zip(before, everything_but_counts(rig), strict=True):
        np.testing.assert_array_equal(a, b)
    after = rig.counts
    assert after["stale"] == counts["stale"] + 1
    assert after["completions"] == counts["completions"] + 1
    for kind in ("completed", "failed", "retried", "batches_finished"):
        assert after[kind] == counts[kind]


@pytest.mark.parametrize("status", [OK, FLUSHED, int(WcStatus.REM_ACCESS_ERR)])
def test_late_completion_of_a_freed_slice_is_counted_not_applied(rig, status):
    handle = rig.submit(5)
    rig.turn()
    late = int(rig.provider.entries()[2, 0])
    rig.provider.let(5)
    rig.turn()
    calls.close(rig.ctl, handle, True)
    assert_counted_not_applied(rig, late, status)


def test_late_completion_after_the_slot_was_given_to_another_batch_is_counted_not_applied(rig):
    handle = rig.submit(5)
    rig.turn()
    late = int(rig.provider.entries()[2, 0])
    rig.provider.let(5)
    rig.turn()
    calls.close(rig.ctl, handle, True)
    again = rig.submit(5)
    rig.turn()
    waiting = rig.provider.entries()
    waiting[0, 0], honest = late, int(waiting[0, 0])
    rig.provider.let(5)
    rig.turn()
    assert rig.counts["stale"] == 1
    assert calls.status(rig.ctl, again) == Status.NOT_FINISHED
    rig.provider.inject(honest, OK)
    rig.provider.let(1)
    rig.turn()
    assert calls.status(rig.ctl, again) == Status.OK


@pytest.mark.parametrize(
    "wr_id",
    [0, -1, 1 << 62, -(1 << 63), 2047, 2048, 1 << 31, (1 << 32) - 1, 5 << 32, (5 << 32) | 2048, (1 << 63) - 1],
)
def test_a_forged_work_request_id_is_counted_not_applied(rig, wr_id):
    rig.submit(5)
    rig.turn()
    hidden = rig.provider.entries().copy()
    # Let the forged one stand alone in the queue, then bring the honest ones back.
    queue = rig.provider.queues[0][0]
    rig.provider.entries()[:] = 0
    queue.row["tail"] = queue.row["head"]
    forged = wr_id if wr_id != int(hidden[0, 0]) else wr_id + (1 << 40)
    if forged in hidden[:, 0]:
        pytest.skip("that one is honest")
    rig.provider.inject(forged, OK)
    rig.provider.let(1)
    before = everything_but_counts(rig)
    rig.turn()
    for a, b in zip(before, everything_but_counts(rig), strict=True):
        np.testing.assert_array_equal(a, b)
    assert rig.counts["stale"] == 1
    assert rig.counts["completed"] == 0


def test_a_duplicate_completion_is_counted_not_applied(rig):
    handle = rig.submit(5)
    rig.turn()
    first = int(rig.provider.entries()[0, 0])
    rig.provider.inject(first, OK)
    rig.provider.inject(first, FLUSHED)
    rig.provider.let(4)
    rig.turn()
    assert calls.status(rig.ctl, handle) == Status.NOT_FINISHED
    rig.provider.open_gate()
    rig.turn()
    assert calls.status(rig.ctl, handle) == Status.OK
    assert rig.state.worker_rows[0]["outstanding"] == 0
    assert rig.counts["completed"] == 5


def test_duplicates_in_the_same_lot_are_counted_not_applied(rig):
    handle = rig.submit(5)
    rig.turn()
    waiting = rig.provider.entries()
    honest = waiting[:, 0].copy()
    waiting[:, 0] = honest[0]  # five times the first
    rig.provider.let(5)
    rig.turn()
    assert rig.counts["completed"] == 1
    assert rig.counts["stale"] == 4
    for wr_id in honest[1:]:
        rig.provider.inject(int(wr_id), OK)
    rig.provider.let(4)
    rig.turn()
    assert calls.status(rig.ctl, handle) == Status.OK


@pytest.mark.parametrize("policy", list(enums.Policy), ids=lambda p: p.name.lower())
def test_completions_of_several_batches_in_any_order_reach_their_batch(policy):
    rig = Rig(queue_depth=64, policy=policy)
    handles = [rig.submit(8) for _ in range(4)]
    rig.turn()
    waiting = rig.provider.entries()
    assert len(waiting) == 32
    order = np.random.Generator(np.random.Philox(key=[1, 2])).permutation(32)
    waiting[:] = waiting[order].copy()
    waiting[5, 1] = int(WcStatus.REM_OP_ERR)  # one of them fails
    unlucky = int(order[5])
    rig.provider.open_gate()
    rig.turn()
    for i, handle in enumerate(handles):
        assert calls.status(rig.ctl, handle) == Status.OK
        expected = {unlucky % 8: Status.REMOTE_ERROR} if unlucky // 8 == i else {}
        assert failures(rig, handle, 8) == expected
    assert rig.counts["completed"] == 31
    assert rig.counts["failed"] == 1
    assert rig.counts["stale"] == 0


EXPECTED = {
    WcStatus.LOC_LEN_ERR: Status.LOCAL_ERROR,
    WcStatus.LOC_QP_OP_ERR: Status.LOCAL_ERROR,
    WcStatus.LOC_PROT_ERR: Status.LOCAL_ERROR,
    WcStatus.WR_FLUSH_ERR: Status.FLUSHED,
    WcStatus.REM_INV_REQ_ERR: Status.REMOTE_ERROR,
    WcStatus.REM_ACCESS_ERR: Status.REMOTE_ACCESS,
    WcStatus.REM_OP_ERR: Status.REMOTE_ERROR,
    WcStatus.RETRY_EXC_ERR: Status.RETRIES_EXCEEDED,
    WcStatus.RNR_RETRY_EXC_ERR: Status.RETRIES_EXCEEDED,
    WcStatus.REM_ABORT_ERR: Status.PEER_GONE,
}
PASSING = (WcStatus.WR_FLUSH_ERR, WcStatus.RETRY_EXC_ERR, WcStatus.RNR_RETRY_EXC_ERR)


def test_every_completion_status_has_an_expectation():
    assert set(EXPECTED) == set(WcStatus) - {WcStatus.SUCCESS}


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("wc_status", list(EXPECTED), ids=lambda s: s.name)
def test_a_failed_work_request_fails_its_request_after_its_retries(wc_status, retries):
    rig = Rig(retries=retries)
    handle = rig.submit(5)
    rig.turn()
    attempts = retries if wc_status in PASSING else 0
    for _ in range(attempts + 1):
        assert calls.status(rig.ctl, handle) == Status.NOT_FINISHED
        waiting = rig.provider.entries()
        waiting[3 if len(waiting) == 5 else 0, 1] = int(wc_status)
        rig.provider.let(len(waiting))
        rig.turn()
    assert calls.status(rig.ctl, handle) == Status.OK
    assert failures(rig, handle, 5) == {3: EXPECTED[wc_status]}
    assert rig.counts["retried"] == attempts
    assert rig.counts["completed"] == 4
    assert calls.close(rig.ctl, handle, True) == Status.HAS_FAILURES
    assert calls.close(rig.ctl, handle, False) == Status.OK
    assert rig.state.free_slices == 2048


def test_an_unknown_completion_status_is_a_local_error(rig):
    handle = rig.submit(1)
    rig.turn()
    rig.provider.entries()[0, 1] = 99
    rig.provider.open_gate()
    rig.turn()
    assert failures(rig, handle, 1) == {0: Status.LOCAL_ERROR}


def test_a_completion_of_the_first_try_does_not_answer_for_the_second(rig):
    handle = rig.submit(1)
    rig.turn()
    wr_id = int(rig.provider.entries()[0, 0])
    rig.provider.entries()[0, 1] = FLUSHED
    rig.provider.inject(wr_id, OK)  # the same lot says both: flushed, and done
    rig.provider.let(2)
    rig.turn()
    assert rig.counts["retried"] == 1
    assert rig.counts["stale"] == 1
    assert calls.status(rig.ctl, handle) == Status.NOT_FINISHED
    rig.provider.let(1)
    rig.turn()
    assert calls.status(rig.ctl, handle) == Status.OK


def test_a_cancelled_batch_retries_nothing():
    rig = Rig(queue_depth=4, chain=2)
    handle = rig.submit(10)
    rig.turn()
    assert len(rig.provider.entries()) == 4
    calls.cancel(rig.ctl, handle)
    rig.turn()
    rig.provider.entries()[:, 1] = FLUSHED
    rig.provider.open_gate()
    rig.turn()
    assert failures(rig, handle, 10) == dict.fromkeys(range(10), Status.CANCELLED)
    assert rig.counts["retried"] == 0


def test_a_coalesced_slice_that_fails_takes_all_its_requests_along(rig):
    base = rig.arena.ctypes.data
    offsets = [0, 10, 20, 100, 110, 200]  # three together, two together, one
    handle = rig.requests([base + o for o in offsets], [base + o for o in offsets], 10)
    rig.publish(handle)
    rig.turn()
    assert len(rig.provider.entries()) == 3
    rig.provider.entries()[1, 1] = int(WcStatus.REM_ACCESS_ERR)
    rig.provider.open_gate()
    rig.turn()
    assert failures(rig, handle, 6) == {3: Status.REMOTE_ACCESS, 4: Status.REMOTE_ACCESS}


def test_a_request_is_listed_once_however_many_of_its_slices_failed():
    rig = Rig(slice_bytes=16)
    base = rig.arena.ctypes.data
    handle = rig.requests([base, base + 1000], [base, base + 1000], [64, 16])
    rig.publish(handle)
    rig.turn()
    rig.provider.entries()[1:4, 1] = [int(WcStatus.REM_OP_ERR), int(WcStatus.REM_ACCESS_ERR), OK]
    rig.provider.open_gate()
    rig.turn()
    assert failures(rig, handle, 2) == {0: Status.REMOTE_ERROR}


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
def test_never_more_outstanding_than_the_queue_is_deep(depth):
    rig = Rig(queue_depth=depth, chain=8)
    handle = rig.submit(50)
    for _ in range(100):
        rig.turn()
        assert rig.provider.queues[0][0].outstanding <= depth
        if calls.status(rig.ctl, handle) == Status.OK:
            break
        rig.provider.let(1)
    assert calls.status(rig.ctl, handle) == Status.OK
    assert rig.counts["completed"] == 50


def test_states_of_slices_follow_their_life(rig):
    handle = rig.submit(3)
    state = rig.array("slice_state")
    first = int(rig.batch(handle)["first"]) * 256
    assert list(state[first : first + 3]) == [Slice.WAITING] * 3
    rig.turn()
    assert list(state[first : first + 3]) == [Slice.POSTED] * 3
    rig.provider.let(1)
    rig.turn()
    assert list(state[first : first + 3]) == [Slice.DONE, Slice.POSTED, Slice.POSTED]
