"""Region tables: which address ranges are registered, under which key, and what a peer may do there.

Bases ascend, so a range is found by bisection; the last hit is tried first, because requests come in runs over one
layer's buffer (four nanoseconds against twenty, costs.md). A slice keeps the region's slot, which stays the same while
other regions come and go.

`insert`, `remove` and `replace` hold the GIL, as calls that look a range up do: a table is never seen half changed. A
call that gives the GIL up meanwhile looks at `changes` afterwards.
"""

import numpy as np

from mooncache.kernels.atomics import i64
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.table import table_at


@kernel
def find(table, address, hint):
    """Return the position of the region that contains `address`, or -1. `hint`: the position found last, or -1."""
    bases, ends = i64(table.bases), i64(table.ends)
    count = table.count
    if 0 <= hint < count and bases[hint] <= address < ends[hint]:
        return hint
    low, high = np.int64(0), count
    while low < high:
        middle = (low + high) // 2
        if bases[middle] <= address:
            low = middle + 1
        else:
            high = middle
    if low > 0 and address < ends[low - 1]:
        return low - 1
    return np.int64(-1)


@kernel("int64(int64, int64, int64, int64, int64)")
def insert(table, at, base, end, slot):
    """Insert a range at position `at`; the table must have room. Return how many ranges there are now."""
    table = table_at(table)
    bases, ends = i64(table.bases), i64(table.ends)
    slots, count = i64(table.slots), table.count
    for i in range(count, at, -1):
        bases[i], ends[i], slots[i] = bases[i - 1], ends[i - 1], slots[i - 1]
    bases[at], ends[at], slots[at] = base, end, slot
    table.count = count + 1
    table.changes += 1
    return count + 1


@kernel
def take_out(table, at):
    """Delete the range at position `at`."""
    bases, ends = i64(table.bases), i64(table.ends)
    slots, count = i64(table.slots), table.count - 1
    for i in range(at, count):
        bases[i], ends[i], slots[i] = bases[i + 1], ends[i + 1], slots[i + 1]
    table.count = count
    table.changes += 1


@kernel("int64(int64, int64[::1], int64[::1], int64[::1])")
def replace(table, bases, ends, slots):
    """Replace all that the table holds by these ranges, ascending. Return how many there are now."""
    table = table_at(table)
    for i in range(bases.size):
        i64(table.bases)[i], i64(table.ends)[i], i64(table.slots)[i] = bases[i], ends[i], slots[i]
    table.count = bases.size
    table.changes += 1
    return table.count


@kernel("int64(int64, int64)")
def remove(table, at):
    """Delete the range at a position, as `take_out` does. Return how many ranges are left."""
    table = table_at(table)
    take_out(table, at)
    return table.count
