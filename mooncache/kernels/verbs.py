"""The part of the libibverbs ABI that kernels touch (LP64 Linux): byte offsets, sizes and constants.

Every wire is a *provider* in rdma-core's sense: two function pointers in `ibv_context.ops`, reached from any queue
pair or completion queue by its first word. Offsets were compared with the C compiler's for rdma-core 44 and 59.
"""

from enum import IntEnum

from mooncache.kernels.atomics import call_poll_cq, call_post_send
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.verbs import WC, ibv_context_at, ibv_cq_at, ibv_qp_at

WC_BYTES = WC.itemsize
SEND_SIGNALED, SEND_INLINE = 2, 8
EAGAIN = 11  # what post_send answers while its connection is made anew: later, whatever is in flight
ENOMEM = 12  # what post_send answers when its queue is full
EINVAL = 22  # and what to a work request that it can never take
POLL_AGAIN = -11  # what poll_cq of a software wire answers when it moved bytes and has nothing to report yet


class WcStatus(IntEnum):
    """The `ibv_wc_status`: how a work request ended."""

    SUCCESS = 0
    LOC_LEN_ERR = 1
    LOC_QP_OP_ERR = 2
    LOC_PROT_ERR = 4
    WR_FLUSH_ERR = 5
    REM_INV_REQ_ERR = 9
    REM_ACCESS_ERR = 10
    REM_OP_ERR = 11
    RETRY_EXC_ERR = 12
    RNR_RETRY_EXC_ERR = 13
    REM_ABORT_ERR = 16


@kernel
def post_send(qp, wr, bad_wr):
    """Call `ibv_post_send`: 0, or an errno with the first refused work request's address written to `bad_wr`."""
    return call_post_send(ibv_context_at(ibv_qp_at(qp).context).post_send, qp, wr, bad_wr)


@kernel
def push(function, qp, posted, wc):
    """Send or copy at once the `posted` work requests that were posted last to `qp`. Software wires only.

    Moves nothing else, and declines where others wait in front of them. Returns how many completions of theirs were
    written to `wc`, or POLL_AGAIN: `poll_cq` has to go on, and no descriptor tells of it.
    """
    return call_poll_cq(function, qp, posted, wc)


@kernel
def poll_cq(cq, entries, wc):
    """Call `ibv_poll_cq`: how many of up to `entries` completions were written to `wc`."""
    return call_poll_cq(ibv_context_at(ibv_cq_at(cq).context).poll_cq, cq, entries, wc)
