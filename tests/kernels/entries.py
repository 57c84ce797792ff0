"""Entry points that tests call parts through, and a wire whose completions a test lets out one by one.

All in one module: each is compiled in the test process, once, and cached like the product's own.
"""

import ctypes

import numpy as np

from mooncache.kernels import account as accounts
from mooncache.kernels import atomics, batch, handle, inbox, pool, regions, ring, spread, worker
from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import i64, pause, peek, poke, u32
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.records import base as records
from mooncache.kernels.records.batch import batch_at
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.endpoint import endpoint_at
from mooncache.kernels.records.ring import RING_EMPTY, ring_at
from mooncache.kernels.records.table import table_at
from mooncache.kernels.records.worker import worker_at
from mooncache.kernels.verbs import (
    CQ_CQ_CONTEXT,
    POLL_AGAIN,
    SGE_BYTES,
    WC_BYTES,
    WR_ID,
    WR_NEXT,
    WR_NUM_SGE,
    WR_OPCODE,
    WR_REMOTE_ADDR,
    WR_RKEY,
    WR_SEND_FLAGS,
    WR_SG_LIST,
)
from mooncache.limits import SLICES_GATHERED
from mooncache.providers.device import (
    CQ_COUNT,
    CQ_OWN,
    CQ_QUEUES,
    Q_HEAD,
    Q_MASK,
    Q_NIC,
    Q_OWN,
    Q_RING,
    Q_TAIL,
    queue_of,
    write_completion,
)
from mooncache.providers.inprocess import loopback
from mooncache.providers.inprocess.loopback import ENTRY_ID, ENTRY_STATUS, ENTRY_WORDS, Loopback


# ------------------------------------------------------------------------------ atomics
@kernel("int64(int64, int64)", nogil=True)
def add_many(address, n):
    for _ in range(n):
        atomics.add(address, 1)
    return np.int64(n)


@kernel("int64(int64, int64)", nogil=True)
def cas_many(address, n):
    """Add by compare-and-swap; returns how often another thread was faster."""
    lost = 0
    for _ in range(n):
        old = atomics.load(address)
        while True:
            seen = atomics.cas(address, old, old + 1)
            if seen == old:
                break
            lost += 1
            old = seen
    return np.int64(lost)


@kernel("int64(int64, int64, int64)", nogil=True)
def stream_copy(target, source, length):
    atomics.stream_copy(target, source, length)
    atomics.fence()
    return np.int64(length)


@kernel("int64(int64, int64, int64, int64, int64)", nogil=True)
def deliver_many(box, who, address, length, n):
    """Deliver n times, however often the inbox is full meanwhile; returns how often it was."""
    full = np.int64(0)
    for i in range(n):
        poke(address, i)
        while not inbox.deliver(box, who, address, length):
            full += 1
            pause()
    return full


@kernel("int64(int64, int64, int64, int64)")
def try_deliver(box, who, address, length):
    return np.int64(inbox.deliver(box, who, address, length))


@kernel("int64(int64, int64, int64)", nogil=True)
def turn_many(row, cell, n):
    """Take a worker's turn n times and add to a plain word while holding it; returns how often it was taken."""
    missed = np.int64(0)
    for _ in range(n):
        while not worker.try_turn(worker_at(row)):
            missed += 1
            pause()
        poke(cell, peek(cell) + 1)
        records.release(worker_at(row), "turn", 0)
    return missed


@kernel("int64(int64, int64, int64)", nogil=True)
def exchange_many(address, first, n):
    """Put n tokens into a one-word mailbox; returns the sum of all that came out."""
    total = np.int64(0)
    for i in range(n):
        total += atomics.exchange(address, first + i)
    return total


@kernel("int64(int64, int64, int64)", nogil=True)
def send(flag, payload, n):
    """Write n words plainly, and after each release how many there are."""
    for i in range(n):
        poke(payload + i * WORD, i + 1)
        atomics.store(flag, i + 1)
    return np.int64(n)


@kernel("int64(int64, int64, int64)", nogil=True)
def receive(flag, payload, n):
    """Read each word as soon as the flag promises it; returns how many were not there."""
    missing, seen = 0, np.int64(0)
    while seen < n:
        promised = atomics.load(flag)
        while seen < promised:
            missing += peek(payload + seen * WORD) != seen + 1
            seen += 1
    return np.int64(missing)


@kernel("int64(int64, int64, int64)", nogil=True)
def use_many(key, guard, late):
    """Use a key as copiers do, until it is -1; returns how often it was found though `late` says that it is over."""
    wrong = np.int64(0)
    while True:
        atomics.store(guard, peek(guard) + 1)
        atomics.fence()
        found = atomics.load(key)
        if found > 0:
            wrong += np.int64(atomics.load(late) >= found)
        atomics.store(guard, peek(guard) + 1)
        if found < 0:
            return wrong


@kernel("int64(int64, int64, int64, int64)", nogil=True)
def sleep(syscall, address, expected, timespec):
    return atomics.futex_wait(syscall, address, expected, timespec)


@kernel("int64(int64, int64, int64)")
def wake(syscall, address, threads):
    return atomics.futex_wake(syscall, address, threads)


@kernel("int64(int64, int64, int64)")
def copy_bytes(target, source, length):
    atomics.copy(target, source, length)
    return np.int64(0)


@kernel("int64(int64, int64, int64)")
def fill(target, byte, length):
    atomics.fill_bytes(target, byte, length)
    return np.int64(0)


# ------------------------------------------------------------------------------ rings
@kernel("int64(int64, int64, int64)", nogil=True)
def push_many(words, first, n):
    for i in range(n):
        ring.push(ring_at(words), first + i)
    return np.int64(n)


@kernel("int64(int64, int64[::1])", nogil=True)
def pop_many(words, taken):
    """Fill `taken`, waiting for entries."""
    for i in range(taken.size):
        value = ring.pop(ring_at(words))
        while value == RING_EMPTY:
            pause()
            value = ring.pop(ring_at(words))
        taken[i] = value
    return np.int64(taken.size)


@kernel("int64(int64)")
def pop_one(words):
    return ring.pop(ring_at(words))


@kernel("int64(int64)")
def look(words):
    return ring.first(ring_at(words))


# ------------------------------------------------------------------------------ pool, handles, batches, regions
@kernel("int64(int64, int64, int64, int64)")
def acquire(ctl, row, slot, slices):
    return np.int64(pool.acquire_chunks(control_at(ctl), batch_at(row), slot, slices))


@kernel("int64(int64, int64)")
def release(ctl, row):
    pool.release_chunks(control_at(ctl), batch_at(row))
    return np.int64(0)


@kernel("int64(int64, int64, int64)")
def free_slot(ctl, row, slot):
    """Free one slot, and its chunk with its last one; returns the slots of the chunk still live."""
    left = pool.mark_free(control_at(ctl), slot)
    if left == 0:
        pool.release_chunk(control_at(ctl), batch_at(row), slot // 256)
    return np.int64(left)


@kernel("int64(int64, int64, int64, int64, int64)", nogil=True)
def churn(ctl, slot, rounds, most, owners):
    """Acquire and release chains of 1 to `most` chunks; marks what it holds, returns how often a mark was taken."""
    ctl = control_at(ctl)
    row = batch_at(ctl.batch_rows, slot)
    owner, next_ = i64(owners), i64(ctl.chunk_next)
    twice, size = np.int64(0), np.int64(slot)
    for _ in range(rounds):
        size = (size * 5 + 3) % most
        if not pool.acquire_chunks(ctl, row, slot, (size + 1) * 256):
            pause()
            continue
        chunk = row.first
        while chunk >= 0:
            twice += owner[chunk] != 0
            owner[chunk] = slot + 1
            chunk = next_[chunk]
        chunk = row.first
        while chunk >= 0:
            twice += owner[chunk] != slot + 1
            owner[chunk] = 0
            chunk = next_[chunk]
        pool.release_chunks(ctl, row)
    return twice


@kernel("int64(int64, int64)")
def handle_of(generation, slot):
    return np.int64(handle.handle_of(generation, slot))


@kernel("int64(int64, int64)")
def resolve(ctl, name):
    return np.int64(records.address(handle.resolve(control_at(ctl), name)))


@kernel("int64(int64)")
def acquire_row(ctl):
    return np.int64(records.address(batch.acquire_row(control_at(ctl))))


@kernel("int64(int64, int64)")
def move(row, event):
    return np.int64(batch.move(batch_at(row), event))


@kernel("int64(int64, int64, int64)")
def find(table, address, hint):
    return np.int64(regions.find(table_at(table), address, hint))


@kernel("int64(int64, int64, int64)")
def account(ctl, kind, n):
    accounts.account(control_at(ctl), kind, n)
    return np.int64(0)


@kernel("int64(int64)")
def clock(ctl):
    return np.int64(accounts.clock(control_at(ctl)))


@kernel("int64(int64, int64)")
def choose(endpoint, n):
    return np.int64(records.address(spread.choose(endpoint_at(endpoint), n)))


# ------------------------------------------------------------------------------ a wire that only writes down
# queue words: refuse the work request at this position, with this errno, so many times
Q_REFUSE_AT, Q_REFUSE_ERRNO, Q_REFUSE_TIMES = Q_OWN, Q_OWN + 1, Q_OWN + 2
# one word each, then a pair of words for each range, as the gather list has them
LOG_ID, LOG_FLAGS, LOG_OPCODE, LOG_COUNT, LOG_REMOTE, LOG_KEY, LOG_RANGES = range(7)
LOG_WORDS = LOG_RANGES + 2 * SLICES_GATHERED
# completion queue words: int64[n, 2] of ids and statuses, those taken, those there
CQ_ANSWERS = CQ_OWN
CQ_TAKEN, CQ_ANSWERED = CQ_ANSWERS + 1, CQ_ANSWERS + 2


@callback("int32(int64, int64, int64)")
def slate_post_send(qp, wr, bad_wr):
    """Write down each work request."""
    queue = queue_of(qp)
    head, mask = peek(queue + Q_HEAD * WORD), peek(queue + Q_MASK * WORD)
    while wr != 0:
        if head == peek(queue + Q_REFUSE_AT * WORD) and peek(queue + Q_REFUSE_TIMES * WORD) > 0:
            poke(queue + Q_REFUSE_TIMES * WORD, peek(queue + Q_REFUSE_TIMES * WORD) - 1)
            poke(queue + Q_HEAD * WORD, head)
            poke(bad_wr, wr)
            return np.int32(peek(queue + Q_REFUSE_ERRNO * WORD))
        entry = peek(queue + Q_RING * WORD) + (head & mask) * LOG_WORDS * WORD
        poke(entry + LOG_ID * WORD, peek(wr + WR_ID))
        poke(entry + LOG_FLAGS * WORD, np.int64(u32(wr + WR_SEND_FLAGS)[0]))
        poke(entry + LOG_OPCODE * WORD, np.int64(u32(wr + WR_OPCODE)[0]))
        poke(entry + LOG_COUNT * WORD, np.int64(u32(wr + WR_NUM_SGE)[0]))
        poke(entry + LOG_REMOTE * WORD, peek(wr + WR_REMOTE_ADDR))
        poke(entry + LOG_KEY * WORD, peek(wr + WR_RKEY))
        for i in range(2 * np.int64(u32(wr + WR_NUM_SGE)[0])):
            poke(entry + (LOG_RANGES + i) * WORD, peek(peek(wr + WR_SG_LIST) + i * SGE_BYTES // 2))
        head += 1
        wr = peek(wr + WR_NEXT)
    poke(queue + Q_HEAD * WORD, head)
    return np.int32(0)


@callback("int32(int64, int32, int64)")
def slate_poll_cq(cq, entries, wc):
    """The answers that the test gave."""
    words = peek(cq + CQ_CQ_CONTEXT)
    answers, taken = peek(words + CQ_ANSWERS * WORD), peek(words + CQ_TAKEN * WORD)
    n = min(np.int64(entries), peek(words + CQ_ANSWERED * WORD) - taken)
    for i in range(taken, taken + n):
        write_completion(wc, peek(answers + 2 * i * WORD), peek(answers + (2 * i + 1) * WORD))
        wc += WC_BYTES
    poke(words + CQ_TAKEN * WORD, taken + n)
    return np.int32(n)


# ------------------------------------------------------------------------------ a wire with a gate
@callback("int32(int64, int32, int64)")
def gated_poll_cq(cq, entries, wc):
    """Loopback's poll_cq, as long as the gate's count lasts; a gate below 0 is open for good."""
    queues = peek(cq + CQ_CQ_CONTEXT)
    taken = np.int64(0)
    for i in range(peek(queues + CQ_COUNT * WORD)):
        queue = peek(queues + (CQ_QUEUES + i) * WORD)
        gate = peek(queue + Q_NIC * WORD)
        left = atomics.load(gate)
        if left == 0:
            continue
        most = np.int64(entries) - taken
        if left > 0:
            most = min(most, left)
        tail, mask = peek(queue + Q_TAIL * WORD), peek(queue + Q_MASK * WORD)
        n = min(most, peek(queue + Q_HEAD * WORD) - tail)
        for k in range(n):
            entry = peek(queue + Q_RING * WORD) + ((tail + k) & mask) * ENTRY_WORDS * WORD
            wc = write_completion(wc, peek(entry + ENTRY_ID * WORD), peek(entry + ENTRY_STATUS * WORD))
        poke(queue + Q_TAIL * WORD, tail + n)
        if left > 0:
            atomics.cas(gate, left, left - n)
        taken += n
    return np.int32(taken)


@callback("int64(int64)")
def never(cq):
    """`next_completion` of a wire that does not say: beyond every horizon."""
    return np.int64((1 << 62) - 1)


@callback("int32(int64, int32, int64)")
def push_now(qp, n, wc):
    """Report what was posted last, if nothing else is on the queue."""
    queue = queue_of(qp)
    if peek(queue + Q_HEAD * WORD) - peek(queue + Q_TAIL * WORD) != n:
        return np.int32(0)
    return np.int32(loopback.drain(queue, np.int64(n), wc))


@callback("int32(int64, int32, int64)")
def push_nothing(qp, n, wc):
    """Decline."""
    return np.int32(POLL_AGAIN)


class Gated(Loopback):
    """Loopback that keeps its completions until the gate opens: batches run exactly as long as a test wants."""

    poll_cq = gated_poll_cq

    def __init__(self, *, opened: bool = False) -> None:
        super().__init__()
        self.gate = np.full(1, -1 if opened else 0, np.int64)

    def prepare(self, queue, worker):
        queue.words[Q_NIC] = self.gate.ctypes.data

    def open_gate(self) -> None:
        self.gate[0] = -1

    def shut_gate(self) -> None:
        self.gate[0] = 0

    def let(self, completions: int) -> None:
        """Let so many completions pass; the gate is shut after the last."""
        self.gate[0] += completions

    def entries(self, worker: int = 0, peer: int = 0) -> np.ndarray:
        """(wr_id, status) of the completions that wait; a view, so that a test can forge them."""
        queue = self.queues[worker][peer]
        head, tail, mask = (int(queue.words[word]) for word in (Q_HEAD, Q_TAIL, Q_MASK))
        table = queue.ring.reshape(-1, ENTRY_WORDS)
        assert head - tail <= mask + 1
        assert (tail & mask) + head - tail <= mask + 1, "the view would wrap; use a deeper queue"
        return table[tail & mask : (tail & mask) + head - tail]

    def inject(self, wr_id: int, status: int, worker: int = 0, peer: int = 0) -> None:
        """Append a completion that nobody asked for. Only while the worker stands still (a rig)."""
        queue = self.queues[worker][peer]
        head, mask = int(queue.words[Q_HEAD]), int(queue.words[Q_MASK])
        queue.ring.reshape(-1, ENTRY_WORDS)[head & mask] = wr_id, status
        queue.words[Q_HEAD] = head + 1


POST_SEND = loopback.post_send
SYSCALL_ADDRESS = int(ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0)
