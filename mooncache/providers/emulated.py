"""A NIC of stated rate, message rate, latency and depth: the CPU side is real, the wire is a stated assumption.

    post --> [message server] --> [byte server] --> latency --> completion, in order on each queue
              1 / message rate      length / rate

Time is the real clock's, or an actor's virtual clock in the simulation: the same functions serve both, in picoseconds
(512 bytes at 400 Gb/s take 10,240). A plan of faults, made from a seed, can delay, fail, flush and reorder.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from mooncache.errors import UsageError
from mooncache.kernels.atomics import call_clock_gettime, exchange, pause, peek, poke, store, u32
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.layout import WORD, Opcode, aligned
from mooncache.kernels.state import address_of
from mooncache.kernels.verbs import (
    CQ_CQ_CONTEXT,
    ENOMEM,
    SGE_ADDR,
    SGE_LENGTH,
    WC_BYTES,
    WR_ID,
    WR_NEXT,
    WR_OPCODE,
    WR_REMOTE_ADDR,
    WR_RKEY,
    WR_SG_LIST,
    WcStatus,
)
from mooncache.providers.software import (
    CQ_COUNT,
    CQ_QUEUES,
    CQ_TURN,
    Q_HEAD,
    Q_KEYS,
    Q_LIMIT,
    Q_MASK,
    Q_NIC,
    Q_NOW,
    Q_OWN,
    Q_RING,
    Q_SCRATCH,
    Q_TAIL,
    InProcessProvider,
    Queue,
    key_status,
    move_bytes,
    queue_of,
    send_note,
    write_completion,
)

PS_PER_S = 10**12
PS_PER_NS = 1000
FRACTION_BITS = 20  # of the picoseconds a byte takes
NEVER = (1 << 62) - 1

# NIC words, shared by the queues of one engine
N_LOCK, N_MESSAGE_FREE, N_BYTE_FREE, N_MESSAGE_PS, N_BYTE_COST, N_LATENCY, N_MOVE = 0, 1, 2, 3, 4, 5, 6
N_PLAN, N_PLAN_LEFT, N_POSTED, N_CLOCK, N_STARTED, NIC_WORDS = 7, 8, 9, 10, 11, 16
# completion ring entries; those that move bytes have as many more words in a second ring
E_ID, E_STATUS, E_DUE, ENTRY_WORDS = 0, 1, 2, 3
M_LOCAL, M_REMOTE, M_LENGTH, M_OPCODE, M_KEY, MOVE_WORDS = 0, 1, 2, 3, 4, 5
Q_MOVES = Q_OWN
SENDING = -1  # status of a notification until its time has come
# plan entries
P_AT, P_ACTION, P_VALUE, PLAN_WORDS = 0, 1, 2, 3


class Action(IntEnum):
    """What happens to the n-th work request of a fault plan, and what its value means."""

    DELAY = 0  # ps later; those behind it on the queue wait too
    FAIL = 1  # WcStatus it ends with; its bytes do not move
    FLUSH = 2  # the queue breaks: this and all outstanding end as flushed, then it works again
    REORDER = 3  # its completion changes places with the one this many before it


@dataclass(frozen=True)
class Fault:
    """One fault: `at` counts the NIC's work requests from 0."""

    at: int
    action: Action
    value: int = 0


def random_faults(
    seed: int, work_requests: int, *, delay: float = 0, fail: float = 0, flush: float = 0, reorder: float = 0,
    delay_ns: int = 100_000, window: int = 16,
) -> list[Fault]:  # fmt: skip
    """A plan drawn from `seed`: each of the first `work_requests` suffers at most one fault, with these chances."""
    stream = np.random.Generator(np.random.Philox(key=[seed, 0]))
    chances = np.cumsum([delay, fail, flush, reorder])
    if chances[-1] > 1 or min(delay, fail, flush, reorder) < 0:
        raise UsageError(f"chances must be >= 0 and sum to at most 1, got {[delay, fail, flush, reorder]}")
    drawn, amounts = stream.random(work_requests), stream.integers(1, window + 1, work_requests)
    causes = [WcStatus.RETRY_EXC_ERR, WcStatus.REM_OP_ERR, WcStatus.LOC_PROT_ERR, WcStatus.REM_ACCESS_ERR]
    plan = []
    for at in np.flatnonzero(drawn < chances[-1]):
        action = Action(int(np.searchsorted(chances, drawn[at], side="right")))
        amount = int(amounts[at])
        value = {
            Action.DELAY: delay_ns * PS_PER_NS,
            Action.FAIL: int(causes[amount % len(causes)]),
            Action.FLUSH: 0,
            Action.REORDER: amount,
        }[action]
        plan.append(Fault(int(at), action, value))
    return plan


# ------------------------------------------------------------------------------ kernels
@kernel
def time_of(queue, nic):
    """Picoseconds: the virtual clock the queue is bound to, or real time since the NIC was opened."""
    virtual = peek(queue + Q_NOW * WORD)
    if virtual != 0:
        return peek(virtual)
    timespec = queue + Q_SCRATCH * WORD
    call_clock_gettime(peek(nic + N_CLOCK * WORD), 1, timespec)
    ns = peek(timespec) * 1_000_000_000 + peek(timespec + WORD) - peek(nic + N_STARTED * WORD)
    return ns * PS_PER_NS


@kernel
def flush(queue, nic_time):
    """Break the queue: everything outstanding ends as flushed, now."""
    mask, ring = peek(queue + Q_MASK * WORD), peek(queue + Q_RING * WORD)
    for i in range(peek(queue + Q_TAIL * WORD), peek(queue + Q_HEAD * WORD)):
        entry = ring + (i & mask) * ENTRY_WORDS * WORD
        poke(entry + E_STATUS * WORD, WcStatus.WR_FLUSH_ERR)
        poke(entry + E_DUE * WORD, nic_time)


@kernel
def swap_words(here, there, words):
    """Exchange `words` words."""
    for i in range(words):
        held = peek(here + i * WORD)
        poke(here + i * WORD, peek(there + i * WORD))
        poke(there + i * WORD, held)


@kernel
def swap_places(queue, head, back):
    """Let the newest completion and the one `back` before it change places; their times stay in order."""
    mask, back = peek(queue + Q_MASK * WORD), min(back, head - peek(queue + Q_TAIL * WORD))
    new, old = head & mask, (head - back) & mask
    ring, moves = peek(queue + Q_RING * WORD), peek(queue + Q_MOVES * WORD)
    swap_words(ring + new * ENTRY_WORDS * WORD, ring + old * ENTRY_WORDS * WORD, E_DUE)
    swap_words(moves + new * MOVE_WORDS * WORD, moves + old * MOVE_WORDS * WORD, MOVE_WORDS)


@kernel
def suffer(queue, nic, head, nic_time):
    """Apply the fault planned for the work request just queued at `head`, if there is one."""
    left = peek(nic + N_PLAN_LEFT * WORD)
    plan = peek(nic + N_PLAN * WORD)
    entry = peek(queue + Q_RING * WORD) + (head & peek(queue + Q_MASK * WORD)) * ENTRY_WORDS * WORD
    action, value = peek(plan + P_ACTION * WORD), peek(plan + P_VALUE * WORD)
    if action == Action.DELAY:
        poke(entry + E_DUE * WORD, peek(entry + E_DUE * WORD) + value)
    elif action == Action.FAIL:
        poke(entry + E_STATUS * WORD, value)
    elif action == Action.REORDER:
        swap_places(queue, head, value)
    else:
        poke(queue + Q_HEAD * WORD, head + 1)
        flush(queue, nic_time)
    poke(nic + N_PLAN * WORD, plan + PLAN_WORDS * WORD)
    poke(nic + N_PLAN_LEFT * WORD, left - 1)


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Pass a chain through the NIC's servers and queue its completions; ENOMEM when the queue is full."""
    queue = queue_of(qp)
    nic = peek(queue + Q_NIC * WORD)
    head, tail = peek(queue + Q_HEAD * WORD), peek(queue + Q_TAIL * WORD)
    mask, limit = peek(queue + Q_MASK * WORD), peek(queue + Q_LIMIT * WORD)
    ring, keys, moves = peek(queue + Q_RING * WORD), peek(queue + Q_KEYS * WORD), peek(queue + Q_MOVES * WORD)
    while exchange(nic + N_LOCK * WORD, 1) != 0:
        pause()
    now = time_of(queue, nic)
    message_ps, byte_cost = peek(nic + N_MESSAGE_PS * WORD), peek(nic + N_BYTE_COST * WORD)
    latency, move = peek(nic + N_LATENCY * WORD), peek(nic + N_MOVE * WORD)
    message_free = max(now, peek(nic + N_MESSAGE_FREE * WORD))
    byte_free = peek(nic + N_BYTE_FREE * WORD)
    posted, planned = peek(nic + N_POSTED * WORD), peek(nic + N_PLAN_LEFT * WORD)
    error = np.int32(0)
    while wr != 0:
        if head - tail >= limit:
            poke(bad_wr, wr)
            error = np.int32(ENOMEM)
            break
        sge = peek(wr + WR_SG_LIST)
        length, opcode = np.int64(u32(sge + SGE_LENGTH)[0]), np.int64(u32(wr + WR_OPCODE)[0])
        remote, rkey = peek(wr + WR_REMOTE_ADDR), peek(wr + WR_RKEY)
        message_free += message_ps
        byte_free = max(message_free, byte_free) + ((length * byte_cost) >> FRACTION_BITS)
        entry = ring + (head & mask) * ENTRY_WORDS * WORD
        poke(entry + E_ID * WORD, peek(wr + WR_ID))
        if opcode == Opcode.SEND:
            poke(entry + E_STATUS * WORD, SENDING)
        else:
            poke(entry + E_STATUS * WORD, key_status(keys, rkey, remote, length, opcode))
        poke(entry + E_DUE * WORD, byte_free + latency)
        if move != 0 or opcode == Opcode.SEND:
            moved = moves + (head & mask) * MOVE_WORDS * WORD
            poke(moved + M_LOCAL * WORD, peek(sge + SGE_ADDR))
            poke(moved + M_REMOTE * WORD, remote)
            poke(moved + M_LENGTH * WORD, length)
            poke(moved + M_OPCODE * WORD, opcode)
            poke(moved + M_KEY * WORD, rkey)
        if planned > 0 and peek(peek(nic + N_PLAN * WORD) + P_AT * WORD) == posted:
            suffer(queue, nic, head, now)
            planned -= 1
        head += 1
        posted += 1
        wr = peek(wr + WR_NEXT)
    poke(queue + Q_HEAD * WORD, head)
    poke(nic + N_MESSAGE_FREE * WORD, message_free)
    poke(nic + N_BYTE_FREE * WORD, byte_free)
    poke(nic + N_POSTED * WORD, posted)
    store(nic + N_LOCK * WORD, 0)
    return error


@kernel
def drain(queue, entries, wc):
    """Report up to `entries` completions of one queue that are due; returns how many."""
    head, tail = peek(queue + Q_HEAD * WORD), peek(queue + Q_TAIL * WORD)
    if head == tail:
        return np.int64(0)
    nic = peek(queue + Q_NIC * WORD)
    mask, ring, move = peek(queue + Q_MASK * WORD), peek(queue + Q_RING * WORD), peek(nic + N_MOVE * WORD)
    now = time_of(queue, nic)
    n = np.int64(0)
    while n < entries and tail < head:
        entry = ring + (tail & mask) * ENTRY_WORDS * WORD
        if peek(entry + E_DUE * WORD) > now:
            break
        status = peek(entry + E_STATUS * WORD)
        if status == SENDING:
            moved = peek(queue + Q_MOVES * WORD) + (tail & mask) * MOVE_WORDS * WORD
            status = send_note(queue, peek(moved + M_LOCAL * WORD), peek(moved + M_LENGTH * WORD))
        elif move != 0 and status == WcStatus.SUCCESS:
            moved = peek(queue + Q_MOVES * WORD) + (tail & mask) * MOVE_WORDS * WORD
            status = move_bytes(
                queue, peek(queue + Q_KEYS * WORD), peek(moved + M_KEY * WORD), peek(moved + M_OPCODE * WORD),
                peek(moved + M_LOCAL * WORD), peek(moved + M_REMOTE * WORD), peek(moved + M_LENGTH * WORD),
            )  # fmt: skip
        wc = write_completion(wc, peek(entry + E_ID * WORD), status)
        tail += 1
        n += 1
    poke(queue + Q_TAIL * WORD, tail)
    return n


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Due completions of all queues of this worker; each poll starts at the next queue, so that none starves."""
    queues = peek(cq + CQ_CQ_CONTEXT)
    count, turn = peek(queues + CQ_COUNT * WORD), peek(queues + CQ_TURN * WORD)
    taken = np.int64(0)
    for i in range(count):
        at = (turn + i) % count
        taken += drain(peek(queues + (CQ_QUEUES + at) * WORD), np.int64(entries) - taken, wc + taken * WC_BYTES)
    poke(queues + CQ_TURN * WORD, turn + 1)
    return np.int32(taken)


@callback("int64(int64)")
def next_completion(cq):
    """When the oldest completion of any queue of this worker is due, ps; NEVER when nothing is outstanding."""
    queues = peek(cq + CQ_CQ_CONTEXT)
    due = np.int64(NEVER)
    for i in range(peek(queues + CQ_COUNT * WORD)):
        queue = peek(queues + (CQ_QUEUES + i) * WORD)
        tail = peek(queue + Q_TAIL * WORD)
        if peek(queue + Q_HEAD * WORD) > tail:
            entry = peek(queue + Q_RING * WORD) + (tail & peek(queue + Q_MASK * WORD)) * ENTRY_WORDS * WORD
            due = min(due, peek(entry + E_DUE * WORD))
    return due


# ------------------------------------------------------------------------------ the provider
@dataclass(frozen=True)
class Nic:
    """What the NIC can do. Defaults: a 400 Gb/s port; ConnectX-6's 215 M messages/s rounded down; HDR-class latency."""

    bits_per_s: int = 400 * 10**9
    messages_per_s: int = 200 * 10**6
    latency_ns: float = 2000
    move_bytes: bool = True
    faults: Sequence[Fault] = field(default=())

    def __post_init__(self) -> None:
        if self.bits_per_s <= 0 or self.messages_per_s <= 0 or self.latency_ns < 0:
            raise UsageError(f"a NIC needs a rate > 0, a message rate > 0 and a latency >= 0, got {self!r}")

    @property
    def message_ps(self) -> int:
        """Picoseconds a message takes."""
        return PS_PER_S // self.messages_per_s

    @property
    def byte_cost(self) -> int:
        """Picoseconds a byte takes on the wire, in units of 2**-FRACTION_BITS."""
        return (8 * PS_PER_S << FRACTION_BITS) // self.bits_per_s


class Emulated(InProcessProvider):
    """Engines of one process over an emulated NIC. `clocks`: addresses of virtual clocks, one a worker, or none."""

    name = "emulated"
    post_send = post_send
    poll_cq = poll_cq
    entry_words = ENTRY_WORDS

    def __init__(self, nic: Nic | None = None, clocks: Sequence[int] = ()) -> None:
        super().__init__()
        self.nic = nic or Nic()
        self.clocks = clocks
        plan = sorted((fault.at, int(fault.action), fault.value) for fault in self.nic.faults)
        if len({at for at, _, _ in plan}) < len(plan):
            raise UsageError("a fault plan may hold one fault a work request")
        self.plan = np.array([*plan, (-1, 0, 0)], np.int64)
        self.words = aligned(NIC_WORDS)
        self.words[[N_MESSAGE_PS, N_BYTE_COST]] = self.nic.message_ps, self.nic.byte_cost
        self.words[[N_LATENCY, N_MOVE]] = round(self.nic.latency_ns * PS_PER_NS), self.nic.move_bytes
        self.words[[N_PLAN, N_PLAN_LEFT]] = address_of(self.plan), len(plan)
        self.words[N_CLOCK] = ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0
        self.words[N_STARTED] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    def prepare(self, queue: Queue, worker: int) -> None:
        """Bind the queue to the NIC, and to its worker's clock when that is virtual."""
        queue.words[Q_NIC] = address_of(self.words)
        queue.words[Q_NOW] = self.clocks[worker] if self.clocks else 0
        queue.moves = aligned((int(queue.words[Q_MASK]) + 1) * MOVE_WORDS)
        queue.words[Q_MOVES] = address_of(queue.moves)
