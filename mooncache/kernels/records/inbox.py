"""An inbox, its entries, and its senders; see kernels/inbox.py."""

import numpy as np

from mooncache.kernels.records.base import CELL, record_at, row

SENDERS = 4096  # counts: senders whose names fall together share one
INBOX = row(
    [
        ("lock", np.int64),  # 1: taken
        ("head", np.int64),  # entries ever put in
        ("tail", np.int64),  # entries ever taken out
        ("event_fd", np.int64),  # readable while there is something to fetch
        ("write", np.int64),  # address of libc's
        ("read", np.int64),  # likewise
        ("buffer", np.int64),  # what is written to the eventfd, and where it is read to
        ("closed", np.int64),  # 1: refuse what comes
        ("notes", np.int64),  # places
        ("bytes", np.int64),  # of the longest note, whole words
    ]
)  # behind it int64[SENDERS], how many notes of each there are; then the entries
COUNTS_BYTES = SENDERS * CELL.itemsize
ENTRY = np.dtype(
    [
        ("length", np.int64),  # bytes behind this: the sender's name with its length, then the note
        ("count", np.int64),  # which of the counts is the sender's
    ]
)
SENDER = np.dtype(
    [
        ("count", np.int64),  # which of the counts
        ("length", np.int64),  # bytes behind this: its name's length, its name
    ]
)
inbox_at, entry_at, sender_at = record_at(INBOX), record_at(ENTRY), record_at(SENDER)
