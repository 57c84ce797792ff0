"""Which queue pair gets the next chain: shares by weight, nothing for those that are not ready or have no room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.errors import Status
from mooncache.kernels import calls
from mooncache.kernels.arrays import address_of
from mooncache.kernels.enums import Order, QueueState
from mooncache.kernels.records.queue import WEIGHT_ONE
from tests.kernels import entries
from tests.kernels.slate import SlateRig
from tests.oracles import Lane, chosen

LANES = st.lists(
    st.builds(
        Lane,
        ready=st.booleans(),
        depth=st.integers(1, 64),
        in_flight=st.integers(0, 64),
        weight=st.integers(1, WEIGHT_ONE),
        credits=st.integers(0, 64),
    ),
    min_size=1,
    max_size=8,
)


@given(LANES, st.integers(1, 64))
def test_the_queue_of_the_least_load_by_weight_gets_the_chain(lanes, n):
    rig = SlateRig(*[{}] * len(lanes))
    cqs = next(a for a in rig.state.arrays if a.size and address_of(a) == rig.state.worker_rows[0]["cqs"])
    for rail, (row, lane) in enumerate(zip(rig.rows, lanes, strict=True)):
        row.row["state"] = QueueState.READY if lane.ready else QueueState.DRAINED
        row.row.set(depth=lane.depth, head=min(lane.in_flight, lane.depth), weight=lane.weight)
        cqs[rail]["credits"] = lane.credits
    endpoint = address_of(rig.state.endpoint_rows)
    rows = {row.address: rail for rail, row in enumerate(rig.rows)}
    assert rows.get(entries.choose(endpoint, n)) == chosen(lanes, n)


@pytest.mark.parametrize("state", [s for s in QueueState if s != QueueState.READY], ids=lambda s: s.name)
def test_a_queue_in_any_state_but_ready_gets_nothing(state):
    rig = SlateRig({}, {})
    rig.rows[0].row["state"] = state
    rig.submit(300)
    rig.turn()
    assert rig.totals == [0, 300]


@pytest.mark.parametrize("weights", [(1024, 1024), (1024, 512), (1024, 256, 64), (1, 1), (700, 300)])
def test_shares_follow_the_weights(weights):
    """While nothing is answered, no queue is further ahead, by weight, than a chain."""
    chain = 4
    rig = SlateRig(*[{"weight": w} for w in weights], chain=chain, queue_depth=2048)
    rig.submit(1000)
    rig.turn()
    assert sum(rig.totals) == 1000
    for total, weight in zip(rig.totals, weights, strict=True):
        assert abs(total - 1000 * weight / sum(weights)) <= 2 * chain


def test_a_queue_that_has_fallen_behind_is_spared():
    rig = SlateRig({}, {}, chain=4, queue_depth=64)
    handle = rig.submit(400)
    for _ in range(1000):
        rig.turn()
        if rig.totals[0] + 64 >= 400:
            break
        rig.serve(0)
    # The other one took what it is deep, as an equal, and nothing more.
    assert rig.totals[1] == 64
    rig.finish(handle)
    assert rig.failures(handle, 400) == {}


def test_where_no_queue_is_ready_batches_wait_until_one_is():
    rig = SlateRig({"breaks": True})
    rig.order(0, Order.BREAK)
    rig.turn()
    handle = rig.submit(10)
    rig.turn()
    assert rig.totals == [1]  # the probe
    assert calls.status(rig.ctl, handle) == Status.NOT_FINISHED
    rig.finish(handle)
    assert rig.failures(handle, 10) == {}


def test_a_chain_longer_than_half_a_queue_is_cut_so_that_the_queue_can_hold_two():
    rig = SlateRig({"depth": 8}, chain=128, queue_depth=512)
    handle = rig.submit(100)
    rig.turn()
    assert rig.totals == [8]
    rig.serve(most=3)
    rig.turn()
    assert rig.totals == [8]  # three is less than half
    rig.serve(most=1)
    rig.turn()
    assert rig.totals == [12]
    rig.finish(handle)
