"""Yielding the core for a moment before going to sleep, on a wire of sockets.

A peer's answer mostly comes within microseconds. A thread that sleeps until then is woken on the core of its waker, and
then both ends share one core while another idles: half the speed. A thread that yields keeps its place. But beside a
thread that computes, a yield costs a time slice, milliseconds, and a sleeper is woken at once: so a bad yield makes the
thread sleep right away for a number of idle moments, more each time.
"""

from mooncache.kernels.account import clock
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import sched_yield

YIELD_NS = 500_000  # a yield that took longer met a thread that computes
PENALTY, PENALTY_MOST = 64, 1 << 16  # idle moments


@kernel
def lingers(ctl, idle):
    """Yield the core to others for a moment; return False when it is time to sleep. `idle`: the thread's IDLE.

    The thread clears `idle.since` whenever something has happened.
    """
    now, since = clock(ctl), idle.since
    if since == 0:
        idle.since = now
        if idle.bad > 0:
            idle.bad -= 1
            return False
    elif now - since > ctl.spin:
        idle.penalty //= 2
        return False
    sched_yield(ctl.syscall)
    if clock(ctl) - now > YIELD_NS:
        penalty = min(max(2 * idle.penalty, PENALTY), PENALTY_MOST)
        idle.penalty = penalty
        idle.bad = penalty
        return False
    return True
