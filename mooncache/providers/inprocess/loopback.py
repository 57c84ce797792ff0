"""Peers in the same process: post_send copies at once, poll_cq reports it. No wire, the whole engine."""

import numpy as np

from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import peek, poke, u32
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.verbs import (
    CQ_CQ_CONTEXT,
    ENOMEM,
    SGE_ADDR,
    SGE_LENGTH,
    SGE_LKEY,
    WR_ID,
    WR_NEXT,
    WR_OPCODE,
    WR_REMOTE_ADDR,
    WR_RKEY,
    WR_SG_LIST,
)
from mooncache.providers.device import (
    CQ_COUNT,
    CQ_QUEUES,
    Q_HEAD,
    Q_KEYS,
    Q_LIMIT,
    Q_MASK,
    Q_RING,
    Q_TAIL,
    Queue,
    queue_of,
    write_completion,
)
from mooncache.providers.inprocess.base import InProcessProvider, move_bytes, send_note

ENTRY_ID, ENTRY_STATUS, ENTRY_WORDS = 0, 1, 2


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Copy each work request's bytes and queue its completion; ENOMEM when the queue is full."""
    queue = queue_of(qp)
    head, tail = peek(queue + Q_HEAD * WORD), peek(queue + Q_TAIL * WORD)
    mask, limit = peek(queue + Q_MASK * WORD), peek(queue + Q_LIMIT * WORD)
    ring, keys = peek(queue + Q_RING * WORD), peek(queue + Q_KEYS * WORD)
    while wr != 0:
        if head - tail >= limit:
            poke(bad_wr, wr)
            poke(queue + Q_HEAD * WORD, head)
            return np.int32(ENOMEM)
        sge, opcode = peek(wr + WR_SG_LIST), np.int64(u32(wr + WR_OPCODE)[0])
        local, length = peek(sge + SGE_ADDR), np.int64(u32(sge + SGE_LENGTH)[0])
        if opcode == Opcode.SEND:
            status = send_note(queue, local, length)
        else:
            local = local if u32(sge + SGE_LKEY)[0] != 0 else -local
            status = move_bytes(queue, keys, peek(wr + WR_RKEY), opcode, local, peek(wr + WR_REMOTE_ADDR), length)
        entry = ring + (head & mask) * ENTRY_WORDS * WORD
        poke(entry + ENTRY_ID * WORD, peek(wr + WR_ID))
        poke(entry + ENTRY_STATUS * WORD, status)
        head += 1
        wr = peek(wr + WR_NEXT)
    poke(queue + Q_HEAD * WORD, head)
    return np.int32(0)


@kernel
def drain(queue, entries, wc):
    """Report up to `entries` completions of one queue; returns how many."""
    head, tail = peek(queue + Q_HEAD * WORD), peek(queue + Q_TAIL * WORD)
    mask, ring = peek(queue + Q_MASK * WORD), peek(queue + Q_RING * WORD)
    n = min(entries, head - tail)
    for i in range(n):
        entry = ring + ((tail + i) & mask) * ENTRY_WORDS * WORD
        wc = write_completion(wc, peek(entry + ENTRY_ID * WORD), peek(entry + ENTRY_STATUS * WORD))
    poke(queue + Q_TAIL * WORD, tail + n)
    return n


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Completions of all queues of this worker, oldest first within each."""
    queues = peek(cq + CQ_CQ_CONTEXT)
    taken = np.int64(0)
    for i in range(peek(queues + CQ_COUNT * WORD)):
        left = np.int64(entries) - taken
        taken += drain(peek(queues + (CQ_QUEUES + i) * WORD), left, wc + taken * 48)
    return np.int32(taken)


class Loopback(InProcessProvider):
    """Engines of one process, copying in the posting thread."""

    name = "loopback"
    post_send = post_send
    poll_cq = poll_cq
    entry_words = ENTRY_WORDS

    def prepare(self, queue: Queue, worker: int) -> None:
        """Nothing besides."""
