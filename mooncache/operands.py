"""The operands of `write` and `read` become those of kernels; a kernel's refusal becomes the words that say why."""

from __future__ import annotations

from time import monotonic_ns
from typing import Any, NamedTuple

import numpy as np

from mooncache.deadline import Deadline
from mooncache.discovery.fields import NAME_LENGTH, is_name
from mooncache.errors import CapacityError, EngineClosed, Status, TransportError, UsageError, came
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import Kernel
from mooncache.kernels.split import REQUEST_BYTES, REQUESTS
from mooncache.kernels.tables import RegionTable
from mooncache.peer import Peer

LONGEST_S = 3.2e9  # 100 years, so that no clock in ns overflows
Operand = int | np.integer[Any] | np.ndarray


def as_words(*values: int) -> tuple[int, ...]:
    """Return Python integers that fit an int64, as kernels need them. Raises UsageError for one that does not."""
    for value in values:
        if not -(1 << 63) <= value < 1 << 63:
            raise UsageError(f"expected addresses and lengths below 2**63, got {came(value)}")
    return values


def as_arrays(*operands: Any) -> tuple[np.ndarray, ...]:
    """Return the operands as int64 arrays; a single value becomes an array of one, which holds for all requests.

    Raises UsageError for arrays of unequal length, another dtype or shape, or anything that is no integer.
    """
    sizes = {o.size for o in operands if isinstance(o, np.ndarray)}
    if len(sizes) > 1:
        shapes = ", ".join(str(o.shape) if isinstance(o, np.ndarray) else "one value" for o in operands)
        raise UsageError(f"expected arrays of equal length, got {shapes}")
    n = sizes.pop() if sizes else 1
    return tuple(_as_array(operand, n) for operand in operands)


def _as_array(operand: Any, n: int) -> np.ndarray:
    if isinstance(operand, np.ndarray):
        array = operand.view(np.int64) if operand.dtype == np.uint64 else operand
        if array.dtype != np.int64 or array.ndim != 1 or not array.flags.c_contiguous:
            raise UsageError(
                f"expected an int64 array of one contiguous dimension, got {array.dtype} of shape {array.shape}; "
                "np.ascontiguousarray(x, dtype=np.int64) makes one"
            )
        return array if type(array) is np.ndarray and array.flags.carray else _plain(array)
    if isinstance(operand, int | np.integer) and not isinstance(operand, bool):
        return np.full(min(n, 1), as_words(int(operand))[0], np.int64)
    raise UsageError(f"expected an int64 array or an integer, got {type(operand).__name__}")


def _plain(array: np.ndarray) -> np.ndarray:
    """Return the same int64s as kernels take them; copied only where they are not aligned, as behind an odd header."""
    if isinstance(array, np.ma.MaskedArray):
        raise UsageError("expected an int64 array, got a masked one; x.compressed() has what is not masked")
    return np.asarray(_Readable(array)) if array.flags.aligned else np.array(array, np.int64)


class _Readable:
    """A view of an array that NumPy does not take for read-only: kernels, which only read, refuse such arrays."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # NumPy holds this object, and so the memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def is_text(value: object) -> bool:
    """Return whether a value is a str at all, and so can be looked up."""
    return isinstance(value, str)


def check_called(name: str) -> None:
    """Raise UsageError for a name that no peer ever has; messages about the look-up need not quote it then."""
    if ":" not in name and not is_name(name):  # an address says by itself what is wrong with it
        raise UsageError(
            f"expected a peer's name, {NAME_LENGTH} printable characters at most, or its 'host:port', got {came(name)}"
        )


def deadline_ns(timeout: Any) -> int:
    """Return when a timeout of so many seconds from now ends, on CLOCK_MONOTONIC; 0 for None, which is no limit.

    A negative one has passed already. Raises UsageError for anything but a finite number of seconds.
    """
    if timeout is None:
        return 0
    number = isinstance(timeout, int | float | np.integer | np.floating) and not isinstance(timeout, bool)
    if not number or not abs(timeout) < LONGEST_S:
        raise UsageError(
            f"expected a timeout in seconds, at most {LONGEST_S:g}, or None for no limit, got {came(timeout)}"
        )
    return monotonic_ns() + round(max(0.0, float(timeout)) * 1e9)


def deadline_of(timeout: Any) -> Deadline:
    """Return a timeout as a Deadline, for waits on the way to a batch."""
    return deadline_at(deadline_ns(timeout), timeout)


def deadline_at(ns: int, timeout: float | None) -> Deadline:
    """Return a time of `deadline_ns` as a Deadline."""
    return Deadline() if timeout is None else Deadline(timeout, left=max(0.0, (ns - monotonic_ns()) / 1e9))


class Call(NamedTuple):
    """A `write` or `read` as a kernel takes it, to be tried as often as that makes sense."""

    peer: str
    kernel: Kernel
    opcode: Opcode
    deadline: int  # ns, 0: none
    operands: tuple[Any, ...]
    requests: int
    noted: bool  # a notification goes with it
    timeout: float | None  # as it was given, for messages
    given: Peer | None  # if the caller gave one instead of a name


def refusal(
    status: Status, opcode: Opcode, request: int, operands: tuple[Any, ...], own: RegionTable, peer: RegionTable,
    slots: int,
) -> Exception:  # fmt: skip
    """Return the exception for a submit that a kernel refused: which request, what was expected, what came.

    Args:
        request: index of the offending request.
        operands: local addresses, remote addresses, lengths, as the kernel got them.
        own, peer: the region tables of both sides.
        slots: of this engine's pool.
    """
    if status == Status.TOO_LARGE:
        return CapacityError(
            f"the batch needs more slices than the pool has slots ({slots}) or more than {REQUESTS} requests; "
            "split it, or give the engine more slices"
        )
    if status == Status.CLOSED:
        return EngineClosed("the engine is closed")
    if status == Status.PEER_GONE:
        return TransportError(f"{peer.owner}: the connection broke again while it was made; is that engine in trouble?")
    if status == Status.OPERANDS_CHANGED:
        return UsageError("the arrays were written to by another thread during the call; nothing was submitted")
    if status == Status.HEAP_EMPTY:
        return CapacityError("malloc has no more memory for slice objects")
    local, remote, length = (int(o if isinstance(o, int) else o[request] if o.size > 1 else o[0]) for o in operands)
    if status == Status.LENGTH:
        return UsageError(f"request {request}: expected a length from 1 to {REQUEST_BYTES} bytes, got {length}")
    here, there = ("source", "target") if opcode == Opcode.WRITE else ("target", "source")
    mine = f"request {request}: the {here} range [{local:#x}, +{length})"
    theirs = f"request {request}: the {there} range [{remote:#x}, +{length}): {peer.owner}"
    if status == Status.SOURCE_NOT_REGISTERED:
        return UsageError(f"{mine} is not inside this engine's registered regions: {nearest(own, local)}")
    if status == Status.READ_ONLY:
        return UsageError(f"{mine} is read-only memory; read into a writable buffer")
    if status == Status.ACCESS_DENIED:
        doing = "reading" if opcode == Opcode.READ else "writing"
        return UsageError(f"{theirs} does not permit {doing}: {nearest(peer, remote)}")
    return UsageError(f"{theirs} has not registered all of it: {nearest(peer, remote)}")


def nearest(table: RegionTable, address: int) -> str:
    """Describe the regions on either side of an address, for a message."""
    ranges = table.ranges()
    if not ranges:
        return "there are none"
    near = sorted(ranges, key=lambda r: min(abs(address - r[0]), abs(address - r[0] - r[1])))[:2]
    listed = " and ".join(f"[{base:#x}, +{length})" for base, length, _ in sorted(near))
    return f"nearest of {len(ranges)}: {listed}"
