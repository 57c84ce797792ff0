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

from mooncache import limits
from mooncache.kernels.account import raise_word
from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import call_poll_cq, call_post_send, copy, exchange, load, pause, peek, poke, store, u32
from mooncache.kernels.inbox import deliver
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.verbs import (
    CONTEXT_POST_RECV,
    CONTEXT_REQ_NOTIFY_CQ,
    CQ_CQ_CONTEXT,
    ENOMEM,
    QP_QP_CONTEXT,
    SEND_SIGNALED,
    SGE_ADDR,
    SGE_LENGTH,
    WC_BYTES,
    WC_STATUS,
    WC_WR_ID,
    WR_ID,
    WR_NEXT,
    WR_NUM_SGE,
    WR_REMOTE_ADDR,
    WR_RKEY,
    WR_SEND_FLAGS,
    WR_SG_LIST,
    WcStatus,
    poll_cq,
    post_send,
)

WRITE, WRITE_WITH_IMM = 0, 1  # ibv_wr_opcode
SEND_SOLICITED = 4  # wakes who sleeps on the other side
WC_IMM_DATA = 24  # struct ibv_wc
RECV_WR_BYTES = 32  # struct ibv_recv_wr
RECV_WR_ID, RECV_NEXT, RECV_SG_LIST, RECV_NUM_SGE = 0, 8, 16, 24
OUTCOME_BITS = 8
NUMBERS = 1 << 20  # sequence numbers; 0 is never used
DELIVERED, FULL = 1, 2  # outcomes
RECEIVES = 4  # receives posted on each of these queue pairs: one is used at a time, and one again after each repair
LOT = 16  # completions taken at once

# hub words: one a provider
(
    H_LOCK, H_INBOX, H_RECORDS, H_NICS, H_NIC_ROWS, H_GET_EVENT, H_WC, H_SCRATCH, H_SCRATCH_1, H_WR, H_SGE, H_RECV,
    HUB_WORDS,
) = (*range(12), 16)  # fmt: skip
# hub's row for each NIC
N_CQ, N_CHANNEL, N_ARMED, N_DUE, N_EVENTS, NIC_WORDS = 0, 1, 2, 3, 4, 8
# records: an outbox (a connection of ours) or a mailbox (a peer's); `INCARNATION` 0: not in use
R_INCARNATION, R_NUMBER, R_BUFFER, R_ANSWER, R_RAILS, R_RAIL, R_LENGTH, R_GONE, R_OUTCOME, R_SENT = range(10)
R_SENDER = 10  # of a mailbox: who writes to it
R_MOST = 11  # of an outbox: bytes of the longest notification that the peer takes
R_OWN = 16  # then the rails' rows
RAILS = limits.NICS
RAIL_QP, RAIL_LKEY, RAIL_ADDRESS, RAIL_RKEY, RAIL_UP, RAIL_BUFFER, RAIL_WORDS = 0, 1, 2, 3, 4, 5, 8
RECORD_WORDS = R_OWN + RAILS * RAIL_WORDS
# note queue words: one a worker and connection
Q_HUB, Q_RECORD, Q_ID, Q_BUSY, QUEUE_WORDS = 0, 1, 2, 3, 8
# completion queue words: one a worker
C_HUB, C_SERVES, C_COUNT, C_QUEUES = 0, 1, 2, 3


class Kind(IntEnum):
    """What a work request of the NIC was for."""

    NOTE = 1
    MAIL = 2  # a receive
    ANSWER = 3


# ------------------------------------------------------------------------------ kernels
@kernel
def lock(hub):
    """Keep other workers and those who change records out."""
    while exchange(hub + H_LOCK * WORD, 1) != 0:
        pause()


@kernel
def unlock(hub):
    """Let others in."""
    store(hub + H_LOCK * WORD, 0)


@kernel
def record_at(hub, index):
    """Address of a record."""
    return peek(hub + H_RECORDS * WORD) + index * RECORD_WORDS * WORD


@kernel
def rail_at(record, rail):
    """Address of a record's row for a rail."""
    return record + (R_OWN + rail * RAIL_WORDS) * WORD


@kernel
def work_request_id(hub, record, rail, kind):
    """The id of a work request of this record."""
    index = (record - peek(hub + H_RECORDS * WORD)) // (RECORD_WORDS * WORD)
    return index << 32 | peek(record + R_INCARNATION * WORD) << 16 | rail << 8 | kind


@kernel
def post_write(hub, record, rail, kind, imm, address, length):
    """Post one write of the bytes at `address`, a note's with immediate data; whether the NIC took it."""
    row, wr, sge = rail_at(record, rail), peek(hub + H_WR * WORD), peek(hub + H_SGE * WORD)
    poke(sge + SGE_ADDR, address)
    poke(sge + SGE_LENGTH, length | peek(row + RAIL_LKEY * WORD) << 32)
    poke(wr + WR_ID, work_request_id(hub, record, rail, kind))
    poke(wr + WR_NEXT, 0)
    poke(wr + WR_SG_LIST, sge)
    if kind == Kind.NOTE:
        poke(wr + WR_NUM_SGE, WRITE_WITH_IMM << 32 | 1)
        poke(wr + WR_SEND_FLAGS, SEND_SIGNALED | SEND_SOLICITED | imm << 32)
    else:
        poke(wr + WR_NUM_SGE, WRITE << 32 | 1)
        poke(wr + WR_SEND_FLAGS, SEND_SIGNALED)
    poke(wr + WR_REMOTE_ADDR, peek(row + RAIL_ADDRESS * WORD))
    poke(wr + WR_RKEY, peek(row + RAIL_RKEY * WORD))
    return post_send(peek(row + RAIL_QP * WORD), wr, hub + H_SCRATCH * WORD) == 0


@kernel
def send(hub, record):
    """Post the notification in the outbox on a rail that is up; it waits when none is."""
    poke(record + R_SENT * WORD, 0)
    for i in range(peek(record + R_RAILS * WORD)):
        rail = (peek(record + R_RAIL * WORD) + i) % peek(record + R_RAILS * WORD)
        row = rail_at(record, rail)
        if peek(row + RAIL_UP * WORD) == 0:
            continue
        number, buffer = peek(record + R_NUMBER * WORD), peek(record + R_BUFFER * WORD)
        if post_write(hub, record, rail, np.int64(Kind.NOTE), number, buffer, WORD + peek(buffer)):
            poke(record + R_RAIL * WORD, rail)
            poke(record + R_SENT * WORD, 1)
            return
        poke(row + RAIL_UP * WORD, 0)


@callback("int32(int64, int64, int64)")
def post_note(qp, wr, bad_wr):
    """The `post_send` of a note queue: one SEND at a time, copied into the outbox."""
    queue = peek(qp + QP_QP_CONTEXT)
    hub, record = peek(queue + Q_HUB * WORD), peek(queue + Q_RECORD * WORD)
    if peek(queue + Q_BUSY * WORD) != 0 or peek(wr + WR_NEXT) != 0:
        poke(bad_wr, wr)
        return np.int32(ENOMEM)
    sge = peek(wr + WR_SG_LIST)
    length = np.int64(u32(sge + SGE_LENGTH)[0])
    lock(hub)
    poke(queue + Q_ID * WORD, peek(wr + WR_ID))
    poke(queue + Q_BUSY * WORD, 1)
    if peek(record + R_INCARNATION * WORD) != 0:
        poke(record + R_LENGTH * WORD, length)
        if length <= peek(record + R_MOST * WORD):
            poke(peek(record + R_BUFFER * WORD), length)
            copy(peek(record + R_BUFFER * WORD) + WORD, peek(sge + SGE_ADDR), length)
            poke(record + R_NUMBER * WORD, peek(record + R_NUMBER * WORD) % (NUMBERS - 1) + 1)
            send(hub, record)
    unlock(hub)
    return np.int32(0)


@kernel
def outcome_of(queue, record):
    """How the notification on its way has ended, a WcStatus; -1 when it has not."""
    if peek(record + R_INCARNATION * WORD) == 0:
        return np.int64(WcStatus.REM_ABORT_ERR)
    if peek(record + R_LENGTH * WORD) > peek(record + R_MOST * WORD):
        return np.int64(WcStatus.RNR_RETRY_EXC_ERR)  # it was not sent
    answer = load(peek(record + R_ANSWER * WORD))
    if answer >> OUTCOME_BITS == peek(record + R_NUMBER * WORD):
        full = answer & ((1 << OUTCOME_BITS) - 1) == FULL
        return np.int64(WcStatus.RNR_RETRY_EXC_ERR if full else WcStatus.SUCCESS)
    if peek(peek(record + R_GONE * WORD)) != 0:
        return np.int64(WcStatus.REM_ABORT_ERR)
    return np.int64(-1)


@kernel
def settle_queue(hub, queue, wc):
    """Report how a queue's notification has ended, or send it over another rail; returns how many were written."""
    record = peek(queue + Q_RECORD * WORD)
    status = outcome_of(queue, record)
    if status < 0:
        rail = rail_at(record, peek(record + R_RAIL * WORD))
        if peek(record + R_SENT * WORD) == 0 or peek(rail + RAIL_UP * WORD) == 0:
            send(hub, record)
        return 0
    poke(wc + WC_WR_ID, peek(queue + Q_ID * WORD))
    u32(wc + WC_STATUS)[0] = status
    poke(queue + Q_BUSY * WORD, 0)
    return 1


# ------------------------------------------------------------------------------ serving
@kernel
def post_receive(hub, record, rail):
    """Post one more receive for a peer's mail; whether the NIC took it."""
    wr, qp = peek(hub + H_RECV * WORD), peek(rail_at(record, rail) + RAIL_QP * WORD)
    poke(wr + RECV_WR_ID, work_request_id(hub, record, rail, np.int64(Kind.MAIL)))
    poke(wr + RECV_NEXT, 0)
    poke(wr + RECV_SG_LIST, 0)
    poke(wr + RECV_NUM_SGE, 0)
    return call_post_send(peek(peek(qp) + CONTEXT_POST_RECV), qp, wr, hub + H_SCRATCH * WORD) == 0


@kernel
def take_mail(hub, record, rail, number):
    """A notification lies in a mailbox: deliver it unless that was done before, and answer."""
    if number != peek(record + R_NUMBER * WORD):
        inbox, who = peek(hub + H_INBOX * WORD), peek(record + R_SENDER * WORD)
        mailbox = peek(rail_at(record, rail) + RAIL_BUFFER * WORD)
        length = peek(mailbox)  # looked at once: the peer may write here any time
        put = length > 0 and deliver(inbox, who, mailbox + WORD, length)
        poke(record + R_NUMBER * WORD, number)
        poke(record + R_OUTCOME * WORD, DELIVERED if put else FULL)
    word = peek(record + R_BUFFER * WORD)
    poke(word, number << OUTCOME_BITS | peek(record + R_OUTCOME * WORD))
    post_receive(hub, record, rail)
    post_write(hub, record, rail, np.int64(Kind.ANSWER), 0, word, WORD)


@kernel
def serve_one(hub, nic, wc):
    """Act upon one completion of a NIC. Mail and failures are what an armed queue makes an event for."""
    wr_id, status = peek(wc + WC_WR_ID), np.int64(u32(wc + WC_STATUS)[0])
    rail, kind = (wr_id >> 8) & 0xFF, wr_id & 0xFF
    if kind == Kind.MAIL or status != WcStatus.SUCCESS:
        poke(nic + N_DUE * WORD, peek(nic + N_ARMED * WORD))
    record = record_at(hub, wr_id >> 32)
    if peek(record + R_INCARNATION * WORD) != (wr_id >> 16) & 0xFFFF:
        return
    if status != WcStatus.SUCCESS:
        poke(rail_at(record, rail) + RAIL_UP * WORD, 0)
    elif kind == Kind.MAIL:
        take_mail(hub, record, rail, np.int64(u32(wc + WC_IMM_DATA)[0]))


@kernel
def arm(hub, nic):
    """Have an event made at the next mail, if none is due. False when that was done before, True: poll once more.

    An event is fetched by the library's own function, which tells the driver; each costs a system call.
    """
    scratch = hub + H_SCRATCH * WORD
    if peek(nic + N_DUE * WORD) != 0:
        if call_post_send(peek(hub + H_GET_EVENT * WORD), peek(nic + N_CHANNEL * WORD), scratch, scratch + WORD) != 0:
            return False  # it is on its way
        raise_word(nic + N_EVENTS * WORD, 1)
        poke(nic + N_DUE * WORD, 0)
        poke(nic + N_ARMED * WORD, 0)
    if peek(nic + N_ARMED * WORD) != 0:
        return False
    cq = peek(nic + N_CQ * WORD)
    poke(nic + N_ARMED * WORD, 1)
    call_poll_cq(peek(peek(cq) + CONTEXT_REQ_NOTIFY_CQ), cq, 1, 0)  # 1: for solicited ones and failures only
    return True


@kernel
def serve_nic(hub, nic):
    """Take all that a NIC reports of these queue pairs."""
    cq, wc = peek(nic + N_CQ * WORD), peek(hub + H_WC * WORD)
    while True:
        taken = poll_cq(cq, LOT, wc)
        for i in range(taken):
            serve_one(hub, nic, wc + i * WC_BYTES)
        if taken < LOT and not arm(hub, nic):
            return


@callback("int32(int64, int32, int64)")
def poll_notes(cq, entries, wc):
    """The `poll_cq` of the note queues of one worker; the first worker also serves the NICs."""
    words = peek(cq + CQ_CQ_CONTEXT)
    hub, reported = peek(words + C_HUB * WORD), np.int64(0)
    if peek(words + C_SERVES * WORD) != 0:
        lock(hub)
        for i in range(peek(hub + H_NICS * WORD)):
            serve_nic(hub, peek(hub + H_NIC_ROWS * WORD) + i * NIC_WORDS * WORD)
        unlock(hub)
    for i in range(load(words + C_COUNT * WORD)):
        queue = peek(words + (C_QUEUES + i) * WORD)
        if peek(queue + Q_BUSY * WORD) != 0 and reported < entries:
            lock(hub)
            reported += settle_queue(hub, queue, wc + reported * WC_BYTES)
            unlock(hub)
    return np.int32(reported)


@kernel("int64(int64, int64, int64, int64)")
def open_rail(hub, record, rail, receives):
    """A rail's queue pair is connected: post its receives and let it be used. Returns how many receives it took."""
    lock(hub)
    n = 0
    for _ in range(receives):
        n += post_receive(hub, record, rail)
    poke(rail_at(record, rail) + RAIL_UP * WORD, 1)
    unlock(hub)
    return n


@kernel("int64(int64, int64, int64)")
def close_rail(hub, record, rail):
    """A rail's queue pair must not be used any more; all of them for rail -1, and the record is free."""
    lock(hub)
    if rail < 0:
        poke(record + R_INCARNATION * WORD, 0)
    else:
        poke(rail_at(record, rail) + RAIL_UP * WORD, 0)
    unlock(hub)
    return 0
