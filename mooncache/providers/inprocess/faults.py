"""The faults of an emulated NIC: a plan, drawn from a seed or written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from mooncache.errors import UsageError
from mooncache.kernels.verbs import WcStatus

PS_PER_NS = 1000


class Action(IntEnum):
    """The fate of a work request in a fault plan, and what its value means."""

    DELAY = 0  # ps later; those behind it on the queue wait too
    FAIL = 1  # WcStatus it ends with; its bytes do not move
    FLUSH = 2  # the queue breaks: this and all outstanding end as flushed, then it works again
    REORDER = 3  # its completion changes places with the one this many before it


@dataclass(frozen=True)
class Fault:
    """One fault: `at` counts the NIC's work requests from 0."""

    at: int
    action: Action
    value: int = 0


def random_faults(
    seed: int, work_requests: int, *, delay: float = 0, fail: float = 0, flush: float = 0, reorder: float = 0,
    delay_ns: int = 100_000, window: int = 16,
) -> list[Fault]:  # fmt: skip
    """Draw a plan from `seed`: each of the first `work_requests` suffers at most one fault, with these chances."""
    stream = np.random.Generator(np.random.Philox(key=[seed, 0]))
    chances = np.cumsum([delay, fail, flush, reorder])
    if chances[-1] > 1 or min(delay, fail, flush, reorder) < 0:
        raise UsageError(f"chances must be >= 0 and sum to at most 1, got {[delay, fail, flush, reorder]}")
    drawn, amounts = stream.random(work_requests), stream.integers(1, window + 1, work_requests)
    causes = [WcStatus.RETRY_EXC_ERR, WcStatus.REM_OP_ERR, WcStatus.LOC_PROT_ERR, WcStatus.REM_ACCESS_ERR]
    plan = []
    for at in np.flatnonzero(drawn < chances[-1]):
        action = Action(int(np.searchsorted(chances, drawn[at], side="right")))
        amount = int(amounts[at])
        value = {
            Action.DELAY: delay_ns * PS_PER_NS,
            Action.FAIL: int(causes[amount % len(causes)]),
            Action.FLUSH: 0,
            Action.REORDER: amount,
        }[action]
        plan.append(Fault(int(at), action, value))
    return plan
