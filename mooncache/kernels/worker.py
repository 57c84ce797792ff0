"""A worker: its row, its bell, and whose turn it is.

Whoever holds the *turn* of a worker is the worker: the rings' consumer, the only one to touch its endpoints and its
control block. Its own thread holds it while awake. While that thread sleeps on descriptors, another may take the turn
for a moment: a submitter to post a small batch at once, a waiting thread to fetch its answer. To wake the worker would
take longer than such a transfer. Who gives the turn back with work left rings the bell.
"""

from mooncache.kernels.account import account, word
from mooncache.kernels.atomics import add, call_write, cas, fence, futex_wait, futex_wake, load, poke, store
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    ENDPOINT_ROWS,
    ENDPOINT_WORDS,
    EPOCH_QUIET,
    PEERS,
    SLEEPING,
    SYSCALL,
    WORD,
    WORKER_BELL,
    WORKER_BELL_FD,
    WORKER_EPOCH,
    WORKER_HELD,
    WORKER_PARKED,
    WORKER_ROWS,
    WORKER_TURN,
    WORKER_WORDS,
    WRITE,
    Kind,
)
from mooncache.kernels.pool import EVERY_THREAD

NS_PER_S = 1_000_000_000
RECHECK_NS = 100_000_000  # a worker whose turn is taken looks this often even if nobody wakes it


@kernel
def worker_row(ctl, index):
    """Address of a worker's row."""
    return word(ctl, WORKER_ROWS) + index * WORKER_WORDS * WORD


@kernel
def endpoint_row(ctl, worker, peer):
    """Address of the worker's endpoint to a peer."""
    return word(ctl, ENDPOINT_ROWS) + (worker * word(ctl, PEERS) + peer) * ENDPOINT_WORDS * WORD


@kernel
def wake_worker(ctl, row):
    """Ring the bell that the worker's thread sleeps on: a futex, or an eventfd beside its sockets."""
    add(row + WORKER_BELL * WORD, 1)
    if load(row + WORKER_BELL_FD * WORD) < 0:
        futex_wake(word(ctl, SYSCALL), row + WORKER_BELL * WORD, EVERY_THREAD)
    else:
        poke(ctl + SLEEPING * WORD, 1)
        call_write(word(ctl, WRITE), load(row + WORKER_BELL_FD * WORD), ctl + SLEEPING * WORD, WORD)


@kernel
def ring_bell(ctl, row):
    """Wake the worker if it sleeps. Dekker's pattern: the caller's push, a fence, then this look at its flag."""
    fence()
    if load(row + WORKER_PARKED * WORD) != 0:
        wake_worker(ctl, row)
        account(ctl, Kind.WAKES, 1)


@kernel
def sleep_on(ctl, bell, seen, ns):
    """Sleep on a futex word while it is `seen`, for at most `ns`."""
    timespec = ctl + SLEEPING * WORD
    poke(timespec, ns // NS_PER_S)
    poke(timespec + WORD, ns % NS_PER_S)
    futex_wait(word(ctl, SYSCALL), bell, seen, timespec)


@kernel
def try_turn(row):
    """Take the worker's turn if it is free; whether that went well."""
    return load(row + WORKER_TURN * WORD) == 0 and cas(row + WORKER_TURN * WORD, 0, 1) == 0


@kernel
def take_turn(ctl, row):
    """In the worker's thread: take the turn, after whoever has it.

    What woke this thread may have been meant for that one, which was about to sleep: the bell is rung once more.
    """
    while not try_turn(row):
        store(row + WORKER_HELD * WORD, 1)
        fence()
        if load(row + WORKER_BELL_FD * WORD) >= 0:
            wake_worker(ctl, row)
        sleep_on(ctl, row + WORKER_TURN * WORD, 1, RECHECK_NS)
        store(row + WORKER_HELD * WORD, 0)


@kernel
def end_turn(ctl, row):
    """Give the turn back; from here on this thread holds nothing of the worker's. The caller looks for work left."""
    store(row + WORKER_EPOCH * WORD, EPOCH_QUIET)
    store(row + WORKER_TURN * WORD, 0)
    fence()
    if load(row + WORKER_HELD * WORD) != 0:
        futex_wake(word(ctl, SYSCALL), row + WORKER_TURN * WORD, EVERY_THREAD)
