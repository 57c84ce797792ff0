"""A batch's row."""

import numpy as np

from mooncache.kernels.records.base import record_at, row

BATCH = row(
    [
        ("state", np.int64),  # BatchState, moved by kernels/batch.py only; its low half is the futex of waiters
        ("generation", np.int64),  # upper half of the handle
        ("remaining", np.int64),  # slices without an answer; written by the worker
        ("slices", np.int64),
        ("chunks", np.int64),
        ("first", np.int64),  # chunk
        ("last", np.int64),  # chunk
        ("peer", np.int64),
        ("opcode", np.int64),  # Opcode
        ("cursor", np.int64),  # chunk that the next slice to post is in, -1 when all are posted
        ("offset", np.int64),  # its offset in that chunk
        ("posted", np.int64),  # slices that a queue pair has
        ("failed", np.int64),  # slices
        ("deadline", np.int64),  # clock, ns; 0 none
        ("next", np.int64),  # next batch in the endpoint's queue of those with slices to post, -1
        ("worker", np.int64),
        ("waiters", np.int64),  # threads asleep on `state`
        ("awaited", np.int64),  # 1: write to the engine's eventfd when finished
        ("submitted_at", np.int64),  # ns (virtual: ps)
        ("finished_at", np.int64),
        ("retired_at", np.int64),  # epoch
        ("unposted", np.int64),  # slices from the cursor on
        ("cancelled", np.int64),  # 0, or the Status its unposted slices failed with
        ("cancel_asked", np.int64),
        ("note", np.int64),  # slot of the slice that carries its notification, or -1
        ("note_state", np.int64),  # Note
        ("note_next", np.int64),  # next batch in the endpoint's queue of those with a notification, -1
        ("taken", np.int64),  # 1: its worker knows it
        ("epoch", np.int64),  # its peer's when it was submitted
        ("look", np.int64),  # number of the look at its peer that its refused slices wait for
        ("renewals", np.int64),  # its peer's when it was submitted
    ]
)
batch_at = record_at(BATCH)
NEXT, NOTE_NEXT = (int(BATCH.fields[name][1]) for name in ("next", "note_next"))  # type: ignore[index]  # bytes
