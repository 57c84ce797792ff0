"""The slice pool against a set of free chunks, step by step and from three threads at once."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mooncache.limits import CHUNK_SLICES
from tests.helpers import Rig, assert_free_list_whole, assert_same, free_chunks, in_threads
from tests.kernels import entries
from tests.oracles import Pool

CHUNKS, OWNERS = 12, 5


class PoolAgainstOracle(RuleBasedStateMachine):
    """Chains come and go, whole, and chunk by chunk as their last slice is freed."""

    def __init__(self):
        super().__init__()
        self.rig = Rig(bare=True, slices=CHUNKS * CHUNK_SLICES, batches=OWNERS)
        self.oracle = Pool(CHUNKS)
        self.live: dict[int, int] = {}  # chunk -> slots not yet freed
        rig = self.rig
        self.used, self.owner = rig.array("chunk_slices"), rig.array("chunk_batch")
        self.next, self.previous = rig.state.chunk_next, rig.array("chunk_previous")

    def chain(self, owner):
        row, chunks = self.rig.state.batch_rows[owner], []
        at = int(row["first"])
        while at >= 0:
            assert self.previous[at] == (chunks[-1] if chunks else -1)
            chunks.append(at)
            at = int(self.next[at])
        assert row["last"] == (chunks[-1] if chunks else -1)
        assert row["chunks"] == len(chunks)
        return chunks

    @rule(owner=st.integers(0, OWNERS - 1), slices=st.integers(1, 7 * CHUNK_SLICES))
    def acquire(self, owner, slices):
        if owner in self.oracle.held:
            return
        row, k = self.rig.row(owner), -(-slices // CHUNK_SLICES)
        before = self.rig.snapshot()
        got = entries.acquire(self.rig.ctl, row, owner, slices)
        assert got == (k <= len(self.oracle.free))
        if not got:
            assert_same(before, self.rig.snapshot())
            return
        chain = self.chain(owner)
        assert len(chain) == k
        self.oracle.acquire(owner, chain)
        for i, chunk in enumerate(chain):
            assert self.used[chunk] == min(CHUNK_SLICES, slices - i * CHUNK_SLICES)
            assert self.owner[chunk] == owner
            self.live[chunk] = int(self.used[chunk])

    @precondition(lambda self: self.oracle.held)
    @rule(data=st.data())
    def release(self, data):
        owner = data.draw(st.sampled_from(sorted(self.oracle.held)))
        entries.release(self.rig.ctl, self.rig.row(owner))
        self.oracle.release(owner)

    @precondition(lambda self: self.oracle.held)
    @rule(data=st.data())
    def free_one_chunk_by_its_slots(self, data):
        owner = data.draw(st.sampled_from(sorted(self.oracle.held)))
        chunk = data.draw(st.sampled_from(self.oracle.held[owner]))
        for left in reversed(range(self.live[chunk])):
            slot = chunk * CHUNK_SLICES + left
            assert entries.free_slot(self.rig.ctl, self.rig.row(owner), slot) == left
        self.oracle.release_one(owner, chunk)

    @invariant()
    def nothing_is_lost_or_in_two_places(self):
        assert set(free_chunks(self.rig.state)) == self.oracle.free
        assert_free_list_whole(self.rig.state)
        for owner, held in self.oracle.held.items():
            assert self.chain(owner) == held


TestPoolAgainstOracle = PoolAgainstOracle.TestCase


def test_three_threads_never_hold_the_same_chunk_and_lose_none():
    rig = Rig(bare=True, slices=8 * CHUNK_SLICES, batches=4)
    blocks = [rig.ctl, rig._block(-1).ctl]
    third = rig._block(-1)
    blocks.append(third.ctl)
    owners = np.zeros(8, np.int64)
    # Up to four of eight chunks each: sometimes there are too few, mostly they collide on the list's head.
    twice = in_threads(*[lambda i=i: entries.churn(blocks[i], i, 100_000, 4, owners.ctypes.data) for i in range(3)])
    assert twice == [0, 0, 0]
    assert sorted(free_chunks(rig.state)) == list(range(8))
    assert rig.state.free_slices == 8 * CHUNK_SLICES


def test_the_high_water_mark_is_the_most_ever_held():
    rig = Rig(bare=True, slices=8 * CHUNK_SLICES)
    assert rig.state.high_water_slices == 0
    for slices in (700, 5 * CHUNK_SLICES, 1):
        assert entries.acquire(rig.ctl, rig.row(0), 0, slices)
        entries.release(rig.ctl, rig.row(0))
    assert rig.state.high_water_slices == 5 * CHUNK_SLICES


def test_releasing_an_empty_chain_changes_nothing():
    rig = Rig(bare=True)
    assert entries.acquire(rig.ctl, rig.row(0), 0, 1)
    entries.release(rig.ctl, rig.row(0))
    before = rig.snapshot()
    entries.release(rig.ctl, rig.row(0))
    assert_same(before, rig.snapshot())
