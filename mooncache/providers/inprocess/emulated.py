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

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mooncache import limits
from mooncache.errors import UsageError
from mooncache.kernels.account import CLOCK_MONOTONIC, NS_PER_S
from mooncache.kernels.arrays import WORD, Row, address_of, aligned, function_address, rows_of
from mooncache.kernels.atomics import call_clock_gettime, i64, pause
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.records.base import (
    acquire,
    address,
    behind,
    cell_at,
    missing,
    record_at,
    release,
    row,
    swap,
    where,
)
from mooncache.kernels.records.queue import WEIGHT_ONE
from mooncache.kernels.records.verbs import send_wr_at, sge_at
from mooncache.kernels.state import CompletionQueue, QueuePair, QueueRow
from mooncache.kernels.verbs import EINVAL, ENOMEM, SEND_SIGNALED, WC_BYTES, WcStatus
from mooncache.providers.base import Provider
from mooncache.providers.device import Queue, key_status, port_of, queue_of, write_completion
from mooncache.providers.inprocess.base import InProcess, InProcessProvider, move_bytes, port_at, queue_at, send_note
from mooncache.providers.inprocess.faults import PS_PER_NS, Action, Fault
from mooncache.providers.inprocess.repair import Mender

PS_PER_S = 10**12
FRACTION_BITS = 20  # of the picoseconds a byte takes
NEVER = (1 << 62) - 1

NIC = row(
    [
        ("lock", np.int64),  # 1: taken
        ("message_free", np.int64),  # when the server of messages is, ps
        ("byte_free", np.int64),  # when that of bytes is, ps
        ("message_ps", np.int64),  # a message takes
        ("byte_cost", np.int64),  # a byte takes, ps << FRACTION_BITS
        ("latency", np.int64),  # ps
        ("move", np.int64),  # 1: bytes are moved
        ("plan", np.int64),  # address of the next FAULT
        ("plan_left", np.int64),  # how many there are
        ("posted", np.int64),  # work requests
        ("clock", np.int64),  # address of libc's clock_gettime
        ("started", np.int64),  # ns
        ("gathers", np.int64),  # most ranges of a work request
        ("breaks", np.int64),  # 1: any error breaks a queue pair
    ]
)  # shared by the queue pairs of one engine on one rail
ENTRY = np.dtype(
    [
        ("id", np.int64),  # wr_id
        ("status", np.int64),  # WcStatus, or SENDING
        ("signaled", np.int64),  # a completion is asked for
        ("due", np.int64),  # when it ends, ps
    ]
)
MOVE = np.dtype(
    [("remote", np.int64), ("opcode", np.int64), ("key", np.int64), ("count", np.int64)]
)  # what a work request moves; behind it RANGE[gathers], of which `count` are meant
RANGE = np.dtype([("address", np.int64), ("length", np.int64)])  # the address negated as in `move_bytes`
FAULT = np.dtype([("at", np.int64), ("action", np.int64), ("value", np.int64)])  # of the plan: at which work request
MOVE_BYTES, RANGE_BYTES = MOVE.itemsize, RANGE.itemsize
PLACE_WORDS = 3  # of an entry, what changes places with another's: all but the time
nic_at, entry_at, move_at = record_at(NIC), record_at(ENTRY), record_at(MOVE)
range_at, fault_at = record_at(RANGE), record_at(FAULT)
SENDING = -1  # status of a notification until its time has come


# ------------------------------------------------------------------------------ kernels
@kernel
def time_of(queue, nic):
    """Picoseconds: the virtual clock the queue is bound to, or real time since the NIC was opened."""
    if queue.now != 0:
        return cell_at(queue.now).value
    call_clock_gettime(nic.clock, CLOCK_MONOTONIC, where(queue, "timespec"))
    return (queue.timespec.seconds * NS_PER_S + queue.timespec.ns - nic.started) * PS_PER_NS


@kernel
def flush(queue, nic_time):
    """Break the queue: everything outstanding ends as flushed, now."""
    mask, ring = queue.mask, queue.ring
    for i in range(queue.tail, queue.head):
        entry = entry_at(ring, i & mask)
        entry.status = WcStatus.WR_FLUSH_ERR
        entry.due = nic_time


@kernel
def move_of(queue, nic, at):
    """What work request number `at` moves."""
    return move_at(queue.moves + (at & queue.mask) * (MOVE_BYTES + nic.gathers * RANGE_BYTES))


@kernel
def swap_words(here, there, words):
    """Exchange `words` words at two addresses."""
    one, other = i64(here), i64(there)
    for i in range(words):
        one[i], other[i] = other[i], one[i]


@kernel
def swap_places(queue, nic, head, back):
    """Let the newest completion and the one `back` before it change places; their times stay in order."""
    ring, mask, other = queue.ring, queue.mask, head - min(back, head - queue.tail)
    swap_words(address(entry_at(ring, head & mask)), address(entry_at(ring, other & mask)), PLACE_WORDS)
    words = (MOVE_BYTES + nic.gathers * RANGE_BYTES) // WORD
    swap_words(address(move_of(queue, nic, head)), address(move_of(queue, nic, other)), words)


@kernel
def suffer(queue, nic, head, nic_time):
    """Apply the fault planned for the work request just queued at `head`, if there is one."""
    plan = fault_at(nic.plan)
    entry = entry_at(queue.ring, head & queue.mask)
    action, value = plan.action, plan.value
    if action == Action.DELAY:
        entry.due += value
    elif action == Action.FAIL:
        entry.status = value
    elif action == Action.REORDER:
        swap_places(queue, nic, head, value)
    else:
        queue.head = head + 1
        flush(queue, nic_time)
    nic.plan = behind(plan)
    nic.plan_left -= 1


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Pass a chain through the NIC's servers and queue its completions; ENOMEM when the queue is full.

    A work request without ranges moves nothing, whatever its key, as a write of no bytes does.
    """
    queue, wr = queue_at(queue_of(qp)), send_wr_at(wr)
    nic = nic_at(queue.nic)
    head, tail = queue.head, queue.tail
    mask, limit = queue.mask, queue.limit
    ring, keys = queue.ring, queue.keys
    while swap(nic, "lock", 1) != 0:
        pause()
    now = time_of(queue, nic)
    message_ps, byte_cost = nic.message_ps, nic.byte_cost
    latency, move = nic.latency, nic.move
    gathers = nic.gathers
    message_free = max(now, nic.message_free)
    byte_free = nic.byte_free
    posted, planned = nic.posted, nic.plan_left
    error = np.int32(0)
    while not missing(wr):
        ranges, opcode = np.int64(wr.num_sge), np.int64(wr.opcode)
        if head - tail >= limit or ranges > gathers:
            cell_at(bad_wr).value = address(wr)
            error = np.int32(EINVAL if ranges > gathers else ENOMEM)
            break
        sge = wr.sg_list
        length = np.int64(0)
        for i in range(ranges):
            length += np.int64(sge_at(sge, i).length)
        remote, rkey = wr.remote_addr, wr.rkey
        message_free += message_ps
        byte_free = max(message_free, byte_free) + ((length * byte_cost) >> FRACTION_BITS)
        entry = entry_at(ring, head & mask)
        entry.id = wr.wr_id
        entry.signaled = np.int64(wr.send_flags) & SEND_SIGNALED
        if opcode == Opcode.SEND:
            entry.status = SENDING
        elif ranges == 0:
            entry.status = WcStatus.SUCCESS
        else:
            entry.status = key_status(keys, rkey, remote, length, opcode)
        entry.due = byte_free + latency
        if move != 0 or opcode == Opcode.SEND:
            moved = move_of(queue, nic, head)
            moved.remote = remote
            moved.opcode = opcode
            moved.key = rkey
            moved.count = ranges
            for i in range(ranges):
                local, held = sge_at(sge, i).addr, sge_at(sge, i).lkey != 0
                part = range_at(behind(moved), i)
                part.address = local if held or opcode == Opcode.SEND else -local
                part.length = sge_at(sge, i).length
        if planned > 0 and fault_at(nic.plan).at == posted:
            suffer(queue, nic, head, now)
            planned -= 1
        head += 1
        posted += 1
        wr = send_wr_at(wr.next)
    queue.head = head
    nic.message_free = message_free
    nic.byte_free = byte_free
    nic.posted = posted
    release(nic, "lock", 0)
    return error


@kernel
def arrive(queue, moved):
    """Move the bytes of a work request whose time has come; returns a WcStatus."""
    opcode, remote = moved.opcode, moved.remote
    if opcode == Opcode.SEND:
        note = range_at(behind(moved))
        return send_note(queue, note.address, note.length)
    for i in range(moved.count):
        part = range_at(behind(moved), i)
        status = move_bytes(queue, queue.keys, moved.key, opcode, part.address, remote, part.length)
        if status != WcStatus.SUCCESS:
            return status
        remote += part.length
    return np.int64(WcStatus.SUCCESS)


@kernel
def drain(queue, entries, wc):
    """Report up to `entries` completions of one queue that are due; returns how many."""
    head, tail = queue.head, queue.tail
    if head == tail:
        return np.int64(0)
    nic = nic_at(queue.nic)
    mask, ring, move = queue.mask, queue.ring, nic.move
    breaks, broken = nic.breaks, acquire(queue, "broken")
    now = time_of(queue, nic)
    if acquire(queue, "cut") != 0:
        flush(queue, now)
        release(queue, "cut", 0)
    n = np.int64(0)
    while n < entries and tail < head:
        entry = entry_at(ring, tail & mask)
        if broken == 0 and entry.due > now:
            break
        status = broken if broken != 0 else entry.status
        if status == SENDING or (move != 0 and status == WcStatus.SUCCESS):
            status = arrive(queue, move_of(queue, nic, tail))
        if breaks != 0 and status != WcStatus.SUCCESS:
            broken = np.int64(WcStatus.WR_FLUSH_ERR)
            release(queue, "broken", broken)
        if status != WcStatus.SUCCESS or entry.signaled != 0:
            wc = write_completion(wc, entry.id, status)
            n += 1
        tail += 1
    queue.tail = tail
    return n


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Due completions of all queues of this worker; each poll starts at the next queue, so that none starves."""
    port = port_at(port_of(cq))
    count, turn = port.count, port.turn
    taken = np.int64(0)
    for i in range(count):
        at = (turn + i) % count
        taken += drain(queue_at(i64(behind(port))[at]), np.int64(entries) - taken, wc + taken * WC_BYTES)
    port.turn = turn + 1
    return np.int32(taken)


@callback("int64(int64)")
def next_completion(cq):
    """When the oldest completion of any queue of this worker is due, ps; NEVER when nothing outstanding makes one."""
    port = port_at(port_of(cq))
    due = np.int64(NEVER)
    for i in range(port.count):
        queue = queue_at(i64(behind(port))[i])
        mask, ring, latest = queue.mask, queue.ring, np.int64(0)
        for at in range(queue.tail, queue.head):
            entry = entry_at(ring, at & mask)
            latest = max(latest, entry.due)
            if queue.broken != 0:
                return np.int64(0)
            if entry.signaled != 0 or entry.status != WcStatus.SUCCESS:
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
    """One NIC of an engine: its record, and whether it can be reached."""

    def __init__(self, nic: Nic) -> None:
        self.nic, self.down = nic, False
        plan = sorted((fault.at, int(fault.action), fault.value) for fault in nic.faults)
        if len({at for at, _, _ in plan}) < len(plan):
            raise UsageError("a fault plan may hold one fault a work request")
        self.plan = np.array([*plan, (-1, 0, 0)], np.int64)
        self.row = Row(rows_of(NIC))
        self.row.set(
            message_ps=nic.message_ps,
            byte_cost=nic.byte_cost,
            latency=round(nic.latency_ns * PS_PER_NS),
            move=nic.move_bytes,
            gathers=nic.gathers,
            breaks=nic.breaks,
            plan=address_of(self.plan),
            plan_left=len(plan),
            clock=function_address("clock_gettime"),
            started=time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        )


class Emulated(InProcessProvider):
    """Engines of one process over emulated NICs.

    Args:
        nics: one a rail; one of the default kind when none is given.
        clocks: addresses of virtual clocks, one a worker, or none.
    """

    name = "emulated"
    post_send = post_send
    poll_cq = poll_cq
    entry = ENTRY

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
        nic = self._rails[queue.rail].row
        queue.moves = aligned((queue.row["mask"] + 1) * (MOVE_BYTES + nic["gathers"] * RANGE_BYTES) // WORD)
        queue.row.set(nic=nic.address, now=self.clocks[worker] if self.clocks else 0, moves=address_of(queue.moves))
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
                    queue.row.put("broken", WcStatus.RETRY_EXC_ERR)
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
        own = self._by_pair[row.pair.address].row
        if own["broken"] == 0:
            own.put("broken", WcStatus.WR_FLUSH_ERR)

    def _renew(self, row: QueueRow) -> bool:
        queue = self._by_pair[row.pair.address]
        down = self._rails[queue.rail].down
        queue.row.put("broken", WcStatus.RETRY_EXC_ERR if down else 0)
        return not down
