"""Handles that name nothing are told apart from those that do, whatever their bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.errors import Status
from mooncache.kernels import calls, waits
from tests.helpers import Rig, assert_same
from tests.kernels import entries

CALLS = {
    "status": lambda ctl, h: calls.status(ctl, h),
    "wait": lambda ctl, h: waits.wait(ctl, h, 0),
    "await_finish": lambda ctl, h: waits.await_finish(ctl, h),
    "cancel": lambda ctl, h: calls.cancel(ctl, h),
    "close": lambda ctl, h: calls.close(ctl, h, True),
    "failures": lambda ctl, h: -calls.failures(ctl, h, *np.zeros((2, 8), np.int64), np.zeros((8, 3), np.int64)),
}
BATCHES = 8


def assert_all_refuse(rig, handle):
    before = rig.snapshot()
    for name, call in CALLS.items():
        assert call(rig.ctl, handle) == Status.STALE_HANDLE, name
    assert calls.slices(rig.ctl, handle) == -1
    assert calls.quiesced(rig.ctl, handle) == 1  # nothing that it names can move
    assert_same(before, rig.snapshot())


@pytest.mark.parametrize("finished", [True, False])
def test_a_closed_handle_is_stale(finished):
    rig = Rig()
    handle = rig.submit(3)
    if finished:
        rig.provider.open_gate()
    rig.turn()
    calls.close(rig.ctl, handle, False)
    rig.provider.open_gate()
    rig.turn()
    assert_all_refuse(rig, handle)
    again = rig.submit(3)
    rig.turn()
    assert again & 0xFFFFFFFF == handle & 0xFFFFFFFF, "the same row"
    assert_all_refuse(rig, handle)
    assert calls.status(rig.ctl, again) == Status.OK


def test_a_closed_handle_is_stale_while_its_batch_still_drains():
    rig = Rig()
    handle = rig.submit(3)
    rig.turn()
    assert calls.close(rig.ctl, handle, True) == Status.NOT_FINISHED
    before = rig.snapshot()
    for name, call in CALLS.items():
        assert call(rig.ctl, handle) == Status.STALE_HANDLE, name
    assert calls.quiesced(rig.ctl, handle) == 0
    assert_same(before, rig.snapshot())


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_a_guessed_later_generation_names_nothing(ahead):
    rig = Rig()
    handle = rig.submit(3)
    rig.turn()
    calls.close(rig.ctl, handle, True)  # detached: its row waits for the NIC under the next generation
    forged = handle + (ahead << 32)
    before = rig.snapshot()
    for name in ("close", "cancel", "failures"):
        assert CALLS[name](rig.ctl, forged) == Status.STALE_HANDLE, name
    assert_same(before, rig.snapshot())
    rig.provider.open_gate()
    rig.turn()
    assert_all_refuse(rig, forged)
    assert rig.state.free_slices == 2048
    assert rig.counts["batches_closed"] == rig.counts["batches_finished"] == 1


@given(
    st.one_of(
        st.integers(-(1 << 63), (1 << 63) - 1),
        st.builds(lambda g, s: g << 32 | s, st.integers(0, 5), st.integers(0, 2 * BATCHES)),
        st.sampled_from([0, -1, BATCHES - 1, BATCHES, (1 << 32) - 1, (1 << 63) - 1, -(1 << 63)]),
    )
)
def test_forged_handles_change_nothing(handle):
    rig = Rig(batches=BATCHES)
    known = rig.submit(3)
    if handle == known:
        return
    assert_all_refuse(rig, handle)


@given(st.integers(0, (1 << 62)), st.integers(0, (1 << 24)))
def test_a_handle_is_never_negative_and_keeps_slot_and_generation(generation, slot):
    handle = entries.handle_of(generation, slot)
    assert handle >= 0
    assert handle & 0xFFFFFFFF == slot
    assert handle >> 32 == generation % (1 << 31)


@pytest.mark.parametrize("start", [(1 << 31) - 3, (1 << 31) - 2, (1 << 31) - 1])
@pytest.mark.parametrize("detach", [False, True])
def test_generations_wrap_without_losing_a_batch(start, detach):
    rig = Rig(batches=1)
    rig.state.batch_rows["generation"] = start
    for _ in range(4):
        handle = rig.submit(300)
        assert handle >= 0
        if detach:
            rig.turn()
            assert calls.status(rig.ctl, handle) == Status.NOT_FINISHED
            assert calls.close(rig.ctl, handle, True) == Status.NOT_FINISHED
            rig.provider.open_gate()
            rig.turn()
            rig.provider.shut_gate()
        else:
            rig.provider.open_gate()
            rig.turn()
            assert calls.status(rig.ctl, handle) == Status.OK
            assert calls.close(rig.ctl, handle, True) == Status.OK
        assert calls.status(rig.ctl, handle) == Status.STALE_HANDLE
        assert rig.state.free_slices == 2048
    assert rig.counts["batches_taken"] == 4
    assert rig.counts["stale"] == 0
