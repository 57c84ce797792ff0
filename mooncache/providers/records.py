"""The records of all software wires: a key of the target's, the beginnings of a queue pair's row and of a port's."""

import numpy as np

from mooncache.kernels.records.base import record_at

KEY = np.dtype(
    [
        ("key", np.int64),  # 0: not in use
        ("base", np.int64),
        ("end", np.int64),
        ("access", np.int64),  # bits of Access
    ]
)  # of one registration; a table has REGIONS_MOST
key_at = record_at(KEY)

QUEUE_FIELDS = [
    ("head", np.int64),  # work requests ever posted; who posts
    ("tail", np.int64),  # of those, how many were reported; the worker
    ("mask", np.int64),  # entries of the ring - 1
    ("limit", np.int64),  # most that are posted and not reported
    ("ring", np.int64),  # address of the wire's entries
    ("keys", np.int64),  # address of the target's KEYs
    ("inbox", np.int64),  # address of the inbox that notifications go to, or 0
    ("sender", np.int64),  # address of who sends them, see kernels/inbox.py
    ("cut", np.int64),  # set to 1 by the kernels to get back what is in flight
]
"""The first fields of a queue pair; a wire's own follow."""

PORT_FIELDS = [
    ("count", np.int64),  # queue pairs
    ("turn", np.int64),  # which of them comes first in the next poll
]
"""The first fields of a worker's side of a wire, to which its completion queue leads. A wire's own fields follow, and
behind the record int64[peers], the addresses of the queue pairs' rows."""
