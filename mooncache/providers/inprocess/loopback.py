"""The loopback wire: post_send copies at once to a peer in this process, poll_cq reports it.

The whole engine, no wire.
"""

import numpy as np

from mooncache.kernels.atomics import i64
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.records.base import address, behind, cell_at, missing, record_at
from mooncache.kernels.records.verbs import send_wr_at, sge_at
from mooncache.kernels.verbs import ENOMEM, WC_BYTES
from mooncache.providers.device import Queue, port_of, queue_of, write_completion
from mooncache.providers.inprocess.base import InProcessProvider, move_bytes, port_at, queue_at, send_note

ENTRY = np.dtype([("id", np.int64), ("status", np.int64)])  # wr_id and WcStatus of what is posted
entry_at = record_at(ENTRY)


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Copy each work request's bytes and queue its completion; ENOMEM when the queue is full."""
    queue, wr = queue_at(queue_of(qp)), send_wr_at(wr)
    head, tail = queue.head, queue.tail
    mask, limit = queue.mask, queue.limit
    ring, keys = queue.ring, queue.keys
    while not missing(wr):
        if head - tail >= limit:
            cell_at(bad_wr).value = address(wr)
            queue.head = head
            return np.int32(ENOMEM)
        sge, opcode = sge_at(wr.sg_list), np.int64(wr.opcode)
        local, length = sge.addr, np.int64(sge.length)
        if opcode == Opcode.SEND:
            status = send_note(queue, local, length)
        else:
            local = local if sge.lkey != 0 else -local
            status = move_bytes(queue, keys, wr.rkey, opcode, local, wr.remote_addr, length)
        entry = entry_at(ring, head & mask)
        entry.id = wr.wr_id
        entry.status = status
        head += 1
        wr = send_wr_at(wr.next)
    queue.head = head
    return np.int32(0)


@kernel
def drain(queue, entries, wc):
    """Report up to `entries` completions of one queue; return how many."""
    head, tail = queue.head, queue.tail
    mask, ring = queue.mask, queue.ring
    n = min(entries, head - tail)
    for i in range(n):
        entry = entry_at(ring, (tail + i) & mask)
        wc = write_completion(wc, entry.id, entry.status)
    queue.tail = tail + n
    return n


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Report completions of all queues of this worker, oldest first within each."""
    port = port_at(port_of(cq))
    taken = np.int64(0)
    for i in range(port.count):
        left = np.int64(entries) - taken
        taken += drain(queue_at(i64(behind(port))[i]), left, wc + taken * WC_BYTES)
    return np.int32(taken)


class Loopback(InProcessProvider):
    """Engines of one process, copying in the posting thread."""

    name = "loopback"
    post_send = post_send
    poll_cq = poll_cq
    entry = ENTRY

    def prepare(self, queue: Queue, worker: int) -> None:
        """Do nothing: a queue needs no more fields."""
