"""Region tables: which address ranges are registered, under which key, and what a peer may do there.

Bases ascend, so a range is found by bisection; the last hit is tried first, because requests come in runs over one
layer's buffer (four nanoseconds against twenty, costs.md). A slice keeps the region's slot, which stays the same while
other regions come and go.
"""

import numpy as np

from mooncache.kernels.atomics import i64, peek
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import TABLE_BASES, TABLE_COUNT, TABLE_ENDS, WORD


@kernel
def find(table, address, hint):
    """Position of the region that contains `address`, or -1. `hint`: the position found last, or -1."""
    bases, ends = i64(peek(table + TABLE_BASES * WORD)), i64(peek(table + TABLE_ENDS * WORD))
    count = peek(table + TABLE_COUNT * WORD)
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
