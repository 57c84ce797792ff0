"""The life of a queue pair that breaks: what each event and order does in each state."""

from __future__ import annotations

import os
from itertools import product

import pytest

from mooncache.errors import Status
from mooncache.kernels import calls
from mooncache.kernels.enums import Order, QueueState
from mooncache.kernels.verbs import WcStatus
from tests.helpers import assert_at_rest
from tests.kernels.broken import (
    BIG,
    BREAK,
    BREAKS,
    BROKEN,
    CLOSED,
    DRAINED,
    LOSE,
    LOST,
    NONE,
    PROBE,
    PROBING,
    READY,
    RETURN,
    reach,
    rig_of,
)
from tests.kernels.slate import FLUSHED
from tests.oracles import QUEUE_TABLE


# ------------------------------------------------------------------------------ the table
@pytest.mark.parametrize(("state", "order"), list(product(QueueState, Order)), ids=lambda x: x.name)
def test_each_order_in_each_state_does_what_the_table_says(state, order):
    rig = rig_of()
    handle = rig.submit(20)
    rig.turn()
    reach(rig, state)
    if order != NONE:
        rig.order(0, order)
    rig.turn()
    assert rig.rows[0].state.name == QUEUE_TABLE[state.name, order.name]
    rig.broken[0] = rig.broken[0] or rig.rows[0].state == BROKEN
    rig.finish(handle)
    expected = dict.fromkeys(range(20), Status.PEER_GONE) if order == LOSE else {}
    assert rig.failures(handle, 20) == expected


def test_the_table_has_every_state_and_order():
    assert set(QUEUE_TABLE) == {(state.name, order.name) for state, order in product(QueueState, Order)}


def test_an_idle_queue_that_is_broken_by_order_is_drained_at_once():
    rig = rig_of()
    rig.order(0, BREAK)
    rig.turn()
    assert rig.rows[0].state == DRAINED


def test_an_idle_queue_whose_peer_is_lost_is_closed_at_once():
    rig = rig_of()
    rig.order(0, LOSE)
    rig.turn()
    assert rig.rows[0].state == CLOSED


def test_a_queue_that_was_broken_by_order_drains_though_all_that_was_on_it_arrives():
    rig = rig_of()
    handle = rig.submit(20)
    rig.turn()
    rig.order(0, BREAK)
    rig.turn()
    rig.serve()
    rig.turn()
    assert rig.rows[0].state == DRAINED
    assert calls.status(rig.ctl, handle) == Status.OK
    assert rig.failures(handle, 20) == {}


def test_a_queue_is_ready_when_its_probe_gets_through():
    rig = rig_of()
    reach(rig, PROBING)
    rig.serve()
    rig.turn()
    assert rig.rows[0].state == READY


@pytest.mark.parametrize("status", [LOST, FLUSHED, int(WcStatus.REM_ACCESS_ERR)])
def test_a_queue_whose_probe_fails_is_drained_again_and_can_be_probed_again(status):
    rig = rig_of()
    reach(rig, PROBING)
    rig.serve(fail=lambda p: status)
    rig.turn()
    assert rig.rows[0].state == DRAINED
    assert rig.rows[0].cause == status
    handle = rig.submit(5)
    rig.finish(handle)
    assert rig.failures(handle, 5) == {}
    assert_at_rest(rig.state, BIG)


@pytest.mark.parametrize("errno", [12, 22])
def test_a_probe_that_is_refused_breaks_the_queue_again(errno):
    rig = rig_of()
    reach(rig, CLOSED)
    rig.provider.refuse(0, 1, errno)
    rig.order(0, PROBE)
    rig.turn()
    assert rig.rows[0].state == DRAINED


def test_a_probe_waits_for_room_in_the_completion_queue():
    """The other queue has all of it."""
    rig = rig_of({**BREAKS, "cq": 0}, {"cq": 0}, cq_entries=16)
    reach(rig, CLOSED)
    handle = rig.submit(40)
    rig.turn()
    before = rig.totals
    assert before[1] == 16
    rig.order(0, PROBE)
    rig.turn()
    assert rig.rows[0].state == PROBING
    assert rig.totals == before
    rig.finish(handle)
    assert rig.totals[0] > before[0]
    assert_at_rest(rig.state, 16)


def test_an_order_takes_the_place_of_one_that_was_not_seen_yet():
    rig = rig_of()
    handle = rig.submit(20)
    rig.turn()
    reach(rig, DRAINED)
    rig.order(0, RETURN)
    rig.order(0, LOSE)
    assert rig.state.worker_rows[0]["orders"] == 1
    rig.turn()
    assert rig.state.worker_rows[0]["orders"] == 0
    assert rig.failures(handle, 20) == dict.fromkeys(range(20), Status.PEER_GONE)
    rig.order(0, LOSE)
    rig.order(0, PROBE)
    rig.turn()
    assert rig.rows[0].state == PROBING


def test_each_queue_obeys_its_own_orders():
    rig = rig_of(BREAKS, BREAKS, BREAKS)
    rig.order(1, BREAK)
    rig.order(2, LOSE)
    rig.turn()
    assert [row.state for row in rig.rows] == [READY, DRAINED, CLOSED]


def test_its_owner_is_told_of_each_state_it_has_to_do_something_about():
    rig = rig_of()
    told = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        rig.state.worker_rows[0]["trouble_fd"] = told
        rig.submit(20)
        rig.turn()
        for state in (BROKEN, DRAINED, CLOSED):
            reach(rig, state) if state == BROKEN else rig.serve() if state == DRAINED else rig.order(0, RETURN)
            rig.turn()
            assert rig.rows[0].state == state
            assert os.eventfd_read(told) > 0
        rig.broken[0] = False
        rig.order(0, PROBE)
        rig.turn()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(told)
        rig.serve()
        rig.turn()
        assert rig.rows[0].state == READY
        assert os.eventfd_read(told) > 0
    finally:
        rig.state.worker_rows[0]["trouble_fd"] = -1
        os.close(told)
