"""Faulting pages in before they are used: by several threads, and not by the first transfer."""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14
PIECE_BYTES = 64 << 20
"""The bytes that one thread faults in at a time: 10 to 40 ms of work. Less is done by the calling thread."""

THREADS = 8


def populate(address: int, length: int, writable: bool) -> None:
    """Fault all pages of a range in, with up to THREADS threads, and no more than this process has cores.

    Blocks for 0.1 to 0.9 s a GiB and core where the memory is new, for less where it is only mapped anew; other Python
    threads run meanwhile. Does nothing where the kernel cannot (before Linux 5.14). What is wrong with a range is not
    told here, but by the first use of it.

    Args:
        address, length: bytes; rounded outwards to pages.
        writable: make pages that can be written at once; without it read-only memory is populated too.
    """
    advice = MADV_POPULATE_WRITE if writable else MADV_POPULATE_READ
    start = address - address % mmap.PAGESIZE
    end = -(-(address + length) // mmap.PAGESIZE) * mmap.PAGESIZE
    if end - start <= PIECE_BYTES:
        _madvise(start, end - start, advice)
        return
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0))), "mooncache-populate") as pool:
        for piece in range(start, end, PIECE_BYTES):
            pool.submit(_madvise, piece, min(PIECE_BYTES, end - piece), advice)


_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
