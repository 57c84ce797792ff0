"""Counting work, and the two clocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.kernels import calls, enums
from mooncache.kernels.arrays import address_of
from mooncache.kernels.enums import Kind
from mooncache.kernels.settings import Settings
from mooncache.kernels.state import Block, State
from tests.helpers import Rig, Task
from tests.kernels import entries

WORK = st.lists(st.tuples(st.sampled_from(list(Kind)), st.integers(0, 1000)), max_size=40)


@given(WORK)
def test_virtual_work_is_counted_and_turns_the_actors_clock_by_its_price(work):
    rig = Rig(bare=True)
    fixed = np.arange(len(Kind), dtype=np.int64) * 7 + 1
    each = np.arange(len(Kind), dtype=np.int64)[::-1].copy() * 3
    block = Block(rig.state)
    block.row["cost_fixed"], block.row["cost_each"] = address_of(fixed), address_of(each)
    counts, spent = dict.fromkeys(Kind, 0), dict.fromkeys(Kind, 0)
    for kind, n in work:
        entries.account(block.ctl, kind, n)
        counts[kind] += n
        spent[kind] += int(fixed[kind] + n * each[kind])
    assert list(block.counters[: len(Kind)]) == list(counts.values())
    assert list(block.spent[: len(Kind)]) == list(spent.values())
    assert block.row["now"] == sum(spent.values()) == entries.clock(block.ctl)


@given(WORK)
def test_real_work_is_only_counted(work):
    block = Block(State(Settings(slices=256, batches=1, peers=1)))
    for kind, n in work:
        entries.account(block.ctl, kind, n)
    assert block.counters.sum() == sum(n for _, n in work)
    assert block.row["now"] == 0
    assert block.spent.sum() == 0


def test_the_real_clock_is_the_monotonic_clock():
    from time import CLOCK_MONOTONIC, clock_gettime_ns

    block = Block(State(Settings(slices=256, batches=1, peers=1)))
    before = clock_gettime_ns(CLOCK_MONOTONIC)
    assert before <= entries.clock(block.ctl) <= clock_gettime_ns(CLOCK_MONOTONIC)


def test_actors_count_apart():
    rig = Rig(bare=True)
    entries.account(rig.ctl, Kind.CHUNKS_FREED, 3)
    assert rig.caller.counters[Kind.CHUNKS_FREED] == 3
    assert rig.worker.counters.sum() == 0


@pytest.mark.parametrize("policy", list(enums.Policy), ids=lambda p: p.name.lower())
@pytest.mark.parametrize("store", list(enums.Store), ids=lambda s: s.name.lower())
def test_the_same_batches_are_counted_the_same_twice(store, policy):
    """Counts that do not depend on timing are a function of the batches alone."""

    def play():
        rig = Rig(store=store, policy=policy)
        rig.provider.open_gate()
        for slices in (1, 300, 40):
            handle = rig.submit(slices)
            rig.turn()
            calls.close(rig.ctl, handle, True)
        return rig.counts

    first, second = play(), play()
    assert first == second
    assert first["slices_filled"] == first["completed"] == 341
    assert first["batches_submitted"] == first["batches_closed"] == 3


def test_a_long_pump_does_not_hold_the_gil():
    """A worker that never parks keeps a thread in the kernel; Python must be able to run and stop it."""
    rig = Rig(slices=256)
    state = State(Settings(slices=256, batches=1, peers=1, spin_ns=10**12))
    block = Block(state, 0)
    state.poll_from(0, rig.queues)
    from mooncache.kernels import pump

    worker = Task(pump.pump, block.ctl)
    calls.stop(Block(state).ctl)
    assert worker.result() == pump.Pump.STOPPED
