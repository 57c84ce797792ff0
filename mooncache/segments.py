"""Memory with a descriptor, which other processes of this host can map: `Engine.allocate` makes it."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import weakref
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from mooncache import forks, shortage
from mooncache.errors import TransportError, UsageError, came

log = logging.getLogger("mooncache")

HUGE_BYTES = 2 << 20

F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; Python has no name for it
LASTS = fcntl.F_SEAL_SHRINK
"""The seal that a peer's memory must have to be mapped: touching a file cut short under a mapping kills a process."""

SEALS = LASTS | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""The seals of all memory with a descriptor. By the last, nobody who is handed it can forbid its owner to write."""


class Pages:
    """The bytes of a file, mapped and shared; `np.asarray` of it is an array of them, which holds it.

    Unlike Python's mmap it keeps no descriptor of its own: the caller's can be closed, and a forked child has none.
    Raises OSError.
    """

    def __init__(self, descriptor: int, length: int, *, writable: bool = True) -> None:
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(None, length, prot, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        self.address, self.length = int(address), length
        self.__array_interface__ = {"version": 3, "shape": (length,), "typestr": "|u1", "data": (self.address, False)}
        self._unmap = weakref.finalize(self, _libc.munmap, self.address, length)
        self._unmap.atexit = False

    def close(self) -> None:
        """Unmap the bytes, once. Nobody may use them any more."""
        self._unmap()


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True, eq=False)
class Segment:
    """Memory with a descriptor, which another process can map as well."""

    address: int
    length: int  # whole pages
    nbytes: int  # that were asked for
    descriptor: int
    number: int
    memory: weakref.ref[np.ndarray]  # while somebody holds this, the descriptor is open

    def disown(self) -> None:
        """Close the descriptor in a forked child, where the memory stays mapped; see `forks.Holder`."""
        if _segments.pop(self.address, None) is self:
            forks.drop([self.descriptor])


_segments: dict[int, Segment] = {}
_numbers = count(1)


def allocate(nbytes: Any, *, huge: bool = False, for_reading: bool = False) -> np.ndarray:
    """Make zeroed, page-aligned, shareable memory as uint8[nbytes]; it lives as long as the array or a view of it.

    Its size is sealed: whoever is handed the descriptor cannot take pages away from under others.

    Args:
        huge: in pages of 2 MiB. Where the system has none to give, ordinary pages are taken, and the log says so.
        for_reading: whoever is handed the descriptor can only read; this array stays writable.

    Raises:
        UsageError: not a positive number of bytes. CapacityError: the system has no memory or descriptor left.
    """
    if isinstance(nbytes, bool) or not isinstance(nbytes, int | np.integer) or not 0 < nbytes < 1 << 62:
        raise UsageError(f"expected a number of bytes from 1 on, below 2**62, got {came(nbytes)}")
    if huge:
        try:
            return _allocate(int(nbytes), HUGE_BYTES, os.MFD_HUGETLB, for_reading)
        except OSError as error:
            log.info("no huge pages for %d bytes (%s): taking ordinary ones", nbytes, error.strerror)
    with shortage.told(f"no memory for {nbytes} bytes that can be shared"):
        return _allocate(int(nbytes), mmap.PAGESIZE, 0, for_reading)


def _allocate(nbytes: int, page: int, flags: int, for_reading: bool) -> np.ndarray:
    length = -(-nbytes // page) * page
    descriptor = os.memfd_create("mooncache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(descriptor, length)
        array = np.asarray(Pages(descriptor, length))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS | (F_SEAL_FUTURE_WRITE if for_reading else 0))
    except BaseException:
        os.close(descriptor)
        raise
    segment = Segment(array.ctypes.data, length, nbytes, descriptor, next(_numbers), weakref.ref(array))
    _segments[segment.address] = forks.private(segment)
    weakref.finalize(array, _forget, segment).atexit = False
    return array[:nbytes]


def _forget(segment: Segment) -> None:
    if _segments.get(segment.address) is segment:  # else this process is a fork of the one that allocated it
        del _segments[segment.address]
        os.close(segment.descriptor)


def segment_of(address: int, length: int) -> Segment | None:
    """Return the allocated segment that a range lies in, if any."""
    for segment in list(_segments.values()):
        if segment.address <= address and address + length <= segment.address + segment.length:
            return segment
    return None


def check_foreign(descriptor: int, length: int) -> None:
    """Raise TransportError unless `length` bytes of a peer's memory are there, and stay whatever it does."""
    try:
        seals, size = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS), os.fstat(descriptor).st_size
    except OSError:  # no memory file at all
        seals, size = 0, 0
    if seals & LASTS != LASTS or not 0 < length <= size:
        raise TransportError(
            f"a peer offers {length} bytes of memory in a file of {size} bytes with seals {seals:#x}: expected one "
            "that is as long and sealed against shrinking; use the same release on both ends"
        )
