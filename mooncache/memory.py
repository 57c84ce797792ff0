"""Registered memory: the buffers that `Engine.register` takes, and the `Region` it returns."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from mooncache import cuda
from mooncache.descriptor import Keys
from mooncache.errors import UsageError, came
from mooncache.kernels.enums import Access
from mooncache.owner import Owner
from mooncache.segments import segment_of

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

    def __init__(self, engine: Owner, memory: Range, access: str, parts: list[Part]) -> None:
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
                restartable sequences (`kernels/restartable.py`).
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
