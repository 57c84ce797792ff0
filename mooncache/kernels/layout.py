"""The only place that knows word numbers: what lies where in an engine's memory.

All state is preallocated arrays. A *control block* of int64 words holds their addresses and all scalars; its address,
`ctl`, is the one argument that every kernel takes. Each actor of an engine (a calling thread, a worker, the reaper)
has a control block of its own: the addresses in it are the same, the counters, the clock and the scratch space are
the actor's, so that no two threads ever write one counter.

    control block (one an actor)          arrays (one each an engine)
    +--------------------------+          +-------------------------------------+
    | SLICE_SOURCE ............+--------> | int64[capacity]                     |
    | CHUNK_NEXT ..............+--------> | int64[chunks]                       |
    | SHARED ..................+--------> | words that several actors write     |
    | NOW, COUNTERS, SCRATCH   |          +-------------------------------------+
    +--------------------------+
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress
from enum import IntEnum
from itertools import count

import numpy as np
from numpy.typing import DTypeLike

WORD = 8  # bytes
LINE = 64  # bytes of a cache line
MAP_NORESERVE = 0x4000  # Python has no name for it
MAPPED_BYTES = 1 << 20  # from here on a system call more, and up to a page, are nothing beside the array


class Store(IntEnum):
    """Where slices live: the struct-of-array pool, or one malloc'ed object each as in the upstream engine."""

    POOL = 0
    HEAP = 1


class Policy(IntEnum):
    """Where the deletion of finished slices happens; one file each in `kernels/reclaim/`."""

    LEAK = 0
    INLINE = 1
    ON_CLOSE = 2
    THREAD_CACHE = 3
    DEFERRED = 4
    EPOCH = 5
    BULK = 6


class Opcode(IntEnum):
    """`ibv_wr_opcode` of the one-sided operations."""

    WRITE = 0
    SEND = 2  # a batch's notification
    READ = 4


class BatchState(IntEnum):
    """Where a batch is in its life; moved only by the table in `kernels/batch.py`."""

    FREE = 0
    OPEN = 1
    SEALED = 2
    DRAINING = 3
    RECLAIMABLE = 4


class Slice(IntEnum):
    """State of one slice. A failed slice's state is its `Status` (301 and above)."""

    FREE = 0
    WAITING = 1  # filled, not posted
    POSTED = 2  # the NIC has it
    DONE = 3
    WITHHELD = 4  # a notification that was not sent, because other slices of its batch failed


class Note(IntEnum):
    """What a batch's notification waits for."""

    DATA = 0  # all other slices of its batch
    TURN = 1  # the notifications of batches submitted before
    ANSWER = 2  # it is posted


class Kind(IntEnum):
    """Kinds of work, as `account` counts them. The simulation prices each; production only counts."""

    REQUESTS = 0  # checked and cut
    CHUNKS_ACQUIRED = 1
    SLICES_FILLED = 2
    HEAP_ALLOCATED = 3  # slice objects taken from malloc, with their string
    HEAP_REUSED = 4  # slice objects taken from a thread's cache instead
    BATCHES_SUBMITTED = 5
    BATCHES_TAKEN = 6  # by a worker
    WORK_REQUESTS = 7  # built
    DOORBELLS = 8  # post_send calls
    POLLS = 9  # poll_cq calls
    COMPLETIONS = 10  # entries polled
    COMPLETED = 11  # slices that arrived
    FAILED = 12  # slices that did not
    RETRIED = 13  # slices posted again
    STALE = 14  # completions of slices freed long ago: counted, never applied
    BATCHES_FINISHED = 15
    BATCHES_CLOSED = 16
    SLICES_FREED = 17  # one by one
    CHUNKS_FREED = 18  # as part of a whole chain
    SLICES_DROPPED = 19  # freed with their chain; no work of their own
    HEAP_FREED = 20  # slice objects given to free
    HEAP_CACHED = 21  # slice objects kept in a thread's cache instead
    SLICES_LEAKED = 22
    RETIRED = 23  # batches handed to the reaper or to an epoch
    PARKS = 24
    WAKES = 25


KINDS = len(Kind)
TIMING_KINDS = (Kind.POLLS, Kind.DOORBELLS, Kind.PARKS, Kind.WAKES)
"""Kinds whose counts depend on how threads interleave; all others are a function of the batches alone."""

_word = count()


def _next() -> int:
    return next(_word)


# ------------------------------------------------------------------ arrays: addresses, the same in every block
# Slices; row `slot`. Written by the submitter until the batch is sealed, then by its worker, then by who frees it.
SLICE_SOURCE = _next()  # int64[capacity]   local address, bytes
SLICE_TARGET = _next()  # int64[capacity]   remote address, bytes
SLICE_LENGTH = _next()  # int32[capacity]   bytes
SLICE_FIRST = _next()  # int32[capacity]   first request it carries bytes of
SLICE_LAST = _next()  # int32[capacity]   last request it carries bytes of
SLICE_LOCAL = _next()  # int16[capacity]   slot of the local region
SLICE_REMOTE = _next()  # int16[capacity]   slot of the remote region in the peer's table
SLICE_STATE = _next()  # int16[capacity]   Slice, or the Status it failed with
SLICE_ATTEMPTS = _next()  # int8[capacity]    times posted again, n, or ~n once its peer was asked for it
SLICE_NEXT = _next()  # int32[capacity]   next slice of those to post again, -1; meaningful while it is one
SLICE_OBJECT = _next()  # int64[capacity]   heap store only: address of the slice object
# Chunks of 256 slots.
CHUNK_NEXT = _next()  # int64[chunks]     next in its chain or in the free list, -1 at the end
CHUNK_PREVIOUS = _next()  # int64[chunks]     previous in its chain, -1 at the start
CHUNK_BATCH = _next()  # int64[chunks]     batch slot it belongs to
CHUNK_GENERATION = _next()  # int64[chunks]     times it was released; upper half of a work request's id
CHUNK_SLICES = _next()  # int64[chunks]     slots in use
CHUNK_LIVE = _next()  # int64[chunks]     of those, not yet freed one by one
# Everything else.
BATCH_ROWS = _next()  # int64[batches, BATCH_WORDS]
BATCH_LINK = _next()  # int64[batches]    free list
PEER_TABLES = _next()  # int64[peers]      address of the peer's region table; of one that no submit names, if none
ENDPOINT_ROWS = _next()  # int64[workers, peers, ENDPOINT_WORDS]
WORKER_ROWS = _next()  # int64[workers, WORKER_WORDS]
RETIRED_RING = _next()  # ring of batch slots that the reaper or an epoch frees
LOCAL_TABLE = _next()  # region table of this engine
NOTES = _next()  # uint8[batches, NOTE_STRIDE]: the notification of each batch that has one
SHARED = _next()  # int64[SHARED_WORDS], words that several actors write, one cache line each

# ------------------------------------------------------------------ scalars fixed when the engine opens
CAPACITY = _next()  # slots
NOTE_STRIDE = _next()  # bytes of the longest notification as it travels
CHUNKS = _next()
BATCHES = _next()
PEERS = _next()
WORKERS = _next()
STORE = _next()  # Store
POLICY = _next()  # Policy
SLICE_BYTES = _next()
TAIL_BYTES = _next()
CHAIN = _next()  # work requests behind one doorbell
POLL_LOT = _next()
RETRIES = _next()
CACHE_SLICES = _next()
REAPER_LOT = _next()  # slices
REAPER_PERIOD = _next()  # ns
SPIN = _next()  # ns
EVENT_FD = _next()  # eventfd that awaiting event loops watch, or -1
LOOK_FD = _next()  # eventfd that the engine's looker sleeps on, or -1
VIRTUAL = _next()  # 1: time is the words below, turned by account; 0: time is the clock's
# functions by address
CLOCK_GETTIME = _next()
SYSCALL = _next()
WRITE = _next()
MALLOC = _next()  # 0: heap objects are accounted for, not made (the simulation)
FREE = _next()
TURN = _next()  # function(ctl of a worker, batch row or 0); see kernels/hand.py

# ------------------------------------------------------------------ the actor's own
ACTOR = _next()  # index of its worker row, or -1
NOW = _next()  # virtual time, ps
HORIZON = _next()  # virtual time that this actor may not pass, ps
NEXT_COMPLETION = _next()  # virtual only: function(cq) -> time of the oldest completion, ps
COUNTERS = _next()  # int64[KINDS]
SPENT = _next()  # int64[KINDS]  virtual time per kind, ps
COST_FIXED = _next()  # int64[KINDS]  ps per call of account; virtual only
COST_EACH = _next()  # int64[KINDS]  ps per unit; virtual only
TIME_FREEING = _next()  # time inside reclaim, ns (virtual: ps)
TIME_BUSY = _next()  # worker: time with work, ns (virtual: ps)
CACHE_FIRST = _next()  # thread_cache on the pool: chain of chunks kept for this thread, -1 when empty
CACHE_COUNT = _next()  # thread_cache: slices kept, chunks x 256 or heap objects
CACHE_OBJECTS = _next()  # thread_cache on the heap: int64[CACHE_SLICES] slice objects kept
SCRATCH = _next()  # 6 words: timespec, bad_wr, single-request operands
_SCRATCH_END = [_next() for _ in range(5)]
SLEEPING = _next()  # 2 words of who sleeps or wakes: all that a worker's thread may use without its turn
_SLEEPING_END = _next()
WAITS = _next()  # 3 words, see IDLE_SINCE: of a thread that waits for a batch
_WAITS_END = [_next() for _ in range(2)]
REFUSED = _next()  # index of the request that the last refused submit stumbled over
WORK_REQUESTS = _next()  # worker: ibv_send_wr[CHAIN]
GATHERS = _next()  # worker: ibv_sge[CHAIN x SLICES_GATHERED]
COMPLETIONS = _next()  # worker: ibv_wc[POLL_LOT]
BLOCK_WORDS = -(-_next() // 8) * 8

# ------------------------------------------------------------------ SHARED: one cache line a word
SHARED_FREE_CHUNKS = 0  # tag << 24 | chunk + 1: head of the pool's free list
SHARED_FREE_BATCHES = 8  # the same for batch rows
SHARED_FREE_COUNT = 16  # chunks in the free list
SHARED_BELL = 24  # futex: rises whenever chunks or batch rows come back
SHARED_WAITERS = 32  # threads asleep on it
SHARED_NEXT_WORKER = 40  # round robin of batches over workers
SHARED_EPOCH = 48
SHARED_RETIRED_LOCK = 56  # held by whoever takes from the retired ring
SHARED_STOP = 64  # 1: workers leave when idle; 2: at once
SHARED_REAPER_BELL = 72  # futex
SHARED_REAPER_PARKED = 80
SHARED_LOW = 88  # fewest free chunks ever seen
SHARED_LEAKED_CHUNKS = 96  # tag << 24 | chunk + 1: chunks that the leak policy forgot
SHARED_LEAKED_COUNT = 104
SHARED_REAPER_STOP = 112  # 1: the reaper leaves when it has freed all; set when the workers have left
SHARED_AWAITED = 120  # 1: a coroutine awaits the bell, so the next ring also writes to the engine's eventfd
SHARED_WORDS = 128

# ------------------------------------------------------------------ batch rows
BATCH_STATE = 0  # BatchState; its low half is the futex of waiters
BATCH_GENERATION = 1  # upper half of the handle
BATCH_REMAINING = 2  # slices without an answer; written by the worker
BATCH_SLICES = 3
BATCH_CHUNKS = 4
BATCH_FIRST = 5  # chunk
BATCH_LAST = 6  # chunk
BATCH_PEER = 7
BATCH_OPCODE = 8
BATCH_CURSOR = 9  # chunk that the next slice to post is in, -1 when all are posted
BATCH_OFFSET = 10  # its offset in that chunk
BATCH_POSTED = 11  # work requests outstanding
BATCH_FAILED = 12  # slices failed
BATCH_DEADLINE = 13  # clock, ns; 0 none
BATCH_NEXT = 14  # next batch in the endpoint's queue, -1
BATCH_WORKER = 15
BATCH_WAITERS = 16  # threads asleep on BATCH_STATE
BATCH_AWAITED = 17  # 1: write to EVENT_FD when finished
BATCH_SUBMITTED_AT = 18  # ns (virtual: ps)
BATCH_FINISHED_AT = 19
BATCH_REQUESTS = 20
BATCH_RETIRED_AT = 21  # epoch
BATCH_UNPOSTED = 22  # slices from the cursor on
BATCH_CANCELLED = 23  # 0, or the Status its unposted slices failed with
BATCH_CANCEL_ASKED = 24
BATCH_NOTE = 25  # slot of the slice that carries its notification, or -1
BATCH_NOTE_STATE = 26  # Note
BATCH_NOTE_NEXT = 27  # next batch in the endpoint's queue of those with a notification, -1
BATCH_TAKEN = 28  # 1: its worker knows it
BATCH_EPOCH = 29  # TABLE_EPOCH of its peer when it was submitted
BATCH_LOOK = 30  # number of the look at its peer that its refused slices wait for
BATCH_RENEWALS = 31  # TABLE_RENEWALS of its peer when it was submitted
BATCH_WORDS = 32  # four cache lines, so that two workers never share one

# ------------------------------------------------------------------ endpoint rows: a worker's side of one peer
ENDPOINT_QUEUES = 0  # address of int64[count], its queue rows for data
ENDPOINT_COUNT = 1
ENDPOINT_NOTES = 2  # address of the queue row for notifications; may be one of those for data
ENDPOINT_FIRST = 3  # first batch with slices to post, -1
ENDPOINT_LAST = 4  # right behind the first, see `batch.append`
ENDPOINT_NOTE_FIRST = 5  # first batch with a notification, in the order of submission, -1
ENDPOINT_NOTE_LAST = 6  # right behind the first
ENDPOINT_LOST = 7  # 1: the peer is gone, fail whatever is for it
ENDPOINT_WORDS = 8  # a cache line

# ------------------------------------------------------------------ queue rows: one queue pair
# Written by the worker, but ORDER by whoever gives one, and all of the row by `State.connect` while it is closed.
QUEUE_HEAD = 0  # work requests ever posted; the low half is the next one's sequence number
QUEUE_TAIL = 1  # of those, how many are answered without a gap
QUEUE_QP = 2  # ibv_qp address
QUEUE_ENTRIES = 3  # address of int64[mask + 1]: what is in flight, see kernels/queue.py
QUEUE_MASK = 4
QUEUE_DEPTH = 5  # most work requests in flight: its credits
QUEUE_LOOSE = 6  # work requests since the last one that asked for a completion
QUEUE_TAG = 7  # index << 48 | incarnation << 32: upper half of its work requests' ids
QUEUE_CQ = 8  # address of the row of its completion queue
QUEUE_LKEYS = 9  # offset of its NIC's keys in the local table's, bytes
QUEUE_RKEYS = 10  # the same in the peer's table
QUEUE_SIGNAL = 11  # a completion is asked for every so many work requests
QUEUE_GATHERS = 12  # most slices of one work request
QUEUE_INLINE = 13  # bytes up to which a write carries its data in the work request
QUEUE_WEIGHT = 14  # share of the load it should have, 1 to WEIGHT_ONE
QUEUE_BREAKS = 15  # 1: any error breaks it, as a NIC's; 0: a software wire's goes on
QUEUE_STATE = 16  # QueueState
QUEUE_ORDER = 17  # Order
QUEUE_CAUSE = 18  # wc_status of the error that broke it
QUEUE_ENDPOINT = 19  # address of its endpoint's row
QUEUE_CUT = 20  # where nothing breaks it: address of a word that is set to 1 to get back what is in flight, or 0
QUEUE_PUSH = 21  # software wires that a submitter may push at once: the address of `verbs.push`, else 0
QUEUE_WORDS = 24
WEIGHT_ONE = 1024

# ------------------------------------------------------------------ completion queue rows, of one worker
CQ_ADDRESS = 0  # ibv_cq
CQ_CREDITS = 1  # completions it still has room for
CQ_WORDS = 8


class QueueState(IntEnum):
    """The life of a queue pair. A software wire's is only ever READY."""

    CLOSED = 0  # nothing in flight; whoever connects it may write the row
    READY = 1
    BROKEN = 2  # an error came; nothing is posted, what is in flight comes back flushed
    DRAINED = 3  # all of it has come back; waits for an order
    PROBING = 4  # connected anew; ready when an empty write gets through


class Order(IntEnum):
    """What the owner of a connection asks of the worker."""

    NONE = 0
    BREAK = 1  # post nothing more; the queue pair is in its error state already
    RETURN = 2  # drained, and nothing of it can reach the peer any more: post it again
    LOSE = 3  # the peer is gone: fail everything
    PROBE = 4  # the queue pair is connected anew


class AtOnce(IntEnum):
    """What a submitter has done of its own batch in the place of a sleeping worker."""

    REFUSED = 0  # nothing
    POSTED = 1  # all; descriptors tell of the rest
    BEGUN = 2  # ring the bell: there is more for the worker to do


# ------------------------------------------------------------------ worker rows
WORKER_CQS = 0  # address of the rows of its completion queues
WORKER_RING = 1  # ring of batches submitted to it
WORKER_BELL = 2  # futex
WORKER_PARKED = 3  # 1: asleep on the bell
WORKER_EPOCH = 4  # epoch at the start of its round; EPOCH_QUIET while asleep
WORKER_OUTSTANDING = 5  # work requests posted, all endpoints
WORKER_QUEUED = 6  # batches with slices to post
WORKER_NEXT_DEADLINE = 7  # when a batch of its may have to be stopped, ns; 0: never
WORKER_RETRY_FIRST = 8  # first slice to post again, -1
WORKER_RETRY_LAST = 9  # right behind the first, see `look.append_slice`
WORKER_TURN = 10  # 1: somebody is this worker, see kernels/worker.py; also the futex of its own thread
WORKER_HELD = 11  # 1: that thread waits for its turn
WORKER_EPOLL = 12  # epoll set that the thread sleeps on, or -1: it sleeps on the bell
WORKER_BELL_FD = 13  # eventfd in that set, or -1
WORKER_SERVES = 14  # 1: poll even with nothing outstanding, since peers may want something
WORKER_CTL = 15  # address of the worker's control block
WORKER_NOTES = 16  # batches with a notification, all endpoints
WORKER_IDLE = 17  # 3 words, see IDLE_SINCE
WORKER_CQ_COUNT = 20
WORKER_QUEUES = 21  # address of int64[]: its queue rows by index
WORKER_QUEUE_COUNT = 22
WORKER_ORDERS = 23  # orders given to its queues and not yet seen; anyone
WORKER_SPINS = 24  # 1: no descriptor tells of completions, so it polls while there is anything in flight
WORKER_TROUBLE_FD = 25  # eventfd that is written to when a queue's state changes, or -1
WORKER_UNDECIDED = 26  # queues that are broken or drained
WORKER_PEERS = 27  # highest peer it has had batches for, + 1
WORKER_OWES = 28  # 1: a queue may need a marker, see `post.post_markers`
WORKER_KEPT_FIRST = 29  # first slice that waits for its peer to be asked, -1; see kernels/look.py
WORKER_KEPT_LAST = 30
WORKER_LOOKED = 31  # 1: one was asked; set by the looker
WORKER_WORDS = 32
EPOCH_QUIET = (1 << 62) - 1
# a thread that yields its core for a moment before it sleeps, see kernels/linger.py
IDLE_SINCE = 0  # when it last found nothing to do after something, ns; 0: it is not idle
IDLE_BAD = 1  # idle moments to come in which it sleeps at once, since its core is wanted
IDLE_PENALTY = 2  # how many the last bad one brought

# ------------------------------------------------------------------ region tables
PEER_BITS = 16
TABLE_COUNT = 0
TABLE_BASES = 1  # address of int64[regions], ascending
TABLE_ENDS = 2  # address of int64[regions]
TABLE_SLOTS = 3  # address of int64[regions]
TABLE_KEYS = 4  # address of int64[NICS, regions], by NIC and slot: lkey or rkey
TABLE_ACCESS = 5  # address of int64[regions], by slot: bits of Access
TABLE_GONE = 6  # 1: the connection to this peer is broken; set by its provider
TABLE_REFUSED = 7  # address of int64[regions], by slot: 1 when the peer's NIC has refused its key; set by workers
TABLE_REFUSALS = 8  # 1 when there are any
TABLE_PEER = 9  # how submits name the peer: its row, and above PEER_BITS how often that had been another's
TABLE_EPOCH = 10  # rises when a connection to this peer ends: what was submitted before is posted no more
TABLE_BREAKS = 11  # rises when a connection ends on which slices had been sent and were not answered
TABLE_CONFIRMED = 12  # of those, how many are known to land nothing any more; written by the provider's threads
TABLE_ASKED = 13  # 1: workers want the owner to be asked what is registered; see kernels/look.py
TABLE_BEGUN = 14  # looks begun
TABLE_LOOKED = 15  # number of the latest that has ended
TABLE_RENEWALS = 16  # how often a region has taken over a former one's slot
TABLE_WORDS = 24


class Access(IntEnum):
    """What a peer may do with a region; bits."""

    READ = 1
    WRITE = 2
    LOCAL = 4  # not for peers: the owner's own reads may write here, since the memory is not read-only
    HELD = 8  # not for peers: the engine holds the object that keeps the memory mapped


# ------------------------------------------------------------------ rings
RING_TAIL = 0  # next ticket; producers
RING_HEAD = 8  # next to take; the consumer
RING_MASK = 16
RING_ENTRIES = 24  # int64[mask + 1]; EMPTY when not filled
RING_EMPTY = -(1 << 63)  # never a handle, its complement, or a slot

# ------------------------------------------------------------------ the heap store's slice object (216 bytes)
OBJECT_BYTES = 216
OBJECT_SOURCE = 0
OBJECT_TARGET = 8
OBJECT_LENGTH = 16
OBJECT_STATE = 24
OBJECT_BATCH = 32
OBJECT_STRING = 40  # address of the path string
OBJECT_STRING_LENGTH = 48
STRING_BYTES = 32  # "hostname:12345@mlx5_0" and its terminator: past the small-string buffer, so on the heap


def zeros(n: int, dtype: DTypeLike, *, sparse: bool = False) -> np.ndarray:
    """dtype[n] of zeros; pages of its own for a large array, which the system gives when they are first written to.

    They go back to the system with the array. glibc keeps what was freed, up to 32 MiB each, and writes the zeros of
    the next array itself. `sparse`: little of a large one is written to: it gets small pages, and the system need not
    have room for all of it.
    """
    nbytes = n * np.dtype(dtype).itemsize
    if nbytes < MAPPED_BYTES:
        return np.zeros(n, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if sparse else 0)
    pages = mmap.mmap(-1, nbytes, flags)
    with suppress(OSError):  # this kernel has no huge pages to give; numpy asks for them, too
        pages.madvise(mmap.MADV_NOHUGEPAGE if sparse else mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype, n)


def aligned(words: int, *, sparse: bool = False) -> np.ndarray:
    """int64[words] of zeros on a cache line of its own; see `zeros`."""
    raw = zeros(words + LINE // WORD, np.int64, sparse=sparse)
    skip = (-raw.ctypes.data % LINE) // WORD
    return raw[skip : skip + words]


def power_of_two(least: int) -> int:
    """The smallest power of two that is `least` or more."""
    return 1 << max(0, least - 1).bit_length()


def words_of(names: Iterable[IntEnum], values: np.ndarray) -> dict[str, int]:
    """`{name: value}` of a counter array, names in lower case."""
    return {name.name.lower(): int(values[name]) for name in names}
