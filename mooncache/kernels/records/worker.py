"""A worker's row."""

import numpy as np

from mooncache.kernels.records.base import ENDS, IDLE, record_at, row

EPOCH_QUIET = (1 << 62) - 1
WORKER = row(
    [
        ("cqs", np.int64),  # address of the rows of its completion queues
        ("ring", np.int64),  # address of the ring of batches submitted to it
        ("bell", np.int64),  # futex
        ("parked", np.int64),  # 1: asleep on the bell
        ("epoch", np.int64),  # epoch at the start of its round; EPOCH_QUIET while asleep
        ("outstanding", np.int64),  # work requests posted, all endpoints
        ("queued", np.int64),  # batches with slices to post
        ("next_deadline", np.int64),  # when a batch of its may have to be stopped, ns; 0: never
        ("retry", ENDS),  # slices to post again
        ("turn", np.int64),  # 1: somebody is this worker, see kernels/worker.py; also the futex of its own thread
        ("held", np.int64),  # 1: that thread waits for its turn
        ("epoll", np.int64),  # epoll set that the thread sleeps on, or -1: it sleeps on the bell
        ("bell_fd", np.int64),  # eventfd in that set, or -1
        ("serves", np.int64),  # 1: poll even with nothing outstanding, since peers may want something
        ("ctl", np.int64),  # address of the worker's control block
        ("notes", np.int64),  # batches with a notification, all endpoints
        ("idle", IDLE),
        ("cq_count", np.int64),
        ("queues", np.int64),  # address of int64[]: its queue rows by index
        ("queue_count", np.int64),
        ("orders", np.int64),  # orders given to its queues and not yet seen; anyone
        ("spins", np.int64),  # 1: no descriptor tells of completions, so it polls while there is anything in flight
        ("trouble_fd", np.int64),  # eventfd that is written to when a queue's state changes, or -1
        ("undecided", np.int64),  # queues that are broken or drained
        ("peers", np.int64),  # highest peer it has had batches for, + 1
        ("owes", np.int64),  # 1: a queue may need a marker, see `post.post_markers`
        ("kept", ENDS),  # slices that wait for their peer to be asked; see kernels/look.py
        ("looked", np.int64),  # 1: one was asked; set by the looker
    ]
)
worker_at = record_at(WORKER)
