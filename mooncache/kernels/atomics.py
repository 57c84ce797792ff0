"""Instructions below a programming language: addresses, atomics, fences, copies, futexes, calls by address.

Every function takes addresses (int64) and is written as LLVM instructions, so it is correct on weakly ordered CPUs
too: `load` acquires, `store` releases, `add`, `exchange` and `cas` do both; `peek` and `poke` are plain. Nothing here
is bound to one process, so kernels that use it can be cached. Inline assembly would abort the process in Numba's
compiler, hence `pause` is the target's intrinsic.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.np.arrayobj import make_array

intrinsic: Any = extending.intrinsic  # Numba's own annotation counts the typing context as an argument
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
X86 = platform.machine() in ("x86_64", "AMD64")
LINE = 64
SYS_FUTEX = 202 if X86 else 98  # x86-64; every architecture with the generic table, aarch64 among them
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129


# --------------------------------------------------------------------------------- typed views of an address
def _view(element: Any, width: ir.IntType) -> Any:
    @intrinsic
    def view(typing: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], width.as_pointer())

        return types.CPointer(element)(types.int64), codegen

    return view


i8 = _view(types.int8, _I8)
i16 = _view(types.int16, _I16)
i32 = _view(types.int32, _I32)
i64 = _view(types.int64, _I64)


@intrinsic
def address_of(typing: Any, array: Any) -> Any:
    """Return the int64 address of an array's first element; free of charge inside a kernel."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(make_array(signature.args[0])(context, builder, args[0]).data, _I64)

    return types.int64(array), codegen


# --------------------------------------------------------------------------------- plain and atomic int64 words
def _word(body: Callable[..., Any], arguments: int, returns: Any = types.int64) -> Any:
    """An intrinsic over the int64 word at an address, with `arguments` further int64 operands."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result = body(builder, builder.inttoptr(args[0], _I64.as_pointer()), *args[1:])
        return context.get_dummy_value() if returns is types.void else result

    operands = (types.int64,) * (arguments + 1)
    if arguments == 0:

        @intrinsic
        def word0(typing: Any, address: Any) -> Any:
            return returns(*operands), codegen

        return word0
    if arguments == 1:

        @intrinsic
        def word1(typing: Any, address: Any, value: Any) -> Any:
            return returns(*operands), codegen

        return word1

    @intrinsic
    def word2(typing: Any, address: Any, expected: Any, desired: Any) -> Any:
        return returns(*operands), codegen

    return word2


peek = _word(lambda b, p: b.load(p), 0)
poke = _word(lambda b, p, v: b.store(v, p), 1, types.void)
load = _word(lambda b, p: b.load_atomic(p, "acquire", 8), 0)
store = _word(lambda b, p, v: b.store_atomic(v, p, "release", 8), 1, types.void)
add = _word(lambda b, p, v: b.atomic_rmw("add", p, v, "acq_rel"), 1)  # returns the value before
exchange = _word(lambda b, p, v: b.atomic_rmw("xchg", p, v, "acq_rel"), 1)
cas = _word(lambda b, p, e, d: b.extract_value(b.cmpxchg(p, e, d, "acq_rel", "acquire"), 0), 2)  # value before


@intrinsic
def fence(typing: Any) -> Any:
    """Full fence: no load after it is answered before a store in front of it is seen (Dekker's pattern)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def pause(typing: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name, operands = ("llvm.x86.sse2.pause", []) if X86 else ("llvm.aarch64.hint", [ir.Constant(_I32, 1)])
        type_ = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(cgutils.get_or_insert_function(builder.module, type_, name), operands)
        return context.get_dummy_value()

    return types.void(), codegen


# --------------------------------------------------------------------------------- memory
@intrinsic
def copy(typing: Any, target: Any, source: Any, length: Any) -> Any:
    """memcpy; the ranges must not overlap. Three to four times faster in a kernel than slice assignment."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, from_ = (builder.inttoptr(address, _I8.as_pointer()) for address in args[:2])
        cgutils.raw_memcpy(builder, to, from_, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def stream_line(typing: Any, target: Any, source: Any) -> Any:
    """Copy 64 bytes past the caches; `target` is a multiple of 64. Ordered only by a `fence` afterwards."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = ir.VectorType(_I64, 8)
        to, from_ = (builder.inttoptr(address, line.as_pointer()) for address in args)
        written = builder.store(builder.load(from_, align=1), to, align=64)
        written.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Let the cache fetch the line at `address`, which may be any."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        type_ = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        hints = [ir.Constant(_I32, hint) for hint in (0, 3, 1)]  # to read; near; data
        function = cgutils.get_or_insert_function(builder.module, type_, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, *hints])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def fill_bytes(typing: Any, target: Any, byte: Any, length: Any) -> Any:
    """Fill `length` bytes from `target` with `byte`: memset."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        cgutils.memset(builder, pointer, args[2], builder.trunc(args[1], _I8))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


# --------------------------------------------------------------------------------- calls by address
def _call(returns: ir.IntType, operands: list[ir.IntType], result: Any) -> Any:
    """Codegen for `result(*operands)` at a run-time address. Integers only, as the C ABI passes them."""
    type_ = ir.FunctionType(returns, operands).as_pointer()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrowed = [builder.trunc(a, t) if t.width < 64 else a for a, t in zip(args[1:], operands, strict=True)]
        value = builder.call(builder.inttoptr(args[0], type_), narrowed)
        return builder.sext(value, _I64) if returns.width < 64 else value

    return result(*[types.int64] * (len(operands) + 1)), codegen


@intrinsic
def call_post_send(typing: Any, function: Any, qp: Any, wr: Any, bad_wr: Any) -> Any:
    """Call int post_send(struct ibv_qp *, struct ibv_send_wr *, struct ibv_send_wr **)."""
    return _call(_I32, [_I64, _I64, _I64], types.int64)


@intrinsic
def call_poll_cq(typing: Any, function: Any, cq: Any, entries: Any, wc: Any) -> Any:
    """Call int poll_cq(struct ibv_cq *, int, struct ibv_wc *)."""
    return _call(_I32, [_I64, _I32, _I64], types.int64)


@intrinsic
def call_word(typing: Any, function: Any, argument: Any) -> Any:
    """Call int64_t function(int64_t): malloc, free and a provider's `next_completion`."""
    return _call(_I64, [_I64], types.int64)


@intrinsic
def call_words(typing: Any, function: Any, first: Any, second: Any) -> Any:
    """Call int64_t function(int64_t, int64_t)."""
    return _call(_I64, [_I64, _I64], types.int64)


@intrinsic
def call_clock_gettime(typing: Any, function: Any, clock: Any, timespec: Any) -> Any:
    """Call int clock_gettime(clockid_t, struct timespec *)."""
    return _call(_I32, [_I32, _I64], types.int64)


@intrinsic
def call_write(typing: Any, function: Any, descriptor: Any, buffer: Any, length: Any) -> Any:
    """Call ssize_t write(int, const void *, size_t)."""
    return _call(_I64, [_I32, _I64, _I64], types.int64)


@intrinsic
def call_read(typing: Any, function: Any, descriptor: Any, buffer: Any, length: Any) -> Any:
    """Call ssize_t read(int, void *, size_t)."""
    return _call(_I64, [_I32, _I64, _I64], types.int64)


@intrinsic
def call_syscall(typing: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
    """Call long syscall(long number, ...): number and six operands."""
    return _call(_I64, [_I64] * 7, types.int64)


from mooncache.kernels.jit import kernel  # noqa: E402  (the intrinsics above must exist first)


@kernel
def futex_wait(syscall, address, expected, timespec):
    """Sleep while the int32 at `address` is `expected`; `timespec` is the address of the longest time, or 0.

    Returns 0 when woken, else -1 (value differed, timeout, or a signal arrived): look again in every case.
    """
    return call_syscall(syscall, SYS_FUTEX, address, _FUTEX_WAIT_PRIVATE, expected, timespec, 0, 0)


@kernel
def futex_wake(syscall, address, threads):
    """Wake up to `threads` sleepers on the int32 at `address`; returns how many there were."""
    return call_syscall(syscall, SYS_FUTEX, address, _FUTEX_WAKE_PRIVATE, threads, 0, 0, 0)
