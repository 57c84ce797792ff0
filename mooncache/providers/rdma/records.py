"""The records of notifications over RDMA; see `notes` for how they are used."""

import numpy as np

from mooncache import limits
from mooncache.kernels.records.base import record_at, row
from mooncache.kernels.records.verbs import RECV_WR, SEND_WR, SGE, WC
from mooncache.providers.records import PORT_FIELDS

LOT = 16  # completions taken at once

HUB = row(
    [
        ("lock", np.int64),  # 1: taken, by a worker or by whoever changes records
        ("inbox", np.int64),  # address of the engine's
        ("records", np.int64),  # address of RECORD[]
        ("nics", np.int64),
        ("nic_rows", np.int64),  # address of NOTE_NIC[nics]
        ("get_event", np.int64),  # address of libibverbs' ibv_get_cq_event
        ("bad_wr", np.int64),  # what post_send refused
        ("event", np.int64, 2),  # what get_event writes
        ("wr", SEND_WR),  # what is being posted
        ("sge", SGE),
        ("recv", RECV_WR),
        ("wc", WC, LOT),
    ]
)  # one a provider

NOTE_NIC = row(
    [
        ("cq", np.int64),  # address of the ibv_cq of these queue pairs
        ("channel", np.int64),  # address of its ibv_comp_channel
        ("armed", np.int64),  # 1: an event is made at the next mail
        ("due", np.int64),  # 1: one has been made
        ("events", np.int64),  # fetched and not acknowledged
    ]
)

RAIL = row(
    [
        ("qp", np.int64),  # address of the ibv_qp
        ("lkey", np.int64),  # of our memory
        ("address", np.int64),  # where the peer's memory is
        ("rkey", np.int64),
        ("up", np.int64),  # 1: nothing has gone wrong since it was raised
        ("buffer", np.int64),  # of a mailbox: address where the peer writes
    ]
)

RECORD = row(
    [
        ("incarnation", np.int64),  # 0: not in use
        ("number", np.int64),  # of the last notification
        ("buffer", np.int64),  # address of what is sent: a notification with its length, or an answer
        ("answer", np.int64),  # of an outbox: address where the peer writes its answers
        ("rail_count", np.int64),
        ("rail", np.int64),  # that the last notification went over
        ("length", np.int64),  # its bytes
        ("gone", np.int64),  # address of the word that says that the peer is
        ("outcome", np.int64),  # of a mailbox: of the last notification, DELIVERED or FULL
        ("sent", np.int64),  # 1: it is on its way
        ("sender", np.int64),  # of a mailbox: address of who writes to it
        ("most", np.int64),  # of an outbox: bytes of the longest notification that the peer takes
        ("rails", RAIL, limits.NICS),
    ]
)  # an outbox (a connection of ours) or a mailbox (a peer's)

NOTE_QUEUE = row(
    [
        ("hub", np.int64),
        ("record", np.int64),  # address of its outbox
        ("id", np.int64),  # wr_id of what is on its way
        ("busy", np.int64),  # 1: something is, or its end was not reported yet
    ]
)  # one a worker and connection

NOTE_PORT = row([*PORT_FIELDS, ("hub", np.int64), ("serves", np.int64)])  # serves: 1, the worker serves the NICs
hub_at, nic_at, rail_at, note_record_at = record_at(HUB), record_at(NOTE_NIC), record_at(RAIL), record_at(RECORD)
queue_at, port_at = record_at(NOTE_QUEUE), record_at(NOTE_PORT)
