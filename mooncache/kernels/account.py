"""Counting work, and telling the time: the two places where the real and the simulated world differ.

In production `account` adds to a counter of the actor; those counters are the metrics. In the simulation it also
turns the actor's virtual clock by the calibrated cost of the work. The same input therefore gives the same counts
in both worlds.
"""

import numpy as np

from mooncache.kernels.atomics import call_clock_gettime, i64
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import where

CLOCK_MONOTONIC = 1
NS_PER_S = 1_000_000_000


@kernel
def account(ctl, kind, n):
    """Count `n` units of work of `kind` for the actor of `ctl`.

    Writes: the actor's counter; in virtual time also its clock and its time spent on `kind`.
    """
    at = np.int64(kind)
    i64(ctl.counters)[at] += n
    if ctl.virtual != 0:
        cost = i64(ctl.cost_fixed)[at] + n * i64(ctl.cost_each)[at]
        ctl.now += cost
        i64(ctl.spent)[at] += cost


@kernel
def clock(ctl):
    """Return the actor's time: CLOCK_MONOTONIC in ns, or virtual time in ps."""
    if ctl.virtual != 0:
        return ctl.now
    call_clock_gettime(ctl.clock_gettime, CLOCK_MONOTONIC, where(ctl, "timespec"))
    return ctl.timespec.seconds * NS_PER_S + ctl.timespec.ns
