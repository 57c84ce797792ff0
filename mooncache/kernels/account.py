"""Counting work, and telling the time: the two places where the real and the simulated world differ.

In production `account` adds to a counter of the actor; those counters are the metrics. In the simulation it also
turns the actor's virtual clock by the calibrated cost of the work. The same input therefore gives the same counts
in both worlds.
"""

from mooncache.kernels.atomics import call_clock_gettime, peek, poke
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    CLOCK_GETTIME,
    COST_EACH,
    COST_FIXED,
    COUNTERS,
    NOW,
    SCRATCH,
    SPENT,
    VIRTUAL,
    WORD,
)

CLOCK_MONOTONIC = 1
NS_PER_S = 1_000_000_000


@kernel
def word(ctl, field):
    """The control block's word `field`."""
    return peek(ctl + field * WORD)


@kernel
def raise_word(address, amount):
    """Add to a word that only the caller writes."""
    poke(address, peek(address) + amount)


@kernel
def account(ctl, kind, n):
    """Say that `n` units of work of `kind` were done by the actor of `ctl`.

    Writes: the actor's counter; in virtual time also its clock and its time spent on `kind`.
    """
    raise_word(word(ctl, COUNTERS) + kind * WORD, n)
    if word(ctl, VIRTUAL) != 0:
        cost = peek(word(ctl, COST_FIXED) + kind * WORD) + n * peek(word(ctl, COST_EACH) + kind * WORD)
        raise_word(ctl + NOW * WORD, cost)
        raise_word(word(ctl, SPENT) + kind * WORD, cost)


@kernel
def clock(ctl):
    """The actor's time: CLOCK_MONOTONIC in ns, or virtual time in ps."""
    if word(ctl, VIRTUAL) != 0:
        return word(ctl, NOW)
    timespec = ctl + SCRATCH * WORD
    call_clock_gettime(word(ctl, CLOCK_GETTIME), CLOCK_MONOTONIC, timespec)
    return peek(timespec) * NS_PER_S + peek(timespec + WORD)
