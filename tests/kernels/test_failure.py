"""Each cell of the tables that decide what becomes of what failed, against those of the oracle."""

from __future__ import annotations

from itertools import product

import pytest

from mooncache.errors import Status
from mooncache.kernels import repair
from mooncache.kernels.enums import QueueState
from mooncache.kernels.failure import Fate, Outcome
from mooncache.kernels.verbs import WcStatus
from tests.kernels import entries
from tests.oracles import QUEUE_EVENTS, fate_of, outcome_of, status_of

FAILED = [status for status in WcStatus if status != WcStatus.SUCCESS]
BOTH = (False, True)


@pytest.mark.parametrize("wc", FAILED, ids=lambda wc: wc.name)
def test_a_work_request_that_failed_has_the_outcome_of_the_table(wc):
    for slices, retries, note, breaks, overdue in product((0, 1, 2, 30), (0, 1, 7), BOTH, BOTH, BOTH):
        found = Outcome(entries.outcome_of(wc, slices, retries, note, breaks, overdue))
        assert found.name == outcome_of(wc.name, slices, retries, note, breaks, overdue)


@pytest.mark.parametrize("wc", FAILED, ids=lambda wc: wc.name)
def test_a_slice_that_failed_has_the_fate_of_the_table(wc):
    stopped_by = (0, Status.CANCELLED, Status.TIMED_OUT, Status.PEER_GONE)
    for note, stopped, exhausted, askable in product(BOTH, stopped_by, BOTH, BOTH):
        found = Fate(entries.fate_of(wc, note, stopped, exhausted, askable))
        assert found.name == fate_of(wc.name, note, Status(stopped).name if stopped else "", exhausted, askable)


@pytest.mark.parametrize("wc", FAILED, ids=lambda wc: wc.name)
def test_a_slice_that_fails_for_its_own_sake_is_told_why(wc):
    assert Status(entries.status_of(wc)).name == status_of(wc.name)


@pytest.mark.parametrize(("state", "event"), list(product(QueueState, repair.Event)), ids=lambda x: x.name)
def test_a_queue_pair_moves_on_as_the_table_says(state, event):
    after = int(repair.NEXT[state, event])
    assert (None if after == repair.REFUSED else QueueState(after).name) == QUEUE_EVENTS.get((state.name, event.name))
