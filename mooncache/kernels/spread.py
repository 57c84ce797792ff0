"""Spreading: which queue pair the next chain goes to. The one policy of queue pairs and NICs.

A queue's weight is what its path can carry (the link's rate, less where NIC and memory are on different NUMA nodes);
its load is what is in flight on it. The chain goes where it makes the load per weight least, so that equal paths share
evenly, a slower one gets less, one that has fallen behind is spared, and one that is not ready is left out.
"""

import numpy as np

from mooncache.kernels.atomics import i64
from mooncache.kernels.jit import kernel
from mooncache.kernels.queue import in_flight, ready, room
from mooncache.kernels.records.base import missing
from mooncache.kernels.records.queue import WEIGHT_ONE, queue_at


@kernel
def choose(endpoint, n):
    """Return the row of the queue for a chain of `n` work requests; missing when no ready one has room for it.

    A chain longer than half a queue is cut to that: a queue must hold two, or it runs empty in between.
    """
    queues = i64(endpoint.queues)
    best, least = queue_at(0), np.int64(0)
    for i in range(endpoint.count):
        queue = queue_at(queues[i])
        if not ready(queue):
            continue
        wanted = min(n, max(queue.depth // 2, 1))
        if room(queue) < wanted:
            continue
        burden = (in_flight(queue) + wanted) * WEIGHT_ONE // queue.weight
        if missing(best) or burden < least:
            best, least = queue, burden
    return best
