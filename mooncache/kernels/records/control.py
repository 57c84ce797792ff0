"""The control block: the one argument that every kernel takes is its address.

Each actor of an engine (a calling thread, a worker, the reaper) has one of its own: the addresses in it are the same,
the counters, the clock and the scratch space are the actor's, so that no two threads ever write one counter.

    control block (one an actor)          arrays (one each an engine)
    +--------------------------+          +-------------------------------------+
    | slice_source ............+--------> | int64[capacity]                     |
    | chunk_next ..............+--------> | int64[chunks]                       |
    | shared ..................+--------> | words that several actors write     |
    | now, counters, sleep     |          +-------------------------------------+
    +--------------------------+
"""

import numpy as np

from mooncache.kernels.records.base import IDLE, TIMESPEC, record_at, row
from mooncache.kernels.records.operands import CURSOR, OPERANDS, SEEN

REQUEST = np.dtype([("source", np.int64), ("target", np.int64), ("length", np.int64)])  # of a batch of one

# Slices: addresses of arrays; row `slot`. Written by the submitter until the batch is sealed, then by its worker, then
# by who frees it.
SLICES = [
    ("slice_source", np.int64),  # int64[capacity]   local address, bytes
    ("slice_target", np.int64),  # int64[capacity]   remote address, bytes
    ("slice_length", np.int64),  # int32[capacity]   bytes
    ("slice_first", np.int64),  # int32[capacity]   first request it carries bytes of
    ("slice_last", np.int64),  # int32[capacity]   last request it carries bytes of
    ("slice_local", np.int64),  # int16[capacity]   slot of the local region
    ("slice_remote", np.int64),  # int16[capacity]   slot of the remote region in the peer's table
    ("slice_state", np.int64),  # int16[capacity]   Slice, or the Status it failed with
    ("slice_attempts", np.int64),  # int8[capacity]    times posted again, n, or ~n once its peer was asked for it
    ("slice_next", np.int64),  # int32[capacity]   next slice of those to post again, -1; meaningful while it is one
    ("slice_object", np.int64),  # int64[capacity]   heap store only: address of the slice object
]
# Chunks of 256 slots: addresses of arrays.
CHUNKS = [
    ("chunk_next", np.int64),  # int64[chunks]     next in its chain or in the free list, -1 at the end
    ("chunk_previous", np.int64),  # int64[chunks]     previous in its chain, -1 at the start
    ("chunk_batch", np.int64),  # int64[chunks]     batch slot it belongs to
    ("chunk_slices", np.int64),  # int64[chunks]     slots in use
    ("chunk_live", np.int64),  # int64[chunks]     of those, not yet freed one by one
]
# Everything else, likewise by its address.
REST = [
    ("batch_rows", np.int64),  # BATCH[batches]
    ("batch_link", np.int64),  # int64[batches]    free list
    (
        "peer_tables",
        np.int64,
    ),  # int64[peers]      address of the peer's region table; of one that no submit names, if none
    ("endpoint_rows", np.int64),  # ENDPOINT[workers, peers]
    ("worker_rows", np.int64),  # WORKER[workers]
    ("retired_ring", np.int64),  # ring of batch slots that the reaper or an epoch frees
    ("local_table", np.int64),  # region table of this engine
    ("notes", np.int64),  # uint8[batches, note_stride]: the notification of each batch that has one
    ("shared", np.int64),  # SHARED
]
FIXED = [  # when the engine opens
    ("capacity", np.int64),  # slots
    ("note_stride", np.int64),  # bytes of the longest notification as it travels
    ("chunks", np.int64),
    ("batches", np.int64),
    ("peers", np.int64),
    ("workers", np.int64),
    ("store", np.int64),  # Store
    ("policy", np.int64),  # Policy
    ("slice_bytes", np.int64),
    ("tail_bytes", np.int64),
    ("chain", np.int64),  # work requests behind one doorbell
    ("poll_lot", np.int64),
    ("retries", np.int64),
    ("cache_slices", np.int64),
    ("reaper_lot", np.int64),  # slices
    ("reaper_period", np.int64),  # ns
    ("spin", np.int64),  # ns
    ("event_fd", np.int64),  # eventfd that awaiting event loops watch, or -1
    ("look_fd", np.int64),  # eventfd that the engine's looker sleeps on, or -1
    ("one", np.int64),  # 1: what is written to an eventfd
    ("virtual", np.int64),  # 1: time is `now`, turned by account; 0: time is the clock's
]
# Functions by address.
FUNCTIONS = [
    ("clock_gettime", np.int64),
    ("syscall", np.int64),
    ("write", np.int64),
    ("malloc", np.int64),  # 0: heap objects are accounted for, not made (the simulation)
    ("free", np.int64),
    ("turn", np.int64),  # function(ctl of a worker, batch row or 0); see kernels/hand.py
    ("save_thread", np.int64),  # PyEval_SaveThread: gives the GIL up; 0: nobody waits for it (the simulation)
    ("restore_thread", np.int64),  # PyEval_RestoreThread: takes it again
]
ACTOR = [
    ("actor", np.int64),  # index of its worker row, or -1
    ("now", np.int64),  # virtual time, ps
    ("horizon", np.int64),  # virtual time that this actor may not pass, ps
    ("next_completion", np.int64),  # virtual only: function(cq) -> time of the oldest completion, ps
    ("counters", np.int64),  # address of int64[KINDS]
    ("spent", np.int64),  # address of int64[KINDS]  virtual time per kind, ps
    ("cost_fixed", np.int64),  # address of int64[KINDS]  ps per call of account; virtual only
    ("cost_each", np.int64),  # address of int64[KINDS]  ps per unit; virtual only
    ("time_freeing", np.int64),  # time inside reclaim, ns (virtual: ps)
    ("time_busy", np.int64),  # worker: time with work, ns (virtual: ps)
    ("cache_first", np.int64),  # thread_cache on the pool: chain of chunks kept for this thread, -1 when empty
    ("cache_count", np.int64),  # thread_cache: slices kept, chunks x 256 or heap objects
    ("cache_objects", np.int64),  # thread_cache on the heap: address of int64[cache_slices], slice objects kept
    ("timespec", TIMESPEC),  # scratch of `clock`
    ("bad_wr", np.int64),  # what post_send refused
    ("request", REQUEST),  # the operands of `submit_one`
    ("operands", OPERANDS),  # of the submit under way, as these:
    ("here", SEEN),  # the local region of the last slice
    ("there", SEEN),  # the peer's
    ("cursor", CURSOR),  # where the next slice goes
    ("sleep", TIMESPEC),  # scratch of who sleeps: all that a worker's thread may write without its turn
    ("waits", IDLE),  # of a thread that waits for a batch
    ("refused", np.int64),  # index of the request that the last refused submit stumbled over
    ("work_requests", np.int64),  # worker: address of ibv_send_wr[chain]
    ("gathers", np.int64),  # worker: address of ibv_sge[chain x SLICES_GATHERED]
    ("completions", np.int64),  # worker: address of ibv_wc[poll_lot]
]
CONTROL = row([*SLICES, *CHUNKS, *REST, *FIXED, *FUNCTIONS, *ACTOR])
control_at = record_at(CONTROL)
