"""Guard pages around all that kernels index: an index out of bounds ends the process instead of meeting a neighbour.

    pytest -p tests.fence tests/kernels      FENCE=low, the default: one right before each array; high: one right behind

Kernels see addresses, so Numba's own checks of bounds see nothing. `arrays.zeros` and `arrays.aligned` make all their
memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import numpy as np
from numpy.typing import DTypeLike

import mooncache.engine
from mooncache.kernels import arrays

HIGH = os.environ.get("FENCE", "low") == "high"
PAGE = mmap.PAGESIZE
PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def fenced(nbytes: int, alignment: int) -> np.ndarray:
    """uint8[nbytes] of zeros, up against a page that nobody can touch; in front of it if FENCE is low."""
    room = -(-max(nbytes, 1) // PAGE) * PAGE
    pages = np.frombuffer(mmap.mmap(-1, room + 2 * PAGE), np.uint8)
    for guard in (pages.ctypes.data, pages.ctypes.data + PAGE + room):
        if _libc.mprotect(ctypes.c_void_p(guard), PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE + (room - nbytes) // alignment * alignment * HIGH
    return pages[start : start + nbytes]


def zeros(n: int, dtype: DTypeLike, *, sparse: bool = False) -> np.ndarray:
    """What `arrays.zeros` does."""
    size = np.dtype(dtype).itemsize
    return fenced(n * size, size).view(dtype)


def aligned(words: int, *, sparse: bool = False) -> np.ndarray:
    """What `arrays.aligned` does."""
    return fenced(words * arrays.WORD, arrays.LINE).view(np.int64)


def raise_fence() -> None:
    """Let every module of the product allocate so from now on."""
    former = {arrays.zeros: zeros, arrays.aligned: aligned}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == mooncache.__name__:
            for member, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__module__", "") == arrays.__name__ and value in former:
                    setattr(module, member, former[value])


raise_fence()
