"""Slices that lie side by side at the target share a work request, as far as the queue pair gathers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.errors import Status
from mooncache.kernels import calls
from mooncache.kernels.enums import Access, Opcode
from mooncache.kernels.verbs import SEND_INLINE, WcStatus
from mooncache.limits import CHUNK_SLICES, SLICES_GATHERED
from mooncache.providers.inprocess.emulated import Emulated, Nic
from mooncache.providers.inprocess.faults import Action, Fault
from tests.helpers import Rig, assert_at_rest
from tests.kernels.slate import OK, SlateRig
from tests.oracles import gathered

HERE, THERE = 1 << 40, 1 << 41  # made-up regions, two at each end that touch
SPAN = 1 << 20
GUILTY = int(WcStatus.REM_OP_ERR)


def rig_of(*rails, **settings) -> SlateRig:
    """A rig whose regions are [HERE, +SPAN), [HERE + SPAN, +SPAN), and the same from THERE on."""
    rig = SlateRig(*rails, bare=True, **{"queue_depth": 1024, "chain": 400, **settings})
    for i in range(2):
        keys = rig.provider.register(0, 0, 0)
        rig.state.regions.add(HERE + i * SPAN, SPAN, keys.lkeys, 7)
        rig.remote.add(THERE + i * SPAN, SPAN, keys.rkeys, 3)
    return rig


def write(rig, sources, targets, lengths) -> int:
    """Publish a batch by offsets into the made-up regions."""
    sources, targets = np.asarray(sources, np.int64), np.asarray(targets, np.int64)
    handle = rig.requests(HERE + sources, THERE + targets, np.broadcast_to(lengths, sources.shape).copy())
    assert handle >= 0
    rig.publish(handle)
    return handle


def in_a_row(n: int, length: int = 8):
    """n slices side by side at the target, and apart here: source, target, length."""
    at = np.arange(n, dtype=np.int64)
    return 2 * length * at, length * at, length


# ------------------------------------------------------------------------------ who shares one
LAYOUT = st.lists(
    st.tuples(st.integers(1, 50), st.sampled_from([0, 0, 0, 1, 7]), st.sampled_from([0, 1, 1])), min_size=1, max_size=80
)  # length, gap in front of it at the target, and here


@given(LAYOUT, st.integers(1, SLICES_GATHERED), st.integers(1, 9), st.sampled_from([Opcode.WRITE, Opcode.READ]))
def test_work_requests_carry_the_slices_that_the_oracle_says(layout_, gathers, signal, opcode):
    rig = rig_of({"gathers": gathers, "signal": signal})
    length = np.array([size for size, _, _ in layout_], np.int64)
    target = np.cumsum(length + [gap for _, gap, _ in layout_]) - length
    source = np.cumsum(length + [gap for _, _, gap in layout_]) - length
    together = [
        i > 0 and target[i] == target[i - 1] + length[i - 1] and source[i] == source[i - 1] + length[i - 1]
        for i in range(len(layout_))
    ]  # those become one slice anyway
    starts = [i for i, joined in enumerate(together) if not joined]
    slices = []
    for a, b in zip(starts, [*starts[1:], len(layout_)], strict=True):
        slices.append((int(source[a]), int(target[a]), int(length[a:b].sum())))
    handle = rig.requests(HERE + source, THERE + target, length, opcode)
    rig.publish(handle)
    rig.turn()
    groups = gathered([(t, n, 0) for _, t, n in slices], CHUNK_SLICES, gathers)
    assert [(p.opcode, p.remote - THERE, [(a - HERE, n) for a, n, _ in p.ranges]) for p in rig.posted()] == [
        (opcode, slices[group[0]][1], [(slices[i][0], slices[i][2]) for i in group]) for group in groups
    ]
    rig.finish(handle)
    assert rig.counts["completed"] == len(slices)
    assert rig.counts["work_requests"] == len(groups)
    assert_at_rest(rig.state, 1 << 20)


def test_slices_of_two_chunks_of_slots_never_share_one():
    rig = rig_of({"gathers": 16})
    write(rig, *in_a_row(CHUNK_SLICES + 40))
    rig.turn()
    assert [len(p.ranges) for p in rig.posted()] == [16] * (CHUNK_SLICES // 16) + [16, 16, 8]


def test_slices_of_two_regions_at_the_target_never_share_one_though_they_touch():
    rig = rig_of({"gathers": 16})
    source, target, length = in_a_row(10)
    write(rig, source, target + SPAN - 5 * length, length)
    rig.turn()
    first, second = rig.posted()
    assert len(first.ranges) == len(second.ranges) == 5
    assert first.rkey != second.rkey


def test_slices_of_two_local_regions_may_share_one_and_each_shows_its_own_key():
    rig = rig_of({"gathers": 16})
    write(rig, [0, SPAN, 100, SPAN + 100], np.arange(4) * 8, 8)
    rig.turn()
    (posted,) = rig.posted()
    keys = rig.state.regions.keys[0]
    slots = [int(rig.state.regions.slots[i]) for i in (0, 1)]
    assert [key for _, _, key in posted.ranges] == [keys[slots[0]], keys[slots[1]]] * 2


def test_each_queue_shows_the_keys_of_its_own_nics_at_both_ends():
    rig = rig_of({}, {}, {}, chain=1)
    write(rig, *in_a_row(9))
    rig.turn()
    for rail, row in enumerate(rig.rows):
        posted = rig.posted(rail)
        assert len(posted) == 3
        (local,) = {int(rig.state.regions.keys[row.pair.lkeys, s]) for s in rig.state.regions.slots[:1]}
        (remote,) = {int(rig.remote.keys[row.pair.rkeys, s]) for s in rig.remote.slots[:1]}
        assert {key for p in posted for _, _, key in p.ranges} == {local}
        assert {p.rkey for p in posted} == {remote}


def test_only_a_short_write_of_a_single_slice_is_carried_inline():
    rig = rig_of({"gathers": 4, "inline": 8})
    write(rig, [0, 100, 200, 300], [0, 8, 100, 200], [8, 8, 8, 9])
    rig.turn()
    assert [(len(p.ranges), bool(p.flags & SEND_INLINE)) for p in rig.posted()] == [(2, False), (1, True), (1, False)]
    handle = rig.requests(HERE, THERE, 8, Opcode.READ)
    rig.publish(handle)
    rig.turn()
    assert not rig.posted()[-1].flags & SEND_INLINE


def test_a_work_request_never_grows_beyond_what_nics_take():
    rig = rig_of({"gathers": 16, "message_bytes": 1 << 30}, slice_bytes=1 << 27)
    assert rig.word("gathers") == 4
    rig = rig_of({"gathers": 16, "message_bytes": 1 << 31}, slice_bytes=1 << 30)
    assert rig.word("gathers") == 1


def test_a_short_post_moves_the_cursor_by_slices_not_by_work_requests():
    rig = rig_of({"gathers": 4, "signal": 16})
    rig.provider.refuse(0, 2, 12)
    handle = write(rig, *in_a_row(20))
    rig.turn()
    assert [len(p.ranges) for p in rig.posted()] == [4] * 5
    assert [p.ranges[0][0] - HERE for p in rig.posted()] == [0, 64, 128, 192, 256]
    rig.finish(handle)
    assert rig.counts["completed"] == 20


# ------------------------------------------------------------------------------ who is to blame
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("guilty", range(4))
def test_of_a_failed_work_request_each_slice_is_posted_alone_and_only_the_guilty_one_fails(guilty, breaks):
    rig = rig_of({"gathers": 4, "breaks": breaks})
    handle = write(rig, *in_a_row(8))
    rig.finish(handle, fail=lambda p: GUILTY if HERE + 16 * guilty in [a for a, _, _ in p.ranges] else OK)
    assert rig.failures(handle, 8) == {guilty: Status.REMOTE_ERROR}
    assert rig.counts["completed"] == 7
    alone = [p for p in rig.posted(since=breaks + 2) if p.ranges]
    assert {len(p.ranges) for p in alone[:4]} == {1}


def test_without_retries_all_slices_of_a_failed_work_request_fail_as_it_did():
    rig = rig_of({"gathers": 4}, retries=0)
    handle = write(rig, *in_a_row(8))
    rig.finish(handle, fail=lambda p: GUILTY if p.remote == THERE else OK)
    assert rig.failures(handle, 8) == dict.fromkeys(range(4), Status.REMOTE_ERROR)


def test_all_slices_of_a_cancelled_batchs_failed_work_request_are_cancelled():

    rig = rig_of({"gathers": 4})
    handle = write(rig, *in_a_row(8))
    rig.turn()
    calls.cancel(rig.ctl, handle)
    rig.turn()
    rig.serve(fail=lambda p: GUILTY if p.remote == THERE else OK)
    rig.turn()
    assert rig.failures(handle, 8) == dict.fromkeys(range(4), Status.CANCELLED)
    assert sum(rig.totals) == 2


def test_more_slices_than_a_queue_is_deep_can_come_back_at_once():
    """They wait in a list through the slots; a ring as long as the queues are deep had no room for them."""
    rig = rig_of({"gathers": 16}, queue_depth=16, peers=1)
    handle = write(rig, *in_a_row(256))
    rig.turn()
    assert rig.totals == [16]
    rig.serve(fail=lambda p: int(WcStatus.WR_FLUSH_ERR))
    rig.finish(handle)
    assert rig.failures(handle, 256) == {}
    assert rig.counts["retried"] == 256


# ------------------------------------------------------------------------------ every byte
class Ends:
    """Memory on both ends of an emulated NIC in virtual time."""

    SIZE = 1 << 14

    def __init__(self, nic: Nic, **settings) -> None:
        self.rig = Rig(Emulated(nic), bare=True, **{"queue_depth": 64, "chain": 16, **settings})
        stream = np.random.Generator(np.random.Philox(key=[5, 5]))
        self.here = stream.integers(1, 256, self.SIZE, dtype=np.uint8)
        self.there = stream.integers(1, 256, self.SIZE, dtype=np.uint8)
        for memory, table, own in ((self.here, self.rig.state.regions, True), (self.there, self.rig.remote, False)):
            keys = self.rig.provider.register(memory.ctypes.data, self.SIZE, 3 | Access.HELD)
            table.add(memory.ctypes.data, self.SIZE, keys.lkeys if own else keys.rkeys, 7)

    def move(self, opcode, here, there, length) -> int:
        handle = self.rig.requests(self.here.ctypes.data + here, self.there.ctypes.data + there, length, opcode)
        assert handle >= 0
        self.rig.publish(handle)
        self.rig.turn()
        return handle


def placed(length, order, gaps):
    """Where ranges of these lengths begin when they are laid out in this order, with these gaps."""
    start = np.zeros(len(length), np.int64)
    start[order] = np.cumsum(length[order] + gaps) - length[order]
    return start


@given(
    seed=st.integers(0, 1 << 30), n=st.integers(1, 100), gathers=st.integers(1, SLICES_GATHERED),
    signal=st.integers(1, 20), opcode=st.sampled_from([Opcode.WRITE, Opcode.READ]), depth=st.sampled_from([2, 7, 64]),
)  # fmt: skip
def test_every_byte_arrives_and_no_other_is_touched(seed, n, gathers, signal, opcode, depth):
    ends = Ends(Nic(gathers=gathers, signal=signal, latency_ns=100), queue_depth=depth)
    draw = np.random.Generator(np.random.Philox(key=[seed, 9]))
    length = draw.integers(1, 100, n)
    there = placed(length, np.arange(n), draw.integers(0, 2, n) * draw.integers(0, 9, n))  # many side by side
    here = placed(length, draw.permutation(n), draw.integers(0, 9, n))
    expected_here, expected_there = ends.here.copy(), ends.there.copy()
    for h, t, size in zip(here, there, length, strict=True):
        if opcode == Opcode.WRITE:
            expected_there[t : t + size] = ends.here[h : h + size]
        else:
            expected_here[h : h + size] = ends.there[t : t + size]
    ends.move(opcode, here, there, length)
    np.testing.assert_array_equal(ends.here, expected_here)
    np.testing.assert_array_equal(ends.there, expected_there)
    counts = ends.rig.counts
    assert counts["failed"] == counts["stale"] == 0
    assert counts["completions"] <= counts["work_requests"] <= counts["completed"]
    assert_at_rest(ends.rig.state)


@given(
    seed=st.integers(0, 1 << 30), gathers=st.integers(2, SLICES_GATHERED), signal=st.integers(1, 20),
    bad=st.sets(st.integers(0, 59), max_size=4),
)  # fmt: skip
def test_whichever_work_requests_fail_all_slices_arrive_once_each_is_posted_alone(seed, gathers, signal, bad):
    faults = [Fault(at, Action.FAIL, GUILTY) for at in sorted(bad)]
    ends = Ends(Nic(gathers=gathers, signal=signal, faults=faults))
    length = np.full(120, 16, np.int64)
    there, here = 16 * np.arange(120), placed(length, np.random.Generator(np.random.Philox(seed)).permutation(120), 1)
    before = ends.there.copy()
    handle = ends.move(Opcode.WRITE, here, there, length)

    request, why = np.zeros(120, np.int64), np.zeros(120, np.int64)
    failed = set(request[: calls.failures(ends.rig.ctl, handle, request, why, np.zeros((120, 3), np.int64))].tolist())
    assert len(failed) <= len(bad)  # those that a fault struck when they were alone
    for i in range(120):
        expected = before[16 * i : 16 * i + 16] if i in failed else ends.here[here[i] : here[i] + 16]
        np.testing.assert_array_equal(ends.there[16 * i : 16 * i + 16], expected)
    assert_at_rest(ends.rig.state)


def test_an_emulated_nic_says_nothing_of_what_asked_for_no_completion():
    ends = Ends(Nic(signal=16), chain=64, queue_depth=256)
    ends.move(Opcode.WRITE, 17 * np.arange(100), 17 * np.arange(100), np.full(100, 16, np.int64))
    # One chain of 64, one of 36: four completions, then two and the last one's.
    assert ends.rig.counts["completions"] == 4 + 3
    assert ends.rig.counts["completed"] == 100


def test_an_emulated_nic_takes_no_more_ranges_than_it_gathers():
    ends = Ends(Nic(gathers=2))
    ends.rig.rows[0].row["gathers"] = 3
    ends.move(Opcode.WRITE, 20 * np.arange(6), 8 * np.arange(6), np.full(6, 8, np.int64))
    # The first of three is refused, and again, until the last work request has two.
    assert ends.rig.counts["failed"] == 4
    assert ends.rig.counts["completed"] == 2
