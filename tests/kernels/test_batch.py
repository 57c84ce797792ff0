"""The batch state machine: every cell of its table."""

import pytest

from mooncache.errors import Status
from mooncache.kernels import calls, waits
from mooncache.kernels.batch import NEXT, REFUSED, Event
from mooncache.kernels.enums import BatchState
from tests.helpers import Rig, Task
from tests.kernels import entries
from tests.oracles import BATCH_TABLE


@pytest.mark.parametrize("state", list(BatchState), ids=lambda s: s.name)
@pytest.mark.parametrize("event", list(Event), ids=lambda e: e.name)
def test_every_cell_of_the_table(state, event):
    rig = Rig(bare=True)
    rig.state.batch_rows[0]["state"] = state
    answer = entries.move(rig.row(0), event)
    after = BatchState(int(rig.state.batch_rows[0]["state"]))
    if (state.name, event.name) in BATCH_TABLE:
        assert answer == state
        assert after.name == BATCH_TABLE[state.name, event.name]
        assert NEXT[state, event] == after
    else:
        assert answer == REFUSED
        assert after == state


def test_every_state_can_be_reached_and_leads_back_to_free():
    def reach(start):
        seen, new = set(), {start}
        while new:
            seen |= new
            new = {b for (a, _), b in BATCH_TABLE.items() if a in seen} - seen
        return seen

    for state in BatchState:
        assert "FREE" in reach(state.name)
    assert reach("FREE") == {s.name for s in BatchState}


def test_rows_run_out_and_come_back():
    rig = Rig(batches=3)
    rig.provider.open_gate()
    handles = [rig.submit(1) for _ in range(3)]
    assert len({h & 0xFFFFFFFF for h in handles}) == 3
    assert rig.submit(1) == -Status.BATCHES_EMPTY
    rig.turn()
    calls.close(rig.ctl, handles[1], True)
    again = rig.submit(1)
    assert again & 0xFFFFFFFF == handles[1] & 0xFFFFFFFF
    assert again != handles[1]


def test_capacity_that_came_back_just_before_the_wait_is_not_slept_through():
    rig = Rig(batches=1)
    rig.provider.open_gate()
    handle = rig.submit(1)
    rig.turn()
    bell = waits.capacity_bell(rig.ctl)
    assert rig.submit(1) == -Status.BATCHES_EMPTY
    calls.close(rig.ctl, handle, True)  # after the refusal, before the wait
    Task(waits.wait_capacity, rig.ctl, bell, 3600 * 10**9).result()


def test_a_batch_without_requests_is_finished_at_once():
    rig = Rig()
    handle = rig.requests([], [], [])
    assert calls.status(rig.ctl, handle) == Status.NOT_FINISHED
    rig.publish(handle)
    assert calls.status(rig.ctl, handle) == Status.OK
    assert calls.close(rig.ctl, handle, True) == Status.OK
    assert rig.counts["batches_taken"] == 0


def test_a_batch_closed_before_it_was_published_gives_everything_back():
    rig = Rig()
    base = rig.arena.ctypes.data
    handle = rig.requests([base, base + 100], [base, base + 100], [4, 4])
    assert calls.close(rig.ctl, handle, True) == Status.OK
    assert rig.state.free_slices == 2048
    assert rig.publish(handle) == -Status.STALE_HANDLE
    assert rig.state.batch_rows["state"].sum() == 0


def test_publishing_twice_is_refused_or_harmless():
    rig = Rig()
    base = rig.arena.ctypes.data
    handle = rig.requests([base], [base], [4])
    assert rig.publish(handle) == Status.OK
    rig.publish(handle)
    rig.provider.open_gate()
    rig.turn()
    assert calls.close(rig.ctl, handle, True) == Status.OK
    assert rig.counts["batches_finished"] == 1
    assert rig.state.free_slices == 2048


def test_stopping_closes_open_running_and_finished_batches_and_refuses_new_ones():
    rig = Rig()
    base = rig.arena.ctypes.data
    opened = rig.requests([base], [base], [4])
    done = rig.submit(2)
    rig.provider.let(2)
    rig.turn()
    running = rig.submit(2)
    rig.turn()
    assert calls.stop(rig.ctl) == 3
    assert rig.submit(1) == -Status.CLOSED
    assert rig.state.free_slices < 2048
    rig.provider.open_gate()
    rig.turn()
    assert rig.state.free_slices == 2048
    assert {calls.status(rig.ctl, h) for h in (opened, done, running)} == {Status.STALE_HANDLE}
    assert rig.state.batch_rows["state"].sum() == 0
