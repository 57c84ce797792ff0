"""The kernels of an emulated NIC: work requests pass through its servers, and complete when their time has come.

    post --> [message server] --> [byte server] --> latency --> completion, in order on each queue
              1 / message rate      length / rate

Time is the real clock's, or an actor's virtual clock in the simulation: the same functions serve both, in picoseconds
(512 bytes at 400 Gb/s take 10,240). A work request may gather several ranges, and makes a completion if it asks for
one or fails. Where a NIC *breaks*, an error breaks the queue pair, as on a real one: what is behind it, or posted
later, is flushed, in order, until it is connected anew.
"""

import numpy as np

from mooncache.kernels.account import CLOCK_MONOTONIC, NS_PER_S
from mooncache.kernels.arrays import WORD
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
from mooncache.kernels.records.verbs import send_wr_at, sge_at
from mooncache.kernels.verbs import EINVAL, ENOMEM, SEND_SIGNALED, WC_BYTES, WcStatus
from mooncache.providers.device import port_of, queue_of, write_completion
from mooncache.providers.inprocess.base import move_bytes, port_at, queue_at, send_note
from mooncache.providers.inprocess.faults import PS_PER_NS, Action
from mooncache.providers.keys import key_status

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


@kernel
def time_of(queue, nic):
    """Return the time in ps: of the virtual clock the queue is bound to, or real time since the NIC was opened."""
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
    """Return the MOVE of work request number `at`."""
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


@kernel
def length_of(wr):
    """Return the bytes of a work request."""
    length = np.int64(0)
    for i in range(np.int64(wr.num_sge)):
        length += np.int64(sge_at(wr.sg_list, i).length)
    return length


@kernel
def status_of(keys, wr, length):
    """Return the status that a work request will end with, SENDING for a notification: faults may still change it."""
    opcode = np.int64(wr.opcode)
    if opcode == Opcode.SEND:
        return np.int64(SENDING)
    if wr.num_sge == 0:
        return np.int64(WcStatus.SUCCESS)
    return np.int64(key_status(keys, wr.rkey, wr.remote_addr, length, opcode))


@kernel
def note_move(moved, wr):
    """Copy the ranges of a work request, whose struct is another's by the time that they are moved."""
    opcode, ranges = np.int64(wr.opcode), np.int64(wr.num_sge)
    moved.remote = wr.remote_addr
    moved.opcode = opcode
    moved.key = wr.rkey
    moved.count = ranges
    for i in range(ranges):
        sge, part = sge_at(wr.sg_list, i), range_at(behind(moved), i)
        part.address = sge.addr if sge.lkey != 0 or opcode == Opcode.SEND else -sge.addr
        part.length = sge.length


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
        length = length_of(wr)
        message_free += message_ps
        byte_free = max(message_free, byte_free) + ((length * byte_cost) >> FRACTION_BITS)
        entry = entry_at(ring, head & mask)
        entry.id = wr.wr_id
        entry.signaled = np.int64(wr.send_flags) & SEND_SIGNALED
        entry.status = status_of(keys, wr, length)
        entry.due = byte_free + latency
        if move != 0 or opcode == Opcode.SEND:
            note_move(move_of(queue, nic, head), wr)
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
    """Move the bytes of a work request whose time has come; return a WcStatus."""
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
    """Report up to `entries` completions of one queue that are due; return how many."""
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
    """Report due completions of all queues of this worker; each poll starts at the next queue, so that none starves."""
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
    """Return when the oldest completion of any queue of this worker is due, ps; NEVER when nothing makes one."""
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
