"""A worker: its row, its bell, and its turn.

Whoever holds the *turn* of a worker is the worker: the rings' consumer, the only one to touch its endpoints and its
control block. Its own thread holds it while awake. While that thread sleeps on descriptors, another may take the turn
for a moment: a submitter to post a small batch at once, a waiting thread to fetch its answer. To wake the worker would
take longer than such a transfer. Who gives the turn back with work left rings the bell.
"""

from mooncache.kernels.account import account
from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import call_write, fence, futex_wait, futex_wake, i64
from mooncache.kernels.enums import Kind
from mooncache.kernels.jit import kernel
from mooncache.kernels.pool import EVERY_THREAD
from mooncache.kernels.records.base import acquire, compare_swap, fetch_add, release, where
from mooncache.kernels.records.endpoint import endpoint_at
from mooncache.kernels.records.table import table_at
from mooncache.kernels.records.worker import EPOCH_QUIET, worker_at

NS_PER_S = 1_000_000_000
RECHECK_NS = 100_000_000  # a worker whose turn is taken looks this often even if nobody wakes it


@kernel
def worker_row(ctl, index):
    """Return a worker's row."""
    return worker_at(ctl.worker_rows, index)


@kernel
def endpoint_row(ctl, worker, peer):
    """Return the row of the endpoint that worker number `worker` has to a peer."""
    return endpoint_at(ctl.endpoint_rows, worker * ctl.peers + peer)


@kernel
def peer_table(ctl, peer):
    """Return the region table of a peer."""
    return table_at(i64(ctl.peer_tables)[peer])


@kernel
def write_one(ctl, descriptor):
    """Make an eventfd readable."""
    call_write(ctl.write, descriptor, where(ctl, "one"), WORD)


@kernel
def wake_worker(ctl, worker):
    """Ring the bell that the worker's thread sleeps on: a futex, or an eventfd beside its sockets."""
    fetch_add(worker, "bell", 1)
    if acquire(worker, "bell_fd") < 0:
        futex_wake(ctl.syscall, where(worker, "bell"), EVERY_THREAD)
    else:
        write_one(ctl, acquire(worker, "bell_fd"))


@kernel
def ring_bell(ctl, worker):
    """Wake the worker if it sleeps. Dekker's pattern: the caller's push, a fence, then this look at its flag."""
    fence()
    if acquire(worker, "parked") != 0:
        wake_worker(ctl, worker)
        account(ctl, Kind.WAKES, 1)


@kernel
def sleep_on(ctl, bell, seen, ns):
    """Sleep on a futex word while it is `seen`, for at most `ns`."""
    ctl.sleep.seconds = ns // NS_PER_S
    ctl.sleep.ns = ns % NS_PER_S
    futex_wait(ctl.syscall, bell, seen, where(ctl, "sleep"))


@kernel
def try_turn(worker):
    """Take the worker's turn if it is free; return whether that went well."""
    return acquire(worker, "turn") == 0 and compare_swap(worker, "turn", 0, 1) == 0


@kernel
def take_turn(ctl, worker):
    """Take the turn in the worker's thread, after whoever has it.

    What woke this thread may have been meant for that one, which was about to sleep: the bell is rung once more.
    """
    while not try_turn(worker):
        release(worker, "held", 1)
        fence()
        if acquire(worker, "bell_fd") >= 0:
            wake_worker(ctl, worker)
        sleep_on(ctl, where(worker, "turn"), 1, RECHECK_NS)
        release(worker, "held", 0)


@kernel
def end_turn(ctl, worker):
    """Release the turn; from here on this thread holds nothing of the worker's. The caller looks for work left."""
    release(worker, "epoch", EPOCH_QUIET)
    release(worker, "turn", 0)
    fence()
    if acquire(worker, "held") != 0:
        futex_wake(ctl.syscall, where(worker, "turn"), EVERY_THREAD)


@kernel
def cut_off(ctl, endpoint, batch):
    """Return whether nothing of a batch may be posted any more: its peer is gone, or a connection to it ended.

    What was submitted before a peer's fence ended the connections must not land over those that came after.
    """
    table = peer_table(ctl, batch.peer)
    ended = acquire(table, "epoch") != batch.epoch
    return ended or endpoint.lost != 0
