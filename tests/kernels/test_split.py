"""Splitting and coalescing: many requests at once agree with the oracle's one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.errors import Status
from mooncache.kernels import calls, enums, waits
from mooncache.kernels.enums import Access, Opcode
from mooncache.kernels.settings import Settings
from mooncache.kernels.state import Block, State
from mooncache.kernels.submit import prepare
from mooncache.kernels.tables import RegionTable
from mooncache.limits import CHUNK_SLICES, KiB
from tests.helpers import Rig, assert_same
from tests.kernels import entries
from tests.oracles import Cut, Range, Refused, cut_or_refuse

HERE, THERE = 1 << 40, 1 << 41


def make(local, remote, slice_bytes=64 * KiB, **settings):
    """A rig with these regions: (offset, length[, access]). Returns it with the oracle's view of them."""
    rig = Rig(bare=True, slice_bytes=slice_bytes, **settings)
    ours = [
        Range(HERE + o, HERE + o + n, rig.state.regions.add(HERE + o, n, (0,), *(access or [7])), *(access or [7]))
        for o, n, *access in local
    ]
    theirs = []
    for o, n, *access in remote:
        bits = access[0] if access else 3
        theirs.append(Range(THERE + o, THERE + o + n, rig.remote.add(THERE + o, n, (0,), bits), bits))
    return rig, ours, theirs


def slices_of(rig, handle):
    """What the kernel wrote, in order of the chain."""
    columns = [
        rig.array(field)
        for field in (
            "slice_source", "slice_target", "slice_length", "slice_first", "slice_last", "slice_local", "slice_remote",
        )
    ]  # fmt: skip
    state, attempts = rig.array("slice_state"), rig.array("slice_attempts")
    used, found, chunk = rig.array("chunk_slices"), [], int(rig.batch(handle)["first"])
    while chunk >= 0:
        for slot in range(chunk * CHUNK_SLICES, chunk * CHUNK_SLICES + int(used[chunk])):
            found.append(Cut(*[int(column[slot]) for column in columns]))
            assert state[slot] == enums.Slice.WAITING
            assert attempts[slot] == 0
        chunk = int(rig.state.chunk_next[chunk])
    return found


def check(rig, ours, theirs, requests, opcode=Opcode.WRITE, scalar=False):
    """Kernel and oracle agree on these requests (offsets), slices or refusal. `scalar`: one length holds for all."""
    requests = [(HERE + s, THERE + t, n) for s, t, n in requests]
    columns = [list(c) for c in zip(*requests, strict=True)] if requests else [[], [], []]
    needs = Access.READ if opcode == Opcode.READ else Access.WRITE
    before = rig.snapshot()
    handle = rig.requests(*columns[:2], columns[2][:1] if scalar and requests else columns[2], opcode)
    expected = cut_or_refuse(requests, ours, theirs, slice_bytes=rig.state.settings.slice_bytes, needs=needs)
    if isinstance(expected, Refused):
        assert handle == -expected.status
        assert calls.refused_request(rig.ctl) == expected.request
        assert_same(before, rig.snapshot())
        return None
    if len(expected) > rig.state.settings.slices:
        assert handle == -Status.TOO_LARGE
        assert_same(before, rig.snapshot())
        return None
    assert handle >= 0
    assert slices_of(rig, handle) == expected
    assert rig.batch(handle)["slices"] == len(expected)
    assert rig.counts["slices_filled"] == len(expected)
    assert rig.counts["requests"] == len(requests)
    return expected


# ------------------------------------------------------------------------------ many at once
def layouts(draw, most):
    """Regions with and without gaps between them, as (offset, length)."""
    at, regions = 0, []
    for gap, length in draw(
        st.lists(st.tuples(st.sampled_from([0, 0, 1, 50]), st.integers(1, most)), min_size=1, max_size=5)
    ):
        at += gap
        regions.append((at, length))
        at += length
    return regions, at


@st.composite
def cases(draw):
    slice_bytes = draw(st.sampled_from([1, 4, 16, 64]))
    local, local_end = layouts(draw, 300)
    remote, remote_end = layouts(draw, 300)
    local = [(o, n, draw(st.sampled_from([7, 7, 7, 1]))) for o, n in local]  # 1: read-only memory
    remote = [(o, n, draw(st.sampled_from([3, 3, 3, 1, 2]))) for o, n in remote]
    requests: list[tuple[int, int, int]] = []
    for _ in range(draw(st.integers(0, 12))):
        length = draw(st.one_of(st.integers(1, 40), st.sampled_from([1, slice_bytes, slice_bytes * 5 // 4, 150])))
        if draw(st.integers(0, 60)) == 0:
            length = draw(st.sampled_from([0, -1, (1 << 40) + 1]))
        source, target = draw(st.integers(0, local_end)), draw(st.integers(0, remote_end))
        if requests:
            s, t, n = requests[-1]
            kind = draw(st.sampled_from(["both", "both", "source", "target", "neither"]))
            source = s + n if kind in ("both", "source") else source
            target = t + n if kind in ("both", "target") else target
        if draw(st.booleans()):  # mostly inside
            length = max(1, min(length, local_end - source, remote_end - target))
        requests.append((source, target, length))
    return local, remote, slice_bytes, requests, draw(st.sampled_from([Opcode.WRITE, Opcode.READ]))


@pytest.mark.fuzz
@given(cases())
def test_many_requests_at_once_agree_with_the_oracle(case):
    local, remote, slice_bytes, requests, opcode = case
    check(*make(local, remote, slice_bytes), requests, opcode)


@pytest.mark.fuzz
@given(st.data())
def test_runs_inside_one_region_agree_with_the_oracle(data):
    """Nothing is refused here: long runs, every tail length, and chunks that fill up."""
    slice_bytes = data.draw(st.sampled_from([1, 8, 64]))
    rig, ours, theirs = make([(0, 1 << 20)], [(0, 1 << 20)], slice_bytes, slices=4096)
    requests, source, target = [], 0, 0
    for length in data.draw(st.lists(st.integers(1, 200), max_size=60)):
        requests.append((source, target, length))
        both, one = data.draw(st.integers(0, 3)), data.draw(st.booleans())
        source += length + (0 if both or one else 1)
        target += length + (0 if both or not one else 1)
    assert check(rig, ours, theirs, requests) is not None


STRIDE, LAST = 64, 640
KINDS = ["joined", "longer", "long", "empty", "here", "there", "outside"]


@pytest.mark.fuzz
@given(
    st.integers(0, LAST),
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.integers(0, LAST - 1), st.sampled_from(KINDS)), max_size=4),
    st.booleans(),
)
def test_scattered_requests_with_a_few_odd_ones_among_them_agree_with_the_oracle(n, seed, odd, scalar):
    """Lots of plain requests, and what ends a lot: neighbours, other lengths, other regions, refusals."""
    span = LAST * STRIDE
    regions = [(0, span), (span, span), (3 * span, span)]
    rig, ours, theirs = make(regions, regions, 32, slices=4096)
    chance = np.random.default_rng(seed)
    source, target = chance.permutation(LAST)[:n] * STRIDE, chance.permutation(LAST)[:n] * STRIDE
    length = np.full(n, 16) if scalar else chance.integers(1, 33, n)
    for position, kind in odd:
        if position >= n or (scalar and kind in ("longer", "long", "empty")):
            continue
        if kind == "joined" and position > 0:
            source[position] = source[position - 1] + length[position - 1]
            target[position] = target[position - 1] + length[position - 1]
        elif kind in ("longer", "long", "empty"):
            length[position] = {"longer": 40, "long": STRIDE, "empty": 0}[kind]
        elif kind == "outside":
            source[position] = 2 * span + 5
        else:
            (source if kind == "here" else target)[position] += span
    requests = list(zip(source.tolist(), target.tolist(), length.tolist(), strict=True))
    check(rig, ours, theirs, requests, scalar=scalar)


# ------------------------------------------------------------------------------ one thing at a time
BIG = [(0, 1 << 24)]


@pytest.mark.parametrize(
    ("length", "pieces"),
    [
        (1, [1]),
        (64 * KiB, [64 * KiB]),
        (80 * KiB, [80 * KiB]),  # the tail of 16 KiB is folded in
        (80 * KiB + 1, [64 * KiB, 16 * KiB + 1]),  # one byte more, and it is not
        (128 * KiB, [64 * KiB, 64 * KiB]),
        (144 * KiB, [64 * KiB, 80 * KiB]),
        (1024 * KiB + 5, [64 * KiB] * 15 + [64 * KiB + 5]),
    ],
)
def test_a_long_request_is_cut_every_64_kib_and_a_short_tail_is_folded_in(length, pieces):
    found = check(*make(BIG, BIG), [(7, 99, length)])
    assert [s.length for s in found] == pieces


def test_requests_adjacent_at_both_ends_become_one_slice():
    found = check(*make(BIG, BIG), [(0, 50, 10), (10, 60, 20), (30, 80, 5)])
    assert [(s.length, s.first, s.last) for s in found] == [(35, 0, 2)]


@pytest.mark.parametrize("second", [(10, 61, 20), (11, 60, 20), (9, 60, 20), (0, 50, 10)])
def test_requests_adjacent_at_one_end_only_stay_apart(second):
    found = check(*make(BIG, BIG), [(0, 50, 10), second])
    assert [(s.first, s.last) for s in found] == [(0, 0), (1, 1)]


def test_requests_that_meet_backwards_stay_apart():
    found = check(*make(BIG, BIG), [(10, 60, 10), (0, 50, 10)])
    assert len(found) == 2


def test_a_run_is_cut_across_its_requests():
    n = 30 * KiB
    found = check(*make(BIG, BIG), [(i * n, i * n, n) for i in range(6)])
    assert [(s.first, s.last) for s in found] == [(0, 2), (2, 4), (4, 5)]


def test_no_slice_crosses_the_end_of_a_local_region():
    found = check(*make([(0, 100), (100, 100)], BIG), [(90, 0, 20)])
    assert [(s.length, s.local) for s in found] == [(10, 0), (10, 1)]


def test_no_slice_crosses_the_end_of_a_remote_region():
    found = check(*make(BIG, [(0, 100), (100, 100)]), [(0, 90, 20)])
    assert [(s.length, s.remote) for s in found] == [(10, 0), (10, 1)]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ((95, 0, 10), Status.SOURCE_NOT_REGISTERED),  # runs out of the region
        ((100, 0, 1), Status.SOURCE_NOT_REGISTERED),  # starts at its end
        ((-1, 0, 1), Status.SOURCE_NOT_REGISTERED),
        ((-HERE, 0, 1), Status.SOURCE_NOT_REGISTERED),  # address 0
        ((-HERE - 5, 0, 10), Status.SOURCE_NOT_REGISTERED),  # below 0
        ((0, 195, 10), Status.TARGET_NOT_REGISTERED),
        ((0, 200, 1), Status.TARGET_NOT_REGISTERED),
        ((0, -THERE - 1, 1), Status.TARGET_NOT_REGISTERED),
        ((0, 0, 0), Status.LENGTH),
        ((0, 0, -1), Status.LENGTH),
        ((0, 0, -(1 << 63)), Status.LENGTH),
        ((0, 0, (1 << 40) + 1), Status.LENGTH),
        ((0, 0, 1 << 40), Status.SOURCE_NOT_REGISTERED),
        ((0, 250, 10), Status.ACCESS_DENIED),
    ],
)
@pytest.mark.parametrize("position", [0, 3])
def test_one_bad_request_refuses_the_call_and_changes_nothing(request_, status, position):
    rig, ours, theirs = make([(0, 100)], [(0, 200), (250, 50, Access.READ)])
    requests = [(i * 10, i * 20, 5) for i in range(5)]
    requests[position] = request_
    assert check(rig, ours, theirs, requests) is None
    before = rig.snapshot()
    source, target, length = (list(c) for c in zip(*requests, strict=True))
    answer = rig.requests([HERE + s for s in source], [THERE + t for t in target], length)
    assert answer == -status
    assert calls.refused_request(rig.ctl) == position
    assert_same(before, rig.snapshot())


def test_a_bad_length_inside_a_run_is_named():
    rig, ours, theirs = make(BIG, BIG)
    assert check(rig, ours, theirs, [(0, 0, 10), (10, 10, 10), (20, 20, 0)]) is None
    assert calls.refused_request(rig.ctl) == 2


def test_reading_needs_read_access_and_writing_write_access():
    for access, opcode, allowed in [
        (Access.READ, Opcode.READ, True),
        (Access.READ, Opcode.WRITE, False),
        (Access.WRITE, Opcode.WRITE, True),
        (Access.WRITE, Opcode.READ, False),
    ]:
        found = check(*make(BIG, [(0, 100, access)]), [(0, 0, 10)], opcode)
        assert (found is not None) == allowed


def test_nothing_is_read_into_read_only_memory():
    local = [(0, 100, Access.READ | Access.LOCAL), (100, 100, Access.READ)]
    assert check(*make(local, BIG), [(0, 0, 10), (90, 50, 20)], Opcode.WRITE) is not None
    assert check(*make(local, BIG), [(0, 0, 10)], Opcode.READ) is not None
    rig, ours, theirs = make(local, BIG)
    assert check(rig, ours, theirs, [(0, 0, 10), (90, 50, 20)], Opcode.READ) is None
    assert calls.refused_request(rig.ctl) == 1


def test_the_refused_request_is_remembered_whatever_the_thread_does_in_between():
    """A batch that is garbage collected closes itself at any moment, and looks at the clock."""
    state = State(Settings(slices=256, batches=2, peers=1))
    block, empty = Block(state), RegionTable("nothing")
    state.connect(0, empty, [])
    operands = [np.full(n, 5, np.int64) for n in (3, 1, 1)]
    operands[0][:] = 1, 2, 3
    assert prepare(block.ctl, 0, Opcode.WRITE, 0, *operands) == -Status.SOURCE_NOT_REGISTERED
    entries.clock(block.ctl)
    assert calls.refused_request(block.ctl) == 0


def test_scalars_hold_for_all_requests():
    rig, *_ = make(BIG, BIG)
    target = np.arange(5) * 100
    handle = rig.requests(HERE + 4, THERE + target, 10)
    assert [(s.source - HERE, s.target - THERE, s.length) for s in slices_of(rig, handle)] == [
        (4, int(t), 10) for t in target
    ]


def test_more_slices_than_the_pool_has_are_refused_for_good():
    rig, *_ = make(BIG, BIG, slices=512)
    before = rig.snapshot()
    assert rig.requests(HERE + np.arange(513) * 2, THERE + np.arange(513) * 2, 1) == -Status.TOO_LARGE
    assert_same(before, rig.snapshot())
    assert rig.requests(HERE + np.arange(512) * 2, THERE + np.arange(512) * 2, 1) >= 0


def test_more_requests_than_a_batch_may_have_are_refused():
    rig, *_ = make(BIG, BIG)
    before = rig.snapshot()
    assert rig.requests(np.full((1 << 22) + 1, HERE), THERE, 1) == -Status.TOO_LARGE
    assert_same(before, rig.snapshot())


def test_too_few_free_slots_refuse_the_call_and_lose_nothing():
    rig, *_ = make(BIG, BIG, slices=1024)
    held = rig.requests(HERE + np.arange(600) * 2, THERE + np.arange(600) * 2, 1)
    free, counts, bell = rig.state.free_slices, rig.counts, waits.capacity_bell(rig.ctl)
    assert rig.requests(HERE + np.arange(300) * 2, THERE + np.arange(300) * 2, 1) == -Status.POOL_EMPTY
    assert rig.state.free_slices == free
    assert rig.counts == counts
    assert waits.capacity_bell(rig.ctl) == bell, "two refused submitters would wake each other for ever"
    assert np.count_nonzero(rig.state.batch_rows["state"]) == 1
    calls.close(rig.ctl, held, True)
    assert rig.requests(HERE + np.arange(1024) * 2, THERE + np.arange(1024) * 2, 1) >= 0
