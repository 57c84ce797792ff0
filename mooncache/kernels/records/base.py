"""Records in kernels: an address seen as a record, and fields that several threads use.

`batch.remaining` reads and writes a field plainly. Fields that other threads read or write meanwhile are taken by name:
`acquire(batch, "state")` and `release(batch, "state", value)` load and store in order, `fetch_add`, `swap` and
`compare_swap` do both at once and return the value before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core.errors import TypingError

intrinsic: Any = extending.intrinsic  # Numba's own annotation counts the typing context as an argument
LINE = 64  # bytes of a cache line
_I8, _I64 = ir.IntType(8), ir.IntType(64)

Field = tuple[Any, ...]  # name, type and, of an array, its length


# ------------------------------------------------------------------------------ dtypes
def row(fields: Sequence[Field]) -> np.dtype:
    """Make the dtype of a row of whole cache lines, so that two rows never share one."""
    return sized(fields, -(-np.dtype(list(fields), align=True).itemsize // LINE) * LINE)


def sized(fields: Sequence[Field], size: int) -> np.dtype:
    """Make the dtype of a record of `size` bytes, of which these fields are the first."""
    plain = np.dtype(list(fields), align=True)
    return _placed(fields, [int(plain.fields[field[0]][1]) for field in fields], size)  # type: ignore[index]


def spread(fields: Sequence[Field]) -> np.dtype:
    """Make the dtype of a row whose fields are written by different threads: each on a cache line of its own."""
    return _placed(fields, [LINE * i for i in range(len(fields))], LINE * len(fields))


def _placed(fields: Sequence[Field], offsets: Sequence[int], size: int) -> np.dtype:
    names = [field[0] for field in fields]
    formats = [field[1] if len(field) == 2 else (field[1], field[2]) for field in fields]
    layout = {"names": names, "formats": formats, "offsets": offsets, "itemsize": size}
    return np.dtype(layout, align=True)  # type: ignore[call-overload]


# ------------------------------------------------------------------------------ addresses and records
def record_at(dtype: np.dtype) -> Any:
    """Make a function of kernels: (address of rows, index) or (address) -> that row. It costs nothing."""
    record = numba.from_dtype(dtype)

    @intrinsic
    def at(typing: Any, rows: Any, index: Any = None) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = args[0]
            if index is not None:
                address = builder.add(address, builder.mul(args[1], ir.Constant(_I64, record.size)))
            return builder.inttoptr(address, context.get_value_type(record))

        return record(types.int64, types.Omitted(None) if index is None else types.int64), codegen

    return at


@intrinsic
def address(typing: Any, record: Any) -> Any:
    """Return the int64 address of a record; 0 for none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], _I64)

    return types.int64(record), codegen


@intrinsic
def behind(typing: Any, record: Any) -> Any:
    """Return the int64 address of the first byte behind a record."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(builder.ptrtoint(args[0], _I64), ir.Constant(_I64, record.size))

    return types.int64(record), codegen


@intrinsic
def index_in(typing: Any, rows: Any, record: Any) -> Any:
    """Return the index of a record in the rows at the address `rows`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        offset = builder.sub(builder.ptrtoint(args[1], _I64), args[0])
        return builder.sdiv(offset, ir.Constant(_I64, record.size))

    return types.int64(types.int64, record), codegen


@intrinsic
def missing(typing: Any, record: Any) -> Any:
    """Return whether there is no record: its address is 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_unsigned("==", builder.ptrtoint(args[0], _I64), ir.Constant(_I64, 0))

    return types.boolean(record), codegen


# ------------------------------------------------------------------------------ fields by name
def _pointer(context: Any, builder: Any, record: Any, value: Any, name: str) -> Any:
    byte = builder.bitcast(value, _I8.as_pointer())
    there = builder.gep(byte, [ir.Constant(_I64, record.offset(name))])
    return builder.bitcast(there, context.get_data_type(record.typeof(name)).as_pointer())


@intrinsic(prefer_literal=True)
def where(typing: Any, record: Any, name: Any) -> Any:
    """Return the int64 address of the field called `name`."""
    if _field(record, name) is None:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(builder.ptrtoint(args[0], _I64), ir.Constant(_I64, record.offset(name.literal_value)))

    return types.int64(record, name), codegen


def _field(record: Any, name: Any) -> Any:
    """Return the Numba type of a field; None until the name is known as a literal."""
    if not isinstance(name, types.StringLiteral):
        return None
    if not isinstance(record, types.Record) or name.literal_value not in record.fields:
        raise TypingError(f"expected a record with a field {name.literal_value!r}, got {record}")
    return record.typeof(name.literal_value)


def _typed(body: Callable[..., Any], record: Any, name: Any, *more: Any) -> Any:
    field = _field(record, name)
    if field is None:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = zip(args[2:], signature.args[2:], strict=True)
        values = [context.cast(builder, value, type_, field) for value, type_ in given]
        result = body(builder, _pointer(context, builder, record, args[0], name.literal_value), *values)
        return context.get_dummy_value() if body is _store else result

    return (types.void if body is _store else field)(record, name, *more), codegen


def _load(builder: Any, pointer: Any) -> Any:
    return builder.load_atomic(pointer, "acquire", pointer.type.pointee.width // 8)


def _store(builder: Any, pointer: Any, value: Any) -> None:
    builder.store_atomic(value, pointer, "release", pointer.type.pointee.width // 8)


def _add(builder: Any, pointer: Any, value: Any) -> Any:
    return builder.atomic_rmw("add", pointer, value, "acq_rel")


def _exchange(builder: Any, pointer: Any, value: Any) -> Any:
    return builder.atomic_rmw("xchg", pointer, value, "acq_rel")


def _compare(builder: Any, pointer: Any, expected: Any, desired: Any) -> Any:
    return builder.extract_value(builder.cmpxchg(pointer, expected, desired, "acq_rel", "acquire"), 0)


@intrinsic(prefer_literal=True)
def acquire(typing: Any, record: Any, name: Any) -> Any:
    """Read the field: what was written before a `release` of its value is seen from here on."""
    return _typed(_load, record, name)


@intrinsic(prefer_literal=True)
def release(typing: Any, record: Any, name: Any, value: Any) -> Any:
    """Write the field: a thread that sees this value with `acquire` sees all that was written before."""
    return _typed(_store, record, name, value)


@intrinsic(prefer_literal=True)
def fetch_add(typing: Any, record: Any, name: Any, amount: Any) -> Any:
    """Add to the field; return the value before."""
    return _typed(_add, record, name, amount)


@intrinsic(prefer_literal=True)
def swap(typing: Any, record: Any, name: Any, value: Any) -> Any:
    """Write the field; return the value before."""
    return _typed(_exchange, record, name, value)


@intrinsic(prefer_literal=True)
def compare_swap(typing: Any, record: Any, name: Any, expected: Any, desired: Any) -> Any:
    """Write `desired` if the field is `expected`; return the value before, which tells."""
    return _typed(_compare, record, name, expected, desired)


# ------------------------------------------------------------------------------ records that others contain
CELL = np.dtype([("value", np.int64)])  # one entry of an array of words that several threads use
ENDS = np.dtype([("first", np.int64), ("last", np.int64)])  # of a list; -1 when empty, and `last` is then meaningless
TIMESPEC = np.dtype([("seconds", np.int64), ("ns", np.int64)])  # struct timespec
IDLE = np.dtype(
    [
        ("since", np.int64),  # when the thread last found nothing to do after something, ns; 0: it is not idle
        ("bad", np.int64),  # idle moments to come in which it sleeps at once, since its core is wanted
        ("penalty", np.int64),  # how many the last bad one brought
    ]
)  # of a thread that yields its core for a moment before it sleeps, see kernels/linger.py
cell_at = record_at(CELL)
