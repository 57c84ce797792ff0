"""Peers anywhere: every slice travels in frames over TCP connections."""

import numpy as np

from mooncache.kernels.atomics import peek, poke
from mooncache.kernels.jit import callback
from mooncache.kernels.verbs import CQ_CQ_CONTEXT, WR_NEXT
from mooncache.providers.device import queue_of
from mooncache.providers.stream.lane import Route
from mooncache.providers.stream.poll import push_lanes, turn_lanes
from mooncache.providers.stream.provider import (
    StreamProvider,
    answer_poll,
    answer_push,
    list_lanes,
    post_entry,
    refusal,
    report_all,
)


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Queue each work request for the lanes; ENOMEM when the queue is full, EAGAIN while it is renewed."""
    queue, error = queue_of(qp), np.int32(0)
    while wr != 0 and error == 0:
        if post_entry(queue, wr, Route.LANE):
            wr = peek(wr + WR_NEXT)
        else:
            poke(bad_wr, wr)
            error = refusal(queue)
    list_lanes(queue)
    return error


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Move bytes on all lanes of this worker, then report what is answered."""
    port = peek(cq + CQ_CQ_CONTEXT)
    moved = turn_lanes(port)
    return answer_poll(report_all(port, np.int64(entries), wc), moved)


@callback("int32(int64, int32, int64)")
def push(qp, posted, wc):
    """Send what was posted last, if it can be sent now. See `verbs.push`."""
    queue = queue_of(qp)
    return answer_push(queue, posted, wc, push_lanes(queue, posted))


class Tcp(StreamProvider):
    """Engines of other processes and hosts, over TCP."""

    name = "tcp"
    post_send = post_send
    poll_cq = poll_cq
    push = push
