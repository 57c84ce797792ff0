"""Notifications over RDMA: a write with immediate data into a mailbox at the peer, and an answer written back.

    sender                                                          receiver
    outbox: buffer, sequence number  --WRITE_WITH_IMM-->            mailbox, one a rail; the worker copies it
    answer word  <--WRITE (sequence number and outcome)--           into the inbox, if that is not full

A NIC's acknowledgement only says that bytes lie in a mailbox; the answer says that they are in the inbox, or that it
was full. An endpoint has one notification on its way at a time, so one outbox a connection does. When a rail breaks,
the notification goes over another; the receiver knows it by its number and does not deliver it twice.

To the kernels all this is one more queue pair and one more completion queue for each worker, whose post_send and
poll_cq are the functions here. The first worker also serves: it takes what the NICs report of these queue pairs, peers'
mail included. A lock keeps workers and the threads that open and close connections apart.

    immediate data: number        answer: number << 8 | outcome        mailbox: length, then the notification
    work request id: record << 32 | incarnation << 16 | rail << 8 | Kind
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import call_poll_cq, call_post_send, copy, i64, pause
from mooncache.kernels.inbox import deliver
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.records.base import acquire, address, behind, cell_at, index_in, release, swap, where
from mooncache.kernels.records.verbs import ibv_context_at, ibv_cq_at, ibv_qp_at, send_wr_at, sge_at, wc_at
from mooncache.kernels.verbs import ENOMEM, SEND_SIGNALED, WC_BYTES, WcStatus, poll_cq, post_send
from mooncache.providers.device import write_completion
from mooncache.providers.rdma.records import LOT, hub_at, nic_at, note_record_at, port_at, queue_at, rail_at

WRITE, WRITE_WITH_IMM = 0, 1  # ibv_wr_opcode
SEND_SOLICITED = 4  # wakes who sleeps on the other side
OUTCOME_BITS = 8
NUMBERS = 1 << 20  # sequence numbers; 0 is never used
DELIVERED, FULL = 1, 2  # outcomes
RECEIVES = 4  # receives posted on each of these queue pairs: one is used at a time, and one again after each repair


class Kind(IntEnum):
    """The purpose of a work request of the NIC."""

    NOTE = 1
    MAIL = 2  # a receive
    ANSWER = 3


# ------------------------------------------------------------------------------ kernels
@kernel
def lock(hub):
    """Take the lock against other workers and those who change records."""
    while swap(hub, "lock", 1) != 0:
        pause()


@kernel
def unlock(hub):
    """Release the lock."""
    release(hub, "lock", 0)


@kernel
def record_of(hub, index):
    """Return record number `index`."""
    return note_record_at(hub.records, index)


@kernel
def rail_of(record, rail):
    """Return a record's row for a rail."""
    return rail_at(where(record, "rails"), rail)


@kernel
def work_request_id(hub, record, rail, kind):
    """Return the id of a work request of this record."""
    index = index_in(hub.records, record)
    return index << 32 | record.incarnation << 16 | rail << 8 | kind


@kernel
def post_write(hub, record, rail, kind, imm, source, length):
    """Post one write of the bytes at `source`, a note's with immediate data; return whether the NIC took it."""
    row, wr, sge = rail_of(record, rail), hub.wr, hub.sge
    sge.addr = source
    sge.length = length
    sge.lkey = row.lkey
    wr.wr_id = work_request_id(hub, record, rail, kind)
    wr.next = 0
    wr.sg_list = address(sge)
    wr.num_sge = 1
    if kind == Kind.NOTE:
        wr.opcode = WRITE_WITH_IMM
        wr.send_flags = SEND_SIGNALED | SEND_SOLICITED
        wr.imm_data = imm
    else:
        wr.opcode = WRITE
        wr.send_flags = SEND_SIGNALED
    wr.remote_addr = row.address
    wr.rkey = row.rkey
    return post_send(row.qp, address(wr), where(hub, "bad_wr")) == 0


@kernel
def send(hub, record):
    """Post the notification in the outbox on a rail that is up; it waits when none is."""
    record.sent = 0
    for i in range(record.rail_count):
        rail = (record.rail + i) % record.rail_count
        row = rail_of(record, rail)
        if row.up == 0:
            continue
        number, buffer = record.number, record.buffer
        if post_write(hub, record, rail, np.int64(Kind.NOTE), number, buffer, WORD + cell_at(buffer).value):
            record.rail = rail
            record.sent = 1
            return
        row.up = 0


@callback("int32(int64, int64, int64)")
def post_note(qp, wr, bad_wr):
    """Post one SEND, which is copied into the outbox: the `post_send` of a note queue."""
    queue, wr = queue_at(ibv_qp_at(qp).qp_context), send_wr_at(wr)
    hub, record = hub_at(queue.hub), note_record_at(queue.record)
    if queue.busy != 0 or wr.next != 0:
        cell_at(bad_wr).value = address(wr)
        return np.int32(ENOMEM)
    sge = sge_at(wr.sg_list)
    length = np.int64(sge.length)
    lock(hub)
    queue.id = wr.wr_id
    queue.busy = 1
    if record.incarnation != 0:
        record.length = length
        if length <= record.most:
            cell_at(record.buffer).value = length
            copy(record.buffer + WORD, sge.addr, length)
            record.number = record.number % (NUMBERS - 1) + 1
            send(hub, record)
    unlock(hub)
    return np.int32(0)


@kernel
def outcome_of(queue, record):
    """Return how the notification on its way has ended, a WcStatus; -1 when it has not."""
    if record.incarnation == 0:
        return np.int64(WcStatus.REM_ABORT_ERR)
    if record.length > record.most:
        return np.int64(WcStatus.RNR_RETRY_EXC_ERR)  # it was not sent
    answer = acquire(cell_at(record.answer), "value")
    if answer >> OUTCOME_BITS == record.number:
        full = answer & ((1 << OUTCOME_BITS) - 1) == FULL
        return np.int64(WcStatus.RNR_RETRY_EXC_ERR if full else WcStatus.SUCCESS)
    if cell_at(record.gone).value != 0:
        return np.int64(WcStatus.REM_ABORT_ERR)
    return np.int64(-1)


@kernel
def settle_queue(hub, queue, wc):
    """Report how a queue's notification has ended, or send it over another rail; return how many were written."""
    record = note_record_at(queue.record)
    status = outcome_of(queue, record)
    if status < 0:
        rail = rail_of(record, record.rail)
        if record.sent == 0 or rail.up == 0:
            send(hub, record)
        return 0
    write_completion(wc, queue.id, status)
    queue.busy = 0
    return 1


# ------------------------------------------------------------------------------ serving
@kernel
def post_receive(hub, record, rail):
    """Post one more receive for a peer's mail; return whether the NIC took it."""
    wr, qp = hub.recv, rail_of(record, rail).qp
    wr.wr_id = work_request_id(hub, record, rail, np.int64(Kind.MAIL))
    wr.next = 0
    wr.sg_list = 0
    wr.num_sge = 0
    return call_post_send(ibv_context_at(ibv_qp_at(qp).context).post_recv, qp, address(wr), where(hub, "bad_wr")) == 0


@kernel
def take_mail(hub, record, rail, number):
    """Deliver the notification in a mailbox, unless that was done before, and answer."""
    if number != record.number:
        inbox, who = hub.inbox, record.sender
        mailbox = rail_of(record, rail).buffer
        length = cell_at(mailbox).value  # looked at once: the peer may write here any time
        put = length > 0 and deliver(inbox, who, mailbox + WORD, length)
        record.number = number
        record.outcome = DELIVERED if put else FULL
    word = record.buffer
    cell_at(word).value = number << OUTCOME_BITS | record.outcome
    post_receive(hub, record, rail)
    post_write(hub, record, rail, np.int64(Kind.ANSWER), 0, word, WORD)


@kernel
def serve_one(hub, nic, wc):
    """Act upon one completion of a NIC. Mail and failures are what an armed queue makes an event for."""
    wr_id, status = wc.wr_id, np.int64(wc.status)
    rail, kind = (wr_id >> 8) & 0xFF, wr_id & 0xFF
    if kind == Kind.MAIL or status != WcStatus.SUCCESS:
        nic.due = nic.armed
    record = record_of(hub, wr_id >> 32)
    if record.incarnation != (wr_id >> 16) & 0xFFFF:
        return
    if status != WcStatus.SUCCESS:
        rail_of(record, rail).up = 0
    elif kind == Kind.MAIL:
        take_mail(hub, record, rail, np.int64(wc.imm_data))


@kernel
def arm(hub, nic):
    """Have an event made at the next mail, if none is due. False when that was done before, True: poll once more.

    An event is fetched by the library's own function, which tells the driver; each costs a system call.
    """
    if nic.due != 0:
        if call_post_send(hub.get_event, nic.channel, where(hub, "event"), where(hub, "event") + WORD) != 0:
            return False  # it is on its way
        nic.events += 1
        nic.due = 0
        nic.armed = 0
    if nic.armed != 0:
        return False
    cq = nic.cq
    nic.armed = 1
    call_poll_cq(
        ibv_context_at(ibv_cq_at(cq).context).req_notify_cq, cq, 1, 0
    )  # 1: for solicited ones and failures only
    return True


@kernel
def serve_nic(hub, nic):
    """Take all that a NIC reports of these queue pairs."""
    wc = where(hub, "wc")
    while True:
        taken = poll_cq(nic.cq, LOT, wc)
        for i in range(taken):
            serve_one(hub, nic, wc_at(wc, i))
        if taken < LOT and not arm(hub, nic):
            return


@callback("int32(int64, int32, int64)")
def poll_notes(cq, entries, wc):
    """Poll the note queues of one worker, as their `poll_cq`; the first worker also serves the NICs."""
    port = port_at(ibv_cq_at(cq).cq_context)
    hub, reported = hub_at(port.hub), np.int64(0)
    if port.serves != 0:
        lock(hub)
        for i in range(hub.nics):
            serve_nic(hub, nic_at(hub.nic_rows, i))
        unlock(hub)
    for i in range(acquire(port, "count")):
        queue = queue_at(i64(behind(port))[i])
        if queue.busy != 0 and reported < entries:
            lock(hub)
            reported += settle_queue(hub, queue, wc + reported * WC_BYTES)
            unlock(hub)
    return np.int32(reported)


@kernel("int64(int64, int64, int64, int64)")
def open_rail(hub, record, rail, receives):
    """Post a rail's receives and let its connected queue pair be used. Return how many receives it took."""
    hub, record = hub_at(hub), note_record_at(record)
    lock(hub)
    n = 0
    for _ in range(receives):
        n += post_receive(hub, record, rail)
    rail_of(record, rail).up = 1
    unlock(hub)
    return n


@kernel("int64(int64, int64, int64)")
def close_rail(hub, record, rail):
    """Use a rail's queue pair no more; all of them for rail -1, and the record is free."""
    hub, record = hub_at(hub), note_record_at(record)
    lock(hub)
    if rail < 0:
        record.incarnation = 0
    else:
        rail_of(record, rail).up = 0
    unlock(hub)
    return 0
