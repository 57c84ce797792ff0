"""Entry points that tests call parts through, and a wire whose completions a test lets out one by one.

All in one module: each is compiled in the test process, once, and cached like the product's own.
"""

import ctypes

import numpy as np

from mooncache.kernels import account as accounts
from mooncache.kernels import atomics, batch, failure, handle, inbox, pool, regions, ring, spread, worker
from mooncache.kernels import copying as stream_copying
from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import i64, pause, peek, poke
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.records import base as records
from mooncache.kernels.records.base import record_at, row
from mooncache.kernels.records.batch import batch_at
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.endpoint import endpoint_at
from mooncache.kernels.records.ring import RING_EMPTY, ring_at
from mooncache.kernels.records.table import table_at
from mooncache.kernels.records.verbs import SGE, send_wr_at, sge_at
from mooncache.kernels.records.worker import worker_at
from mooncache.kernels.verbs import POLL_AGAIN
from mooncache.limits import SLICES_GATHERED
from mooncache.providers.device import port_of, queue_of, write_completion
from mooncache.providers.inprocess import loopback
from mooncache.providers.inprocess.base import FIELDS
from mooncache.providers.inprocess.base import port_at as inprocess_port_at
from mooncache.providers.inprocess.base import queue_at as inprocess_queue_at
from mooncache.providers.inprocess.loopback import Loopback, entry_at
from mooncache.providers.records import PORT_FIELDS
from mooncache.providers.shm import copy as copying
from mooncache.providers.stream import records as stream


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


@kernel("int64(int64, int64, int64, int64, int64)", nogil=True)
def stream_copy(target, source, length, banks_from, banks_below):
    stream_copying.stream_copy(target, source, length, banks_from, banks_below)
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
    row = batch.take_row(control_at(ctl))
    if not records.missing(row):
        batch.move(row, batch.ACQUIRE)
    return np.int64(records.address(row))


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


@kernel("int64(int64, int64[::1])")
def claim(queue, found):
    """What a helper takes of a queue pair's entries to copy: the first one's number, and how many."""
    found[0], found[1] = copying.claim(stream.queue_at(queue), False)
    return np.int64(0)


# ------------------------------------------------------------------------------ a wire that only writes down
QUEUE = row(
    [
        *FIELDS,
        ("refuse_at", np.int64),  # refuse the work request at this position
        ("refuse_errno", np.int64),  # with this errno
        ("refuse_times", np.int64),  # so many times
    ]
)
LOG = np.dtype(
    [
        ("id", np.int64),
        ("flags", np.int64),
        ("opcode", np.int64),
        ("count", np.int64),  # of ranges
        ("remote", np.int64),
        ("key", np.int64),
        ("ranges", SGE, SLICES_GATHERED),
    ]
)  # a work request as it was posted
PORT = row(
    [
        *PORT_FIELDS,
        ("answers", np.int64),  # address of ANSWER[]
        ("taken", np.int64),
        ("answered", np.int64),
    ]
)
ANSWER = np.dtype([("id", np.int64), ("status", np.int64)])
queue_at, log_at, port_at, answer_at = record_at(QUEUE), record_at(LOG), record_at(PORT), record_at(ANSWER)


@callback("int32(int64, int64, int64)")
def slate_post_send(qp, wr, bad_wr):
    """Write down each work request."""
    queue, wr = queue_at(queue_of(qp)), send_wr_at(wr)
    head, mask = queue.head, queue.mask
    while not records.missing(wr):
        if head == queue.refuse_at and queue.refuse_times > 0:
            queue.refuse_times -= 1
            queue.head = head
            poke(bad_wr, records.address(wr))
            return np.int32(queue.refuse_errno)
        entry = log_at(queue.ring, head & mask)
        entry.id = wr.wr_id
        entry.flags = wr.send_flags
        entry.opcode = wr.opcode
        entry.count = wr.num_sge
        entry.remote = wr.remote_addr
        entry.key = wr.rkey
        for i in range(np.int64(wr.num_sge)):
            one, asked = sge_at(records.where(entry, "ranges"), i), sge_at(wr.sg_list, i)
            one.addr = asked.addr
            one.length_lkey = asked.length_lkey
        head += 1
        wr = send_wr_at(wr.next)
    queue.head = head
    return np.int32(0)


@callback("int32(int64, int32, int64)")
def slate_poll_cq(cq, entries, wc):
    """The answers that the test gave."""
    port = port_at(port_of(cq))
    n = min(np.int64(entries), port.answered - port.taken)
    for i in range(n):
        answer = answer_at(port.answers, port.taken + i)
        wc = write_completion(wc, answer.id, answer.status)
    port.taken += n
    return np.int32(n)


# ------------------------------------------------------------------------------ a wire with a gate
@callback("int32(int64, int32, int64)")
def gated_poll_cq(cq, entries, wc):
    """Loopback's poll_cq, as long as the gate's count lasts; a gate below 0 is open for good."""
    port = inprocess_port_at(port_of(cq))
    taken = np.int64(0)
    for i in range(port.count):
        queue = inprocess_queue_at(i64(records.behind(port))[i])
        left = atomics.load(queue.nic)
        if left == 0:
            continue
        most = np.int64(entries) - taken
        if left > 0:
            most = min(most, left)
        tail, mask = queue.tail, queue.mask
        n = min(most, queue.head - tail)
        for k in range(n):
            entry = entry_at(queue.ring, (tail + k) & mask)
            wc = write_completion(wc, entry.id, entry.status)
        queue.tail = tail + n
        if left > 0:
            atomics.cas(queue.nic, left, left - n)
        taken += n
    return np.int32(taken)


@callback("int64(int64)")
def never(cq):
    """`next_completion` of a wire that does not say: beyond every horizon."""
    return np.int64((1 << 62) - 1)


@callback("int32(int64, int32, int64)")
def push_now(qp, n, wc):
    """Report what was posted last, if nothing else is on the queue."""
    queue = inprocess_queue_at(queue_of(qp))
    if queue.head - queue.tail != n:
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
        queue.row["nic"] = self.gate.ctypes.data

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
        head, tail, mask = (queue.row[field] for field in ("head", "tail", "mask"))
        assert head - tail <= mask + 1
        assert (tail & mask) + head - tail <= mask + 1, "the view would wrap; use a deeper queue"
        return queue.ring[tail & mask : (tail & mask) + head - tail].view(np.int64).reshape(-1, 2)

    def inject(self, wr_id: int, status: int, worker: int = 0, peer: int = 0) -> None:
        """Append a completion that nobody asked for. Only while the worker stands still (a rig)."""
        queue = self.queues[worker][peer]
        queue.ring[queue.row["head"] & queue.row["mask"]] = wr_id, status
        queue.row["head"] += 1


SYSCALL_ADDRESS = int(ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0)


# ------------------------------------------------------------------------------ what failed
@kernel("int64(int64, int64, int64, int64, int64, int64)")
def outcome_of(wc_status, slices, retries, note, breaks, overdue):
    return failure.outcome_of(wc_status, slices, retries, note != 0, breaks != 0, overdue != 0)


@kernel("int64(int64, int64, int64, int64, int64)")
def fate_of(wc_status, note, stopped, exhausted, askable):
    return failure.fate_of(wc_status, note != 0, stopped, exhausted != 0, askable != 0)


@kernel("int64(int64)")
def status_of(wc_status):
    return failure.status_of(wc_status)
