"""Region lookup by bisection agrees with looking at every region."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache import CapacityError, UsageError
from mooncache.kernels.tables import RegionTable
from mooncache.limits import REGIONS
from tests.kernels import entries
from tests.oracles import Range, region_of

RANGES = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 60)), max_size=12)


def fill(table, ranges):
    """Enter those that overlap nothing; the others must be refused and change nothing."""
    known = []
    for base, length in ranges:
        if any(base < r.end and r.base < base + length for r in known):
            before = table.ranges()
            with pytest.raises(UsageError, match="overlaps the registered region"):
                table.add(base, length, (0,), 3)
            assert table.ranges() == before
        else:
            known.append(Range(base, base + length, table.add(base, length, (0,), 3)))
    return known


@given(RANGES, st.lists(st.tuples(st.integers(-5, 500), st.integers(-1, 14)), max_size=30))
def test_find_agrees_with_looking_at_every_region_whatever_the_hint(ranges, looks):
    table = RegionTable("test")
    known = fill(table, ranges)
    for address, hint in looks:
        at = entries.find(table.header.address, address, hint)
        expected = region_of(known, address)
        assert (at >= 0) == (expected is not None)
        if expected:
            assert (table.bases[at], table.ends[at], table.slots[at]) == expected[:3]


@given(RANGES, st.data())
def test_a_slot_stays_with_its_range_while_others_come_and_go(ranges, data):
    table = RegionTable("test")
    known = fill(table, ranges)
    while known:
        gone = known.pop(data.draw(st.integers(0, len(known) - 1)))
        table.remove(gone.slot)
        assert table.ranges() == [(r.base, r.end - r.base, r.slot) for r in sorted(known)]
        assert entries.find(table.header.address, gone.base, -1) == -1


def test_a_full_table_says_so_and_works_again_after_a_removal():
    table = RegionTable("test")
    slots = [table.add(1 + 10 * i, 5, (0,), 3) for i in range(REGIONS)]
    with pytest.raises(CapacityError, match=f"all {REGIONS} regions are in use"):
        table.add(1 << 40, 5, (0,), 3)
    table.remove(slots[500])
    assert table.add(1 << 40, 5, (0,), 3) == slots[500]
