"""The rows of a queue pair and of a completion queue, as their worker sees them.

Written by the worker, but `order` by whoever gives one, and all of a queue's row by `State.connect` while it is closed.
"""

import numpy as np

from mooncache.kernels.records.base import record_at, row

QUEUE = row(
    [
        ("head", np.int64),  # work requests ever posted; the low half is the next one's sequence number
        ("tail", np.int64),  # of those, how many are answered without a gap
        ("qp", np.int64),  # ibv_qp address
        ("entries", np.int64),  # address of int64[mask + 1]: what is in flight, see kernels/queue.py
        ("mask", np.int64),
        ("depth", np.int64),  # most work requests in flight: its credits
        ("loose", np.int64),  # work requests since the last one that asked for a completion
        ("tag", np.int64),  # index << 48 | incarnation << 32: upper half of its work requests' ids
        ("cq", np.int64),  # address of the row of its completion queue
        ("lkeys", np.int64),  # offset of its NIC's keys in the local table's, bytes
        ("rkeys", np.int64),  # the same in the peer's table
        ("signal", np.int64),  # a completion is asked for every so many work requests
        ("gathers", np.int64),  # most slices of one work request
        ("inline", np.int64),  # bytes up to which a write carries its data in the work request
        ("weight", np.int64),  # share of the load it should have, 1 to WEIGHT_ONE
        ("breaks", np.int64),  # 1: any error breaks it, as a NIC's; 0: a software wire's goes on
        ("state", np.int64),  # QueueState
        ("order", np.int64),  # Order
        ("cause", np.int64),  # wc_status of the error that broke it
        ("endpoint", np.int64),  # address of its endpoint's row
        ("cut", np.int64),  # where nothing breaks it: address of a word set to 1 to get back what is in flight, or 0
        ("renewals", np.int64),  # its peer's table's when a chain was posted last
        (
            "renewed_from",
            np.int64,
        ),  # `head` when these rose last: what is posted since carries the keys since
        ("push", np.int64),  # software wires that a submitter may push at once: the address of `verbs.push`, else 0
    ]
)
WEIGHT_ONE = 1024

CQ = row(
    [
        ("address", np.int64),  # ibv_cq
        ("credits", np.int64),  # completions it still has room for
    ]
)
queue_at, cq_at = record_at(QUEUE), record_at(CQ)
