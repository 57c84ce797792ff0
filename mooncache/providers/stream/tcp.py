"""The tcp wire reaches peers anywhere: every slice travels in frames over TCP connections."""

import numpy as np

from mooncache.kernels.atomics import poke
from mooncache.kernels.jit import callback
from mooncache.kernels.records.base import address, missing
from mooncache.kernels.records.verbs import send_wr_at
from mooncache.providers.device import port_of, queue_of
from mooncache.providers.stream.lane import Route
from mooncache.providers.stream.poll import push_lanes, turn_lanes
from mooncache.providers.stream.provider import StreamProvider
from mooncache.providers.stream.queue import answer_poll, answer_push, list_lanes, post_entry, refusal, report_all
from mooncache.providers.stream.records import port_at, queue_at


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Queue each work request for the lanes; ENOMEM when the queue is full, EAGAIN while it is renewed."""
    queue, error = queue_at(queue_of(qp)), np.int32(0)
    wr = send_wr_at(wr)
    while not missing(wr) and error == 0:
        if post_entry(queue, wr, Route.LANE):
            wr = send_wr_at(wr.next)
        else:
            poke(bad_wr, address(wr))
            error = refusal(queue)
    list_lanes(queue)
    return error


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Move bytes on all lanes of this worker, then report what is answered."""
    port = port_at(port_of(cq))
    moved = turn_lanes(port)
    return answer_poll(report_all(port, np.int64(entries), wc), moved)


@callback("int32(int64, int32, int64)")
def push(qp, posted, wc):
    """Send what was posted last, if it can be sent now. See `verbs.push`."""
    queue = queue_at(queue_of(qp))
    return answer_push(queue, posted, wc, push_lanes(queue, posted))


class Tcp(StreamProvider):
    """Engines of other processes and hosts, over TCP."""

    name = "tcp"
    post_send = post_send
    poll_cq = poll_cq
    push = push
