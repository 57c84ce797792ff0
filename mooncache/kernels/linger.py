"""Yielding the core for a moment before going to sleep, on a wire of sockets.

A peer's answer mostly comes within microseconds. A thread that sleeps until then is woken on the core of its waker, and
then both ends share one core while another idles: half the speed. A thread that yields keeps its place. But beside a
thread that computes, a yield costs a time slice, milliseconds, and a sleeper is woken at once: so a bad yield makes the
thread sleep right away for a number of idle moments, more each time.
"""

from mooncache.kernels.account import clock, raise_word, word
from mooncache.kernels.atomics import peek, poke
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import IDLE_BAD, IDLE_PENALTY, IDLE_SINCE, SPIN, SYSCALL, WORD
from mooncache.kernels.linux import sched_yield

YIELD_NS = 500_000  # a yield that took longer met a thread that computes
PENALTY, PENALTY_MOST = 64, 1 << 16  # idle moments


@kernel
def lingers(ctl, idle):
    """Let others have the core for a moment; False when it is time to sleep. `idle`: the thread's words, IDLE_SINCE on.

    The thread clears IDLE_SINCE whenever something has happened.
    """
    now, since = clock(ctl), peek(idle + IDLE_SINCE * WORD)
    if since == 0:
        poke(idle + IDLE_SINCE * WORD, now)
        if peek(idle + IDLE_BAD * WORD) > 0:
            raise_word(idle + IDLE_BAD * WORD, -1)
            return False
    elif now - since > word(ctl, SPIN):
        poke(idle + IDLE_PENALTY * WORD, peek(idle + IDLE_PENALTY * WORD) // 2)
        return False
    sched_yield(word(ctl, SYSCALL))
    if clock(ctl) - now > YIELD_NS:
        penalty = min(max(2 * peek(idle + IDLE_PENALTY * WORD), PENALTY), PENALTY_MOST)
        poke(idle + IDLE_PENALTY * WORD, penalty)
        poke(idle + IDLE_BAD * WORD, penalty)
        return False
    return True
