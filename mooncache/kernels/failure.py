"""Two decision tables for a work request that failed, and for its slices. Facts in, outcome out.

a work request      its queue breaks, its batch goes on         its queue stays, or its batch is out of time
several slices      HOLD                                        FLUSH: whose fault it is shows when each goes alone
passing             HOLD                                        FLUSH if out of time, else ANSWER
anything else       ANSWER                                      FLUSH if out of time, else ANSWER

a slice             its batch goes on                           its batch was stopped
no room in inbox    FULL                                        FULL
passing             AGAIN while it may be, then FAIL            STOP
key refused         ASK once, then FAIL                         FAIL
peer gone           FAIL                                        STOP if out of time, else FAIL
anything else       FAIL                                        FAIL
"""

from enum import IntEnum

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.jit import kernel
from mooncache.kernels.verbs import WcStatus


class Outcome(IntEnum):
    """The decision on a work request that failed."""

    HOLD = 0  # it stays on its broken queue until the owner of the connection decides
    FLUSH = 1  # its slices are answered as if it had been flushed
    ANSWER = 2  # its slices are answered with its own status


class Fate(IntEnum):
    """The decision on a slice of a work request that failed."""

    AGAIN = 0  # posted again
    ASK = 1  # kept until the peer was asked what it has registered
    STOP = 2  # fails as its batch was stopped: cancelled, closed, or out of time
    FULL = 3  # fails as INBOX_FULL
    FAIL = 4  # fails with `status_of`


@kernel
def passing(wc_status):
    """Return whether the failure says nothing about the slice itself, so that it may be posted again."""
    return (
        wc_status == WcStatus.WR_FLUSH_ERR
        or wc_status == WcStatus.RETRY_EXC_ERR
        or wc_status == WcStatus.RNR_RETRY_EXC_ERR
    )


@kernel
def inbox_full(wc_status, note):
    """Return whether a notification failed because the peer's inbox had no room for it."""
    return note and wc_status == WcStatus.RNR_RETRY_EXC_ERR


@kernel
def outcome_of(wc_status, slices, retries, note, breaks, overdue):
    """Return the Outcome of a work request that failed.

    Args:
        slices: that it carries; a marker carries none.
        retries: how often a slice may be posted again for its own sake.
        note: it carries a notification.
        breaks: its queue breaks by an error.
        overdue: its batch's deadline has passed.
    """
    # Not known which of several slices is to blame: each is posted again, alone. A key is refused for all.
    several = slices > 1 and retries > 0 and wc_status != WcStatus.REM_ACCESS_ERR
    again = passing(wc_status) or (breaks and wc_status == WcStatus.LOC_QP_OP_ERR)  # no way out: its link is down
    if breaks and not overdue and (several or (again and not inbox_full(wc_status, note))):
        return np.int64(Outcome.HOLD)
    if several or (breaks and overdue):
        return np.int64(Outcome.FLUSH)
    return np.int64(Outcome.ANSWER)


@kernel
def fate_of(wc_status, note, stopped, exhausted, askable):
    """Return the Fate of a slice whose work request failed.

    Args:
        note: it is a notification.
        stopped: Status that its batch was stopped with, 0 while it goes on.
        exhausted: it is to blame, and was posted again as often as it may be.
        askable: asking the peer may help: there is a looker, and it was not asked for this slice yet.
    """
    if inbox_full(wc_status, note):
        return np.int64(Fate.FULL)
    if stopped != 0:
        given_back = stopped == Status.TIMED_OUT and wc_status == WcStatus.REM_ABORT_ERR
        return np.int64(Fate.STOP if passing(wc_status) or given_back else Fate.FAIL)
    if passing(wc_status) and not exhausted:
        return np.int64(Fate.AGAIN)
    if wc_status == WcStatus.REM_ACCESS_ERR and askable:
        return np.int64(Fate.ASK)
    return np.int64(Fate.FAIL)


@kernel
def status_of(wc_status):
    """Return the Status that a failed work request's slice gets."""
    if wc_status == WcStatus.REM_ACCESS_ERR:
        return np.int64(Status.REMOTE_ACCESS)
    if wc_status == WcStatus.REM_INV_REQ_ERR or wc_status == WcStatus.REM_OP_ERR:
        return np.int64(Status.REMOTE_ERROR)
    if wc_status == WcStatus.RETRY_EXC_ERR or wc_status == WcStatus.RNR_RETRY_EXC_ERR:
        return np.int64(Status.RETRIES_EXCEEDED)
    if wc_status == WcStatus.WR_FLUSH_ERR:
        return np.int64(Status.FLUSHED)
    if wc_status == WcStatus.REM_ABORT_ERR:
        return np.int64(Status.PEER_GONE)
    return np.int64(Status.LOCAL_ERROR)
