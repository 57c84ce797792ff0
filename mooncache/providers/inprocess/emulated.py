"""A NIC of stated rate, message rate, latency and depth: the CPU side is real, the wire is a stated assumption.

    post --> [message server] --> [byte server] --> latency --> completion, in order on each queue
              1 / message rate      length / rate

Time is the real clock's, or an actor's virtual clock in the simulation: the same functions serve both, in picoseconds
(512 bytes at 400 Gb/s take 10,240). A plan of faults, made from a seed, can delay, fail, flush and reorder.

Several NICs are several rails: each has servers, queue pairs and completion queues of its own. A work request may
gather several ranges, and makes a completion if it asks for one or fails. Where a NIC *breaks*, an error breaks the
queue pair, as on a real one: what is behind it, or posted later, is flushed, in order, until it is connected anew.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mooncache import limits
from mooncache.errors import UsageError
from mooncache.kernels.arrays import WORD, address_of, aligned, put
from mooncache.kernels.atomics import call_clock_gettime, exchange, load, pause, peek, poke, store, u32
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.records.queue import WEIGHT_ONE
from mooncache.kernels.state import CompletionQueue, QueuePair, QueueRow
from mooncache.kernels.verbs import (
    CQ_CQ_CONTEXT,
    EINVAL,
    ENOMEM,
    SEND_SIGNALED,
    SGE_ADDR,
    SGE_BYTES,
    SGE_LENGTH,
    SGE_LKEY,
    WC_BYTES,
    WR_ID,
    WR_NEXT,
    WR_NUM_SGE,
    WR_OPCODE,
    WR_REMOTE_ADDR,
    WR_RKEY,
    WR_SEND_FLAGS,
    WR_SG_LIST,
    WcStatus,
)
from mooncache.providers.base import Provider
from mooncache.providers.device import (
    CQ_COUNT,
    CQ_QUEUES,
    CQ_TURN,
    Q_CUT,
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
    Queue,
    key_status,
    queue_of,
    write_completion,
)
from mooncache.providers.inprocess.base import InProcess, InProcessProvider, move_bytes, send_note
from mooncache.providers.inprocess.faults import PS_PER_NS, Action, Fault
from mooncache.providers.inprocess.repair import Mender

PS_PER_S = 10**12
FRACTION_BITS = 20  # of the picoseconds a byte takes
NEVER = (1 << 62) - 1

# NIC words, shared by the queues of one engine on one rail
N_LOCK, N_MESSAGE_FREE, N_BYTE_FREE, N_MESSAGE_PS, N_BYTE_COST, N_LATENCY, N_MOVE = 0, 1, 2, 3, 4, 5, 6
N_PLAN, N_PLAN_LEFT, N_POSTED, N_CLOCK, N_STARTED, N_GATHERS, N_BREAKS, NIC_WORDS = 7, 8, 9, 10, 11, 12, 13, 16
# completion ring entries
E_ID, E_STATUS, E_SIGNALED, E_DUE, ENTRY_WORDS = 0, 1, 2, 3, 4
# what each moves, in a second ring; behind it address, negated as in `move_bytes`, and length of as many ranges as the
# NIC gathers
M_REMOTE, M_OPCODE, M_KEY, M_COUNT, M_RANGES = 0, 1, 2, 3, 4
Q_MOVES = Q_OWN
Q_BROKEN = Q_OWN + 1  # 0, or the WcStatus that the next work request ends with; those behind it are flushed
SENDING = -1  # status of a notification until its time has come
# plan entries
P_AT, P_ACTION, P_VALUE, PLAN_WORDS = 0, 1, 2, 3


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
def move_words(nic):
    """Words of an entry of the second ring."""
    return M_RANGES + 2 * peek(nic + N_GATHERS * WORD)


@kernel
def swap_words(here, there, words):
    """Exchange `words` words."""
    for i in range(words):
        held = peek(here + i * WORD)
        poke(here + i * WORD, peek(there + i * WORD))
        poke(there + i * WORD, held)


@kernel
def swap_places(queue, nic, head, back):
    """Let the newest completion and the one `back` before it change places; their times stay in order."""
    mask, back = peek(queue + Q_MASK * WORD), min(back, head - peek(queue + Q_TAIL * WORD))
    new, old = head & mask, (head - back) & mask
    ring, moves, words = peek(queue + Q_RING * WORD), peek(queue + Q_MOVES * WORD), move_words(nic)
    swap_words(ring + new * ENTRY_WORDS * WORD, ring + old * ENTRY_WORDS * WORD, E_DUE)
    swap_words(moves + new * words * WORD, moves + old * words * WORD, words)


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
        swap_places(queue, nic, head, value)
    else:
        poke(queue + Q_HEAD * WORD, head + 1)
        flush(queue, nic_time)
    poke(nic + N_PLAN * WORD, plan + PLAN_WORDS * WORD)
    poke(nic + N_PLAN_LEFT * WORD, left - 1)


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Pass a chain through the NIC's servers and queue its completions; ENOMEM when the queue is full.

    A work request without ranges moves nothing, whatever its key, as a write of no bytes does.
    """
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
    gathers, words = peek(nic + N_GATHERS * WORD), move_words(nic)
    message_free = max(now, peek(nic + N_MESSAGE_FREE * WORD))
    byte_free = peek(nic + N_BYTE_FREE * WORD)
    posted, planned = peek(nic + N_POSTED * WORD), peek(nic + N_PLAN_LEFT * WORD)
    error = np.int32(0)
    while wr != 0:
        ranges, opcode = np.int64(u32(wr + WR_NUM_SGE)[0]), np.int64(u32(wr + WR_OPCODE)[0])
        if head - tail >= limit or ranges > gathers:
            poke(bad_wr, wr)
            error = np.int32(EINVAL if ranges > gathers else ENOMEM)
            break
        sge = peek(wr + WR_SG_LIST)
        length = np.int64(u32(sge + SGE_LENGTH)[0]) if ranges > 0 else np.int64(0)
        for i in range(1, ranges):
            length += np.int64(u32(sge + i * SGE_BYTES + SGE_LENGTH)[0])
        remote, rkey = peek(wr + WR_REMOTE_ADDR), peek(wr + WR_RKEY)
        message_free += message_ps
        byte_free = max(message_free, byte_free) + ((length * byte_cost) >> FRACTION_BITS)
        entry = ring + (head & mask) * ENTRY_WORDS * WORD
        poke(entry + E_ID * WORD, peek(wr + WR_ID))
        poke(entry + E_SIGNALED * WORD, np.int64(u32(wr + WR_SEND_FLAGS)[0]) & SEND_SIGNALED)
        if opcode == Opcode.SEND:
            poke(entry + E_STATUS * WORD, SENDING)
        elif ranges == 0:
            poke(entry + E_STATUS * WORD, WcStatus.SUCCESS)
        else:
            poke(entry + E_STATUS * WORD, key_status(keys, rkey, remote, length, opcode))
        poke(entry + E_DUE * WORD, byte_free + latency)
        if move != 0 or opcode == Opcode.SEND:
            moved = moves + (head & mask) * words * WORD
            poke(moved + M_REMOTE * WORD, remote)
            poke(moved + M_OPCODE * WORD, opcode)
            poke(moved + M_KEY * WORD, rkey)
            poke(moved + M_COUNT * WORD, ranges)
            for i in range(ranges):
                local, held = peek(sge + i * SGE_BYTES + SGE_ADDR), u32(sge + i * SGE_BYTES + SGE_LKEY)[0] != 0
                poke(moved + (M_RANGES + 2 * i) * WORD, local if held or opcode == Opcode.SEND else -local)
                poke(moved + (M_RANGES + 2 * i + 1) * WORD, np.int64(u32(sge + i * SGE_BYTES + SGE_LENGTH)[0]))
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
def arrive(queue, moved):
    """Move the bytes of a work request whose time has come; returns a WcStatus."""
    opcode, remote = peek(moved + M_OPCODE * WORD), peek(moved + M_REMOTE * WORD)
    if opcode == Opcode.SEND:
        return send_note(queue, peek(moved + M_RANGES * WORD), peek(moved + (M_RANGES + 1) * WORD))
    for i in range(peek(moved + M_COUNT * WORD)):
        local, length = peek(moved + (M_RANGES + 2 * i) * WORD), peek(moved + (M_RANGES + 2 * i + 1) * WORD)
        keys, rkey = peek(queue + Q_KEYS * WORD), peek(moved + M_KEY * WORD)
        status = move_bytes(queue, keys, rkey, opcode, local, remote, length)
        if status != WcStatus.SUCCESS:
            return status
        remote += length
    return np.int64(WcStatus.SUCCESS)


@kernel
def drain(queue, entries, wc):
    """Report up to `entries` completions of one queue that are due; returns how many."""
    head, tail = peek(queue + Q_HEAD * WORD), peek(queue + Q_TAIL * WORD)
    if head == tail:
        return np.int64(0)
    nic = peek(queue + Q_NIC * WORD)
    mask, ring, move = peek(queue + Q_MASK * WORD), peek(queue + Q_RING * WORD), peek(nic + N_MOVE * WORD)
    breaks, broken = peek(nic + N_BREAKS * WORD), load(queue + Q_BROKEN * WORD)
    moves, words = peek(queue + Q_MOVES * WORD), move_words(nic)
    now = time_of(queue, nic)
    if load(queue + Q_CUT * WORD) != 0:
        flush(queue, now)
        store(queue + Q_CUT * WORD, 0)
    n = np.int64(0)
    while n < entries and tail < head:
        entry = ring + (tail & mask) * ENTRY_WORDS * WORD
        if broken == 0 and peek(entry + E_DUE * WORD) > now:
            break
        status = broken if broken != 0 else peek(entry + E_STATUS * WORD)
        if status == SENDING or (move != 0 and status == WcStatus.SUCCESS):
            status = arrive(queue, moves + (tail & mask) * words * WORD)
        if breaks != 0 and status != WcStatus.SUCCESS:
            broken = np.int64(WcStatus.WR_FLUSH_ERR)
            store(queue + Q_BROKEN * WORD, broken)
        if status != WcStatus.SUCCESS or peek(entry + E_SIGNALED * WORD) != 0:
            wc = write_completion(wc, peek(entry + E_ID * WORD), status)
            n += 1
        tail += 1
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
    """When the oldest completion of any queue of this worker is due, ps; NEVER when nothing outstanding makes one."""
    queues = peek(cq + CQ_CQ_CONTEXT)
    due = np.int64(NEVER)
    for i in range(peek(queues + CQ_COUNT * WORD)):
        queue = peek(queues + (CQ_QUEUES + i) * WORD)
        mask, ring, latest = peek(queue + Q_MASK * WORD), peek(queue + Q_RING * WORD), np.int64(0)
        for at in range(peek(queue + Q_TAIL * WORD), peek(queue + Q_HEAD * WORD)):
            entry = ring + (at & mask) * ENTRY_WORDS * WORD
            latest = max(latest, peek(entry + E_DUE * WORD))
            if peek(queue + Q_BROKEN * WORD) != 0:
                return np.int64(0)
            if peek(entry + E_SIGNALED * WORD) != 0 or peek(entry + E_STATUS * WORD) != WcStatus.SUCCESS:
                due = min(due, latest)
                break
    return due


# ------------------------------------------------------------------------------ the provider
@dataclass(frozen=True)
class Nic:
    """What a NIC can do. Defaults: a 400 Gb/s port; ConnectX-6's 215 M messages/s rounded down; HDR-class latency.

    Attributes:
        faults: each of one of this NIC's work requests.
        signal: it asks engines to ask for a completion every so many work requests.
        gathers: most ranges of one work request.
        breaks: any error breaks the queue pair, which is then connected anew.
    """

    bits_per_s: int = 400 * 10**9
    messages_per_s: int = 200 * 10**6
    latency_ns: float = 2000
    move_bytes: bool = True
    faults: Sequence[Fault] = field(default=())
    signal: int = 1
    gathers: int = 1
    breaks: bool = False

    def __post_init__(self) -> None:
        if self.signal < 1 or not 1 <= self.gathers <= limits.SLICES_GATHERED:
            raise UsageError(f"a NIC has signal >= 1 and gathers 1 to {limits.SLICES_GATHERED}, got {self!r}")
        if (self.signal > 1 or self.breaks) and any(fault.action == Action.REORDER for fault in self.faults):
            raise UsageError("a completion out of order says nothing of those before it: reorder with signal=1 only, "
                             "and on a NIC that does not break")  # fmt: skip
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


class Rail:
    """One NIC of an engine: its words, and whether it can be reached."""

    def __init__(self, nic: Nic) -> None:
        self.nic, self.down = nic, False
        plan = sorted((fault.at, int(fault.action), fault.value) for fault in nic.faults)
        if len({at for at, _, _ in plan}) < len(plan):
            raise UsageError("a fault plan may hold one fault a work request")
        self.plan = np.array([*plan, (-1, 0, 0)], np.int64)
        self.words = aligned(NIC_WORDS)
        self.words[[N_MESSAGE_PS, N_BYTE_COST]] = nic.message_ps, nic.byte_cost
        self.words[[N_LATENCY, N_MOVE]] = round(nic.latency_ns * PS_PER_NS), nic.move_bytes
        self.words[[N_GATHERS, N_BREAKS]] = nic.gathers, nic.breaks
        self.words[[N_PLAN, N_PLAN_LEFT]] = address_of(self.plan), len(plan)
        self.words[N_CLOCK] = ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0
        self.words[N_STARTED] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Emulated(InProcessProvider):
    """Engines of one process over emulated NICs.

    Args:
        nics: one a rail; one of the default kind when none is given.
        clocks: addresses of virtual clocks, one a worker, or none.
    """

    name = "emulated"
    post_send = post_send
    poll_cq = poll_cq
    entry_words = ENTRY_WORDS

    def __init__(self, *nics: Nic, clocks: Sequence[int] = ()) -> None:
        super().__init__()
        if len(nics) > limits.NICS:
            raise UsageError(f"an engine has at most {limits.NICS} NICs, got {len(nics)}")
        self.nics = nics or (Nic(),)
        self.rails = len(self.nics)
        self.clocks = clocks
        self._rails = [Rail(nic) for nic in self.nics]
        self._mender: Mender | None = None
        self._by_pair: dict[int, Queue] = {}

    def open(
        self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = limits.PEERS
    ) -> list[list[CompletionQueue]]:
        """See `Provider.open`."""
        made = super().open(workers, queue_depth, inbox, peers)
        if any(nic.breaks for nic in self.nics):
            self._mender = Mender(self._fail, self._renew, self.background)
            self.trouble_fd = self._mender.descriptor
        return made

    def prepare(self, queue: Queue, worker: int) -> None:
        """Bind the queue to its NIC, and to its worker's clock when that is virtual."""
        nic = self._rails[queue.rail].words
        queue.words[Q_NIC] = address_of(nic)
        queue.words[Q_NOW] = self.clocks[worker] if self.clocks else 0
        queue.moves = aligned((int(queue.words[Q_MASK]) + 1) * (M_RANGES + 2 * int(nic[N_GATHERS])))
        queue.words[Q_MOVES] = address_of(queue.moves)
        self._by_pair[queue.pair.address] = queue

    def pair_of(self, queue: Queue, peer: InProcess) -> QueuePair:
        """See `InProcessProvider.pair_of`. A queue's weight is its NIC's rate beside the fastest one's."""
        nic = self.nics[queue.rail]
        return queue.pair._replace(
            cq=queue.rail,
            lkeys=queue.rail,
            rkeys=queue.rail % peer.rails,
            signal=nic.signal,
            gathers=nic.gathers,
            weight=max(1, nic.bits_per_s * WEIGHT_ONE // max(other.bits_per_s for other in self.nics)),
            breaks=nic.breaks,
        )

    def start(self, peer: str, queues: Sequence[QueueRow], ctl: int) -> None:
        """See `Provider.start`."""
        if self._mender is not None:
            self._mender.watch([row for row in queues if row.pair.breaks], ctl)

    def stop(self, peer: str, queues: Sequence[QueueRow]) -> None:
        """See `Provider.stop`."""
        if self._mender is not None:
            self._mender.drop(queues)

    def disconnect(self, peer: str) -> None:
        """See `Provider.disconnect`: queue pairs that break are mended no more."""
        if self._mender is not None and peer in self.peers:
            pairs = {queue.pair.address for queue in self._queues_of(peer)}
            self._mender.lose(lambda row: row.pair.address in pairs)

    def close(self) -> None:
        """See `Provider.close`."""
        if self._mender is not None:
            self._mender.close()
            self._mender, self.trouble_fd = None, Provider.trouble_fd
        super().close()
        self._by_pair.clear()

    # ------------------------------------------------------------------------------ rails that break
    def take_down(self, rail: int) -> None:
        """Let a breaking rail reach nobody, as when its cable is pulled: its queue pairs break, probing them fails."""
        with self._breaking(rail).lock:
            self._rails[rail].down = True
            for queue in self._by_pair.values():
                if queue.rail == rail:
                    put(queue.words, Q_BROKEN, WcStatus.RETRY_EXC_ERR)
            self._breaking(rail).break_all(lambda row: row.pair.lkeys == rail)

    def bring_up(self, rail: int) -> None:
        """Let a rail that was taken down reach its peers again: its queue pairs are connected anew and probed."""
        with self._breaking(rail).lock:
            self._rails[rail].down = False
        self._breaking(rail).look_again()

    def _breaking(self, rail: int) -> Mender:
        if self._mender is None or not self.nics[rail].breaks:
            raise UsageError(f"only a rail whose NIC breaks, of an open engine, can be taken down; {rail} is none")
        return self._mender

    def _fail(self, row: QueueRow) -> None:
        words = self._by_pair[row.pair.address].words
        if words[Q_BROKEN] == 0:
            put(words, Q_BROKEN, WcStatus.WR_FLUSH_ERR)

    def _renew(self, row: QueueRow) -> bool:
        queue = self._by_pair[row.pair.address]
        down = self._rails[queue.rail].down
        put(queue.words, Q_BROKEN, WcStatus.RETRY_EXC_ERR if down else 0)
        return not down
