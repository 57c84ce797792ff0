"""What a submitter does itself of its small batch while the worker sleeps: that, and nothing of what else there is."""

from __future__ import annotations

import numpy as np
import pytest

from mooncache.kernels import enums, hand
from mooncache.kernels.enums import Opcode
from mooncache.kernels.submit import AT_ONCE_BYTES, submit
from mooncache.limits import CHUNK_SLICES
from tests.helpers import Rig
from tests.kernels import entries


def rig_with(**settings: int) -> Rig:
    """A rig whose worker sleeps on descriptors, as far as a submitter can see."""
    rig = Rig(**{"slices": 8192, "batches": 32, "queue_depth": 1024, "chain": 64, **settings})
    rig.state.worker_rows[0]["epoll"] = 0
    for block in (rig.caller, rig.worker):
        block.row["turn"] = hand.turn_once.address
    return rig


@pytest.fixture
def rig() -> Rig:
    return rig_with()


def posted(rig: Rig) -> int:
    """Work requests that the wire has."""
    return int(rig.provider.queues[0][0].outstanding)


def lengths(rig: Rig, *bytes_: int) -> int:
    """Submit one slice of each length."""
    at = rig.arena.ctypes.data + np.zeros(len(bytes_), np.int64)
    return int(submit(rig.ctl, 0, Opcode.WRITE, 0, at, at, np.array(bytes_, np.int64)))


def test_a_small_batch_is_posted_by_its_submitter_who_polls_nothing(rig):
    rig.provider.open_gate()  # all is answered at once, and yet
    assert rig.submit(5) >= 0
    assert posted(rig) == 5
    assert rig.counts["batches_taken"] == 1
    assert rig.counts["polls"] == rig.counts["completions"] == 0
    assert rig.state.worker_rows[0]["turn"] == 0
    rig.turn()
    assert rig.counts["completed"] == 5


@pytest.mark.parametrize(
    ("bytes_", "at_once"),
    [
        ((AT_ONCE_BYTES,), True),
        ((AT_ONCE_BYTES // 2, AT_ONCE_BYTES // 2), True),
        ((AT_ONCE_BYTES, 1), False),
        ((8,) * CHUNK_SLICES, True),
        ((8,) * (CHUNK_SLICES + 1), False),
    ],
)
def test_small_is_counted_in_the_bytes_of_the_batch(rig, bytes_, at_once):
    lengths(rig, *bytes_)
    assert posted(rig) == (len(bytes_) if at_once else 0)
    assert rig.counts["batches_taken"] == at_once


def test_behind_others_a_small_batch_waits_its_turn(rig):
    rig.submit(CHUNK_SLICES + 1)
    rig.submit(1)
    assert posted(rig) == 0
    assert rig.counts["batches_taken"] == 0
    rig.turn()
    assert posted(rig) == CHUNK_SLICES + 2


def test_behind_others_at_the_same_endpoint_too():
    rig = rig_with(queue_depth=8, chain=4)
    rig.submit(10)
    assert posted(rig) == 8  # as many as there is room for; the rest is the worker's
    rig.submit(1)
    assert posted(rig) == 8
    assert rig.counts["batches_taken"] == 1
    rig.provider.open_gate()
    rig.turn()
    assert rig.counts["completed"] == 11


def test_while_somebody_else_is_the_worker_the_batch_goes_to_the_ring(rig):
    rig.state.worker_rows[0]["turn"] = 1
    rig.submit(1)
    assert posted(rig) == 0
    assert rig.state.worker_rows[0]["turn"] == 1
    rig.state.worker_rows[0]["turn"] = 0
    rig.turn()
    assert posted(rig) == 1


def test_where_the_wire_can_push_the_batch_is_done_when_the_call_comes_back(rig):
    rig.provider.open_gate()
    rig.rows[0].row["push"] = entries.push_now.address
    handle = rig.submit(3)
    assert rig.batch(handle)["state"] == enums.BatchState.RECLAIMABLE
    assert rig.counts["completed"] == 3
    assert rig.counts["polls"] == 0


def test_what_others_have_in_flight_is_not_answered_on_the_way(rig):
    rig.submit(4)
    rig.provider.open_gate()
    rig.rows[0].row["push"] = entries.push_now.address
    rig.submit(3)
    assert posted(rig) == 7
    assert rig.counts["completed"] == 0
    rig.turn()
    assert rig.counts["completed"] == 7


def test_a_wire_that_declines_leaves_it_to_the_worker(rig):
    rig.provider.open_gate()
    rig.rows[0].row["push"] = entries.push_nothing.address
    rig.submit(3)
    assert rig.counts["completed"] == 0
    rig.turn()
    assert rig.counts["completed"] == 3
