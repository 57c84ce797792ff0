"""The ring of a queue pair: work requests are appended, travel in lanes, and are reported in the order of posting."""

import numpy as np

from mooncache.kernels.atomics import i64
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import acquire, behind, release
from mooncache.kernels.records.verbs import sge_at
from mooncache.kernels.verbs import EAGAIN, ENOMEM, POLL_AGAIN, WC_BYTES, WcStatus
from mooncache.providers.device import write_completion
from mooncache.providers.stream.lane import PENDING, Broken, LaneState, end_overdue, enlist, entry_of
from mooncache.providers.stream.records import lane_at, queue_at


@kernel
def post_entry(queue, wr, route):
    """Append one work request to the ring; return False when that is full, or the connections are renewed."""
    head, broken = queue.head, acquire(queue, "broken")
    if head - queue.tail >= queue.limit or broken == Broken.RENEWING:
        return False
    sge, entry = sge_at(wr.sg_list), entry_of(queue, head)
    gone = broken == Broken.GONE
    entry.id = wr.wr_id
    entry.local = sge.addr
    entry.remote = wr.remote_addr
    entry.length = np.int64(sge.length)
    entry.opcode = np.int64(wr.opcode)
    entry.key = wr.rkey
    entry.route = route
    entry.status = np.int64(WcStatus.REM_ABORT_ERR) if gone else np.int64(PENDING)
    release(queue, "head", head + 1)
    return True


@kernel
def refusal(queue):
    """Return the errno for a work request that `post_entry` did not take."""
    return np.int32(EAGAIN if acquire(queue, "broken") == Broken.RENEWING else ENOMEM)


@kernel
def list_lanes(queue):
    """Enlist this queue's lanes, so that the next poll looks at what was posted."""
    for i in range(queue.lane_count):
        lane = lane_at(i64(queue.lanes)[i])
        if lane.state == LaneState.LIVE:
            enlist(lane)


@kernel
def report(queue, entries, wc):
    """Write up to `entries` completions, in the order of posting, as far as they are answered; return how many."""
    head, tail = queue.head, queue.tail
    n = np.int64(0)
    while n < entries and tail < head:
        entry = entry_of(queue, tail)
        status = acquire(entry, "status")
        if status == PENDING:
            break
        wc = write_completion(wc, entry.id, status)
        tail += 1
        n += 1
    queue.tail = tail
    return n


@kernel
def report_all(port, entries, wc):
    """Report on all queues of a worker; each poll starts at the next, so that none starves."""
    count, turn, taken = port.count, port.turn, np.int64(0)
    for i in range(count):
        queue = queue_at(i64(behind(port))[(turn + i) % count])
        if acquire(queue, "cut") != 0:
            end_overdue(port, queue)
        if queue.head > queue.tail:
            taken += report(queue, entries - taken, wc + taken * WC_BYTES)
    port.turn = turn + 1
    return taken


@kernel
def answer_poll(taken, moved):
    """Return what poll_cq does: completions, or whether to call again soon."""
    if taken == 0 and moved:
        return np.int32(POLL_AGAIN)
    return np.int32(taken)


@kernel
def answer_push(queue, posted, wc, all_told):
    """Return what push does: completions if nothing else is on the queue, or whether to call poll_cq.

    all_told: descriptors tell of all that is not answered yet.
    """
    alone = queue.head - queue.tail == posted
    if not all_told:
        return np.int32(POLL_AGAIN)
    return np.int32(report(queue, np.int64(posted), wc) if alone else 0)
