"""The arrays of an engine: their allocation, and how Python reads and writes rows that kernels look at."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import DTypeLike

from mooncache.kernels.publication import publish

WORD = 8  # bytes
LINE = 64  # bytes of a cache line
MAP_NORESERVE = 0x4000  # Python has no name for it
MAPPED_BYTES = 1 << 20  # from here on a system call more, and up to a page, are nothing beside the array


def zeros(n: int, dtype: DTypeLike, *, sparse: bool = False) -> np.ndarray:
    """Allocate dtype[n] of zeros; a large array has pages of its own, which the system gives at their first write.

    They go back to the system with the array. glibc keeps what was freed, up to 32 MiB each, and writes the zeros of
    the next array itself. `sparse`: little of a large one is written to: it gets small pages, and the system need not
    have room for all of it.
    """
    nbytes = n * np.dtype(dtype).itemsize
    if nbytes < MAPPED_BYTES:
        return np.zeros(n, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if sparse else 0)
    pages = mmap.mmap(-1, nbytes, flags)
    with suppress(OSError):  # this kernel has no huge pages to give; numpy asks for them, too
        pages.madvise(mmap.MADV_NOHUGEPAGE if sparse else mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype, n)


def aligned(words: int, *, sparse: bool = False) -> np.ndarray:
    """Allocate int64[words] of zeros on a cache line of its own; see `zeros`."""
    raw = zeros(words + LINE // WORD, np.int64, sparse=sparse)
    skip = (-raw.ctypes.data % LINE) // WORD
    return raw[skip : skip + words]


def rows_of(dtype: np.dtype, n: int = 1, *, sparse: bool = False) -> np.ndarray:
    """Allocate dtype[n] of zeros on cache lines of their own, for a dtype of whole cache lines; see `zeros`."""
    return aligned(n * dtype.itemsize // WORD, sparse=sparse).view(dtype)


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is `least` or more."""
    return 1 << max(0, least - 1).bit_length()


_libc = ctypes.CDLL(None)


def function_address(name: str) -> int:
    """Return the address of a libc function; kernels call it by that, which keeps them cacheable."""
    return int(ctypes.cast(getattr(_libc, name), ctypes.c_void_p).value or 0)


def python_address(name: str) -> int:
    """Address of a function of Python's C API."""
    return int(ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0)


def address_of(array: np.ndarray) -> int:
    """Return the address of an array's first byte.

    For records, `array.__array_interface__` runs Python code of NumPy, which drops what a signal handler raises there.
    """
    return int(array.ctypes.data)


def put(words: np.ndarray, index: int, value: int) -> None:
    """Publish one word of contiguous int64 words: see `kernels/publication.py`."""
    publish(address_of(words) + index * words.itemsize, int(value))


class Row:
    """One record of an array of records, as Python reads and writes it; keeps the array alive."""

    def __init__(self, array: np.ndarray, index: int = 0) -> None:
        self.address = address_of(array) + index * array.dtype.itemsize
        self.array, self._index, self._record = array, index, array.reshape(-1)[index]

    def __getitem__(self, field: str) -> int:
        return int(self._record[field])

    def __setitem__(self, field: str, value: int) -> None:
        self._record[field] = value

    def set(self, **fields: int) -> None:
        """Write several fields, plainly."""
        for field, value in fields.items():
            self._record[field] = value

    def clear(self) -> None:
        """Write zeros to all of it, plainly."""
        self.array.reshape(-1)[self._index] = np.zeros((), self.array.dtype)

    def where(self, field: str) -> int:
        """Return the address of a field."""
        return self.address + int(self.array.dtype.fields[field][1])  # type: ignore[index]

    def put(self, field: str, value: int) -> None:
        """Publish a field: see `kernels/publication.py`."""
        publish(self.where(field), int(value))
