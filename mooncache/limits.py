"""The capacities of an engine, each a sum with one line per holder, and the units everything is cut into."""

from __future__ import annotations

KiB = 1024

CHUNK_SLICES = 256
"""Slices in a chunk: 30,000 slices are 118 chunks, one generation bump each; a one-slice batch wastes 255 slots."""

CHUNK_BITS = 8
"""`slot >> CHUNK_BITS` is its chunk; a shift, because a signed division costs a nanosecond a slice."""

SLICE_BYTES = 64 * KiB
"""Largest slice before its tail is folded in: the upstream default, one work request's worth of wire time."""

TAIL_BYTES = SLICE_BYTES // 4
"""A remainder up to this long joins the slice before it instead of becoming a work request of its own."""

BATCHES = (
    2048  # 8 requests in flight x 80 layers x 3 batches a layer (K, V, state), rounded up
    + 1024  # closed, waiting for the NIC or the reaper
    + 1024  # finished, not yet closed by a slow consumer
)

POOL_SLICES = (
    8 * 270_000  # eight of the largest production batch reported (Mooncake#826)
    + 80 * 24_070  # one whole request of mean length not yet freed: 80 layers (problem.md, KV shapes)
    + 108_704  # rounding up to a power of two
)

REGIONS = (
    2 * 128  # K and V of each layer of a deep model
    + 256  # auxiliary rows, weights, staging
    + 512  # buffers that were cut at a device's largest registration
)
"""Registered regions of one engine, and of one peer, unless the setting says otherwise: 104 bytes each in a table, and
there is a table for each peer."""

REGIONS_MOST = 4096
"""The most that `regions` may be set to: 4 TiB in pieces of 1 GiB. Keys have room for it, and records of engines."""

PEERS = 256
"""Peers of one engine: a decode fleet of 32 machines x 8 ranks."""

WORKERS = 16
"""Worker threads of one engine."""

QUEUE_DEPTH = 512
"""Work requests outstanding on one queue pair: two of the upstream's 256-deep queue pairs."""

QUEUE_PAIRS = (
    8  # NICs of one engine
    * 4  # queue pairs on each: upstream's default is two
)
"""Queue pairs of one worker to one peer."""

NICS = 8
"""NICs of one engine: the largest machines have one a GPU."""

SLICES_GATHERED = 16
"""Slices of one work request, where they lie side by side at the target; NICs take 16 to 30 ranges at best speed."""

MESSAGE_BYTES = 1 << 32
"""Bytes of one work request of a software wire, where lengths have 32 bits; NICs say theirs."""

CHAIN = 128
"""Work requests behind one doorbell: a quarter of the queue depth, so that three quarters stay busy meanwhile."""

POLL_LOT = 64
"""Completions taken by one poll: the upstream's kPollCount."""

RETRIES = 3
"""Times a slice is posted again after the connection broke under it."""

NOTE_BYTES = (
    1000 * 40  # a lease's heartbeat: 1,000 requests, each an id of 36 characters with separators
    + 25_536  # rounding up to a power of two
)
"""Longest message of a notification: what grows with the load has to fit into one.

Each batch, each place of the inbox and each connection has room for one: BATCHES + INBOX_NOTES + connections times
64 KiB are 330 MiB of address space, of which pages are taken when they are written to, 4 KiB for a short one. RDMA
pins one for each NIC and direction of a connection.
"""

NOTE_BYTES_MOST = 1 << 20
"""The most that `note_bytes` may be set to."""

NOTE_HEAD_BYTES = (
    1  # so that it is never empty
    + 7  # rounding up to whole words
)
"""The bytes of a notification besides its message, as it travels."""

SENDER_BYTES = (
    2  # length of the name
    + 255 * 4  # an engine's name: 255 characters of at most four bytes
    + 2  # rounding up to whole words
)
"""The bytes in which a target keeps the sender beside each notification."""

INBOX_NOTES = 1024
"""Notifications an engine keeps until they are fetched. A sender may have as many there as are free besides, so that
one alone takes half of it, and 256 find room for three each."""

LANES = (
    PEERS * WORKERS  # one from each worker of each peer, if this engine has no other worker
    + PEERS  # one to each
    + 512  # while old ones of restarted peers have not been noticed yet, or peers open several
)
"""Connections of one worker."""

CACHE_SLICES = 4096
"""Slices a thread keeps for itself under the `thread_cache` policy: the upstream fix's ring."""

REAPER_LOT = 16_384
"""Slices the reaper of the `deferred` policy frees before it pauses: 16 M/s, more than one worker completes."""

REAPER_PERIOD_NS = 1_000_000
"""Pause of that reaper: a layer's transfer takes a few of them."""

SPIN_NS = 50_000
"""Idle polling before a thread sleeps: about what waking it again costs (costs.md: futex 23-58 us)."""

SLICES_MAX = 1 << 31
"""Slots a pool can have: a slot is the low word of a work request's id."""
