"""A ring of int64 entries: many threads append, one takes; see kernels/ring.py."""

import numpy as np

from mooncache.kernels.records.base import record_at, spread

RING = spread(
    [
        ("tail", np.int64),  # next ticket; producers
        ("head", np.int64),  # next to take; the consumer
        ("mask", np.int64),  # entries - 1; right behind the record come int64[mask + 1], RING_EMPTY where not filled
    ]
)
RING_EMPTY = -(1 << 63)  # never a handle, its complement, or a slot
ring_at = record_at(RING)
