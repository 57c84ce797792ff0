"""Registered memory: the buffers that `Engine.register` takes, and the `Region` it returns."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mooncache import cuda, forks, shortage
from mooncache.errors import TransportError, UsageError, came
from mooncache.kernels.enums import Access

if TYPE_CHECKING:
    from mooncache.engine import Engine
    from mooncache.providers.base import Keys

log = logging.getLogger("mooncache")

HUGE_BYTES = 2 << 20

F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; Python has no name for it
LASTS = fcntl.F_SEAL_SHRINK
"""What memory of a peer's must have before it is mapped: a file cut short under a mapping kills who touches it."""

SEALS = LASTS | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Of all memory with a descriptor. The last: nobody who is handed it can forbid its owner to write."""

ACCESS = {"read": int(Access.READ), "write": int(Access.WRITE), "both": int(Access.READ | Access.WRITE)}


class Range(NamedTuple):
    """A stretch of memory, and the object that keeps it mapped (None when the caller vouches for it)."""

    address: int
    length: int
    owner: Any
    writable: bool
    device: str = ""  # of a GPU's memory, as torch names it; empty for the host's


def range_of(buffer: Any) -> Range:
    """Return where a buffer lies: an `(address, length)` pair, a torch tensor, a NumPy array, DLPack, or any buffer.

    Raises:
        UsageError: not contiguous, empty, on a device other than CUDA's, a pair that names memory which is not there
            or cannot be read, or nothing of the above.
    """
    if isinstance(buffer, tuple):
        return _pair(buffer)
    if hasattr(buffer, "data_ptr") and hasattr(buffer, "element_size"):
        return _torch(buffer)
    if _holds_objects(buffer):
        raise UsageError(
            f"expected numbers, got {type(buffer).__name__} of Python objects: peers would read and write pointers"
        )
    if not isinstance(buffer, np.ndarray):
        if hasattr(buffer, "__dlpack__"):
            buffer = _dlpack(buffer)
        else:
            try:
                buffer = np.frombuffer(buffer, np.uint8)
            except (TypeError, ValueError, BufferError) as error:
                raise UsageError(
                    f"expected an array, a tensor, a contiguous buffer or (address, length), "
                    f"got {type(buffer).__name__}: {error}"
                ) from error
    if not buffer.flags.c_contiguous:
        raise UsageError(f"expected a C-contiguous array, got strides {buffer.strides} for shape {buffer.shape}")
    return _checked(buffer.ctypes.data, buffer.nbytes, buffer, bool(buffer.flags.writeable))


def _holds_objects(buffer: Any) -> bool:
    if isinstance(buffer, np.ndarray):
        return bool(buffer.dtype.hasobject)
    return isinstance(buffer, memoryview) and "O" in buffer.format


def check_mapped(memory: Range) -> Range:
    """Ask the system about memory that nothing holds: it must be mapped; return whether it can be written.

    Looks at the list of mappings only, so that a terabyte costs no more than a page.

    Raises:
        UsageError: a part is not mapped, or cannot be read.
    """
    at, end, writable = memory.address, memory.address + memory.length, True
    for start, stop, rights in _mappings():
        if stop <= at:
            continue
        if start > at or "r" not in rights:
            break
        writable = writable and "w" in rights
        at = stop
        if at >= end:
            return memory._replace(writable=writable)
    raise UsageError(
        f"expected memory that this process can read, got {memory.length} bytes at {memory.address:#x}, of which those "
        f"from {at:#x} on are not mapped, or protected: is it another process's, or a device's?"
    )


def _mappings() -> Iterator[tuple[int, int, str]]:
    """Yield (first, behind the last, rights) of each stretch of this process's memory, in order."""
    with open("/proc/self/maps") as file:
        for line in file:
            where, rights, _ = line.split(" ", 2)
            start, stop = where.split("-")
            yield int(start, 16), int(stop, 16), rights


def _pair(pair: tuple[Any, ...]) -> Range:
    if len(pair) != 2 or not all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in pair):
        raise UsageError(f"expected (address, length) as two integers, got {came(pair)}")
    memory = _checked(int(pair[0]), int(pair[1]), None, True)
    segment = segment_of(memory.address, memory.length)
    held = segment.memory() if segment else None
    if held is not None:
        return memory._replace(owner=held)
    device = cuda.device_of(memory.address)
    return memory._replace(device=device) if device else check_mapped(memory)


def _torch(tensor: Any) -> Range:
    if tensor.device.type not in ("cpu", "cuda"):
        raise UsageError(f"expected memory of the host or of a CUDA device, got a tensor on {tensor.device}")
    if not tensor.is_contiguous():
        raise UsageError(f"expected a contiguous tensor, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")
    memory = _checked(tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor, True)
    return memory if tensor.device.type == "cpu" else memory._replace(device=str(tensor.device))


def _dlpack(producer: Any) -> np.ndarray:
    try:
        return np.from_dlpack(producer)
    except (TypeError, RuntimeError, BufferError, ValueError) as error:
        raise UsageError(
            f"{type(producer).__name__} offers DLPack, but not memory that NumPy can view: {error}"
        ) from error


def _checked(address: int, length: int, owner: Any, writable: bool) -> Range:
    if length <= 0 or address <= 0 or address + length >= 1 << 63:
        raise UsageError(f"expected a range of at least one byte of user memory, got {came(length)} at {came(address)}")
    return Range(address, length, owner, writable)


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


class Part(NamedTuple):
    """The part of a region that a device registers at once: all of it, mostly."""

    address: int
    length: int
    slot: int  # in the engine's table
    keys: Keys


def cut(memory: Range, most: int) -> Iterator[tuple[int, int]]:
    """Cut a range into parts of at most `most` bytes, (address, length) each, that are registered one by one."""
    for offset in range(0, memory.length, most):
        yield memory.address + offset, min(most, memory.length - offset)


class Region:
    """A registered range. The buffer is kept alive and may be read or written by transfers until `unregister`.

    Attributes:
        address: of the first byte.
        length: bytes.
        access: "read", "write" or "both": what peers may do; the owner's own transfers may always use it.
    """

    def __init__(self, engine: Engine, memory: Range, access: str, parts: list[Part]) -> None:
        self.address, self.length, self.access = memory.address, memory.length, access
        self._engine, self._owner, self._parts = engine, memory.owner, parts

    @property
    def registered(self) -> bool:
        """True while transfers may use it."""
        return self._engine.regions.get(self._parts[0].slot) is self

    def unregister(self) -> None:
        """Withdraw the registration; afterwards no transfer touches the range and the buffer may be freed.

        Raises:
            UsageError: a batch of this engine still has slices in it (nothing is changed), or done before.
            TransportError: a peer on this host was stopped while it copied, and may go on with that later, having no
                restartable sequences (`kernels/restart.py`).
        """
        self._engine.unregister(self)

    def __len__(self) -> int:
        return self.length

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.registered and not self._engine.closed:
            self.unregister()

    def __repr__(self) -> str:
        state = "" if self.registered else ", unregistered"
        return f"<Region {self.length} bytes at {self.address:#x}, {self.access}{state}>"
