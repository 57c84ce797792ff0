"""Scratch of a calling thread: the operands of its submit, the regions that it saw last, and the slot it fills next."""

import numpy as np

OPERANDS = np.dtype(
    [
        ("requests", np.int64),  # how many
        ("sources", np.int64),  # address of int64[requests], or of one that holds for all
        ("targets", np.int64),  # likewise
        ("lengths", np.int64),  # likewise; bytes
        ("source_step", np.int64),  # 1 for an array, 0 for one value
        ("target_step", np.int64),
        ("length_step", np.int64),
        ("note", np.int64),  # address of the notification
        ("note_length", np.int64),  # bytes; 0: none
    ]
)
SEEN = np.dtype(
    [
        ("position", np.int64),  # of a region in its table, -1: none yet
        ("base", np.int64),
        ("end", np.int64),
        ("slot", np.int64),
    ]
)
CURSOR = np.dtype(
    [
        ("chunk", np.int64),  # -1: slices are counted, not filled
        ("slot", np.int64),  # the next to fill
        ("end", np.int64),  # of the chunk's slots in use
    ]
)
