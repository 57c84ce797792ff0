"""Copies that a thread which was interrupted does not go on with: it looks first whether it still may.

A process may be stopped at any instruction, and go on minutes later as if nothing had been. So these are *restartable
sequences* (`rseq`, Linux 4.18; glibc registers each thread for them from 2.35 on): a thread that was preempted, stopped
or given a signal inside of one goes on at its start, where the word is looked at again.

    owner     writes the word, and sees that the copying process is stopped       it never lands anything again
    copier    is stopped in a copy ................. goes on: the word differs, so it returns

Without rseq, and on other CPUs than x86-64, they are plain copies, and `restarts` says so.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types

from mooncache.kernels.arrays import aligned
from mooncache.kernels.atomics import LINE, X86, i64, intrinsic, load
from mooncache.kernels.copying import BANK_BYTES, BANKS, STREAM_BYTES, stream_copy
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import SYS_PROCESS_VM_WRITEV, errno, process_writev

# A copier's row: struct rseq_cs with its start, length and where to go when interrupted, and what belongs to it
R_VERSION, R_START, R_LENGTH, R_ABORT, R_RESTARTS, R_OFFSET, R_BANKS_FROM, R_BANKS_BELOW, ROW_WORDS = range(9)
CHANGED = -(1 << 30)  # no errno
PIECE_BYTES = 64 << 10
"""Copied in one sequence: 20 us at 3 GB/s, so that it ends before the thread's time slice, some milliseconds, does."""

_CS_FIELD = 8  # of struct rseq: where the pointer to struct rseq_cs lies
_SIGNATURE = 0x53053053  # RSEQ_SIG of x86: stands in front of where an interrupted thread goes on

_I64 = ir.IntType(64)
binding.initialize_native_asmparser()


def row(banks_from: int = 1 << 62, banks_below: int = 0) -> np.ndarray:
    """Make a copier's row, for one thread at a time: int64[ROW_WORDS]."""
    made = aligned(ROW_WORDS)
    made[R_OFFSET], made[R_BANKS_FROM], made[R_BANKS_BELOW] = _offset(), banks_from, banks_below
    return made


def restarts(row: np.ndarray) -> bool:
    """Return whether interrupted copies with this row look again before they go on."""
    return bool(row[R_OFFSET])


def _offset() -> int:
    """Return the way from a thread's pointer to what Linux looks at when it interrupts it; 0: it does not look."""
    if not X86:
        return 0
    libc = ctypes.CDLL(None)
    try:
        size = ctypes.c_uint.in_dll(libc, "__rseq_size").value
        offset = ctypes.c_ssize_t.in_dll(libc, "__rseq_offset").value
    except ValueError:  # another libc, or one before 2.35
        return 0
    return offset + _CS_FIELD if size else 0  # no size: the kernel knows nothing of it, or forbids it


def _sequence(body: str, row: str, scratch: str) -> str:
    """A restartable sequence: `body` goes from label 1, where a thread starts and goes on, to label 2.

    It must change nothing that it needs when it starts again, and may leave for label 9 at any time. `row` and
    `scratch` are registers.
    """
    armed = f"movq %fs:0, %{scratch}\n addq {8 * R_OFFSET}(%{row}), %{scratch}"
    return f"""
        movq $$0, {8 * R_VERSION}(%{row})
        leaq 1f(%rip), %rax
        movq %rax, {8 * R_START}(%{row})
        leaq 2f(%rip), %{scratch}
        subq %rax, %{scratch}
        movq %{scratch}, {8 * R_LENGTH}(%{row})
        leaq 4f(%rip), %rax
        movq %rax, {8 * R_ABORT}(%{row})
    3:  {armed}
        movq %{row}, (%{scratch})
    1:  {body}
    2:
    9:  {armed}
        movq $$0, (%{scratch})
        jmp 99f
        .byte 0x0f, 0xb9, 0x3d
        .long {_SIGNATURE}
    4:  incq {8 * R_RESTARTS}(%{row})
        jmp 3b
    99:
    """


def _lines(banks: int) -> str:
    """Copy 64 bytes from %rsi to %rdi, past the caches, and as much in the pages that follow."""
    width, load_, store, register = 16, "movdqu", "movntdq", "xmm"
    if binding.get_host_cpu_features().get("avx512f"):
        width, load_, store, register = 64, "vmovdqu64", "vmovntdq", "zmm"
    elif binding.get_host_cpu_features().get("avx"):
        width, load_, store, register = 32, "vmovdqu", "vmovntdq", "ymm"
    moves = []
    for bank in range(0, banks * BANK_BYTES, BANK_BYTES):
        at = range(0, LINE, width)
        moves += [f"{load_} {bank + k}(%rsi), %{register}{k // width}" for k in at]
        moves += [f"{store} %{register}{k // width}, {bank + k}(%rdi)" for k in at]
    return "\n".join(moves)


def _advance(step: int) -> str:
    return f"addq $${step}, %rsi\n addq $${step}, %rdi\n subq $${step}, %rdx"


_COPY = f"""
    xorl %eax, %eax
    cmpq %r9, (%r8)
    jne 9f
    movq %r12, %rdi
    movq %r13, %rsi
    movq %r14, %rdx
    cmpq $${STREAM_BYTES}, %rdx
    jb 30f
10: testl $$7, %edi                    # to a whole line, by bytes and by words
    jz 11f
    movb (%rsi), %cl
    movb %cl, (%rdi)
    {_advance(1)}
    jmp 10b
11: testl $${LINE - 1}, %edi
    jz 20f
    movq (%rsi), %rcx
    movq %rcx, (%rdi)
    {_advance(8)}
    jmp 11b
20: cmpq $${BANKS * BANK_BYTES}, %rdx      # past the caches, by banks
    jb 22f
    cmpq {8 * R_BANKS_FROM}(%r10), %r14
    jb 22f
    cmpq {8 * R_BANKS_BELOW}(%r10), %r14
    jae 22f
    movl $${BANK_BYTES // LINE}, %ecx
21: {_lines(BANKS)}
    addq $${LINE}, %rsi
    addq $${LINE}, %rdi
    decl %ecx
    jnz 21b
    addq $${(BANKS - 1) * BANK_BYTES}, %rsi
    addq $${(BANKS - 1) * BANK_BYTES}, %rdi
    subq $${BANKS * BANK_BYTES}, %rdx
    jmp 20b
22: cmpq $${LINE}, %rdx                # and by lines
    jb 30f
    {_lines(1)}
    {_advance(LINE)}
    jmp 22b
30: cmpq $$8, %rdx                     # what is left, by words and by bytes
    jb 31f
    movq (%rsi), %rcx
    movq %rcx, (%rdi)
    {_advance(8)}
    jmp 30b
31: testq %rdx, %rdx
    jz 32f
    movb (%rsi), %cl
    movb %cl, (%rdi)
    {_advance(1)}
    jmp 31b
32: movl $$1, %eax
"""

_WRITEV = f"""
    movq $${CHANGED}, %rax
    cmpq %r13, (%r12)
    jne 9f
    movq %rdx, %r8
    xorl %r9d, %r9d
    movl $${SYS_PROCESS_VM_WRITEV}, %eax
    syscall
"""


def _assembled(body: str, row: str, inputs: tuple[str, ...], clobbered: tuple[str, ...]) -> Any:
    """Codegen for a restartable sequence of int64 operands, in registers, that leaves an int64 in rax."""
    constraints = ["={rax}", *(f"{{{name}}}" for name in inputs), *(f"~{{{name}}}" for name in clobbered)]
    constraints += [f"~{{{name}}}" for name in ("rcx", "memory", "dirflag", "fpsr", "flags")]
    type_ = ir.FunctionType(_I64, [_I64] * len(inputs))
    assembly = ir.InlineAsm(type_, _sequence(body, row, "rcx"), ",".join(constraints), side_effect=True)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(assembly, args)

    return codegen


@intrinsic
def _copy(typing: Any, target: Any, source: Any, length: Any, word: Any, expected: Any, row: Any) -> Any:
    scratch = ("rdx", "rsi", "rdi", "xmm0", "xmm1", "xmm2", "xmm3")
    return types.int64(*[types.int64] * 6), _assembled(_COPY, "r10", ("r12", "r13", "r14", "r8", "r9", "r10"), scratch)


@intrinsic
def _writev(typing: Any, pid: Any, local: Any, remote: Any, n: Any, word: Any, expected: Any, row: Any) -> Any:
    registers = ("rdi", "rsi", "r10", "rdx", "r12", "r13", "r14")
    return types.int64(*[types.int64] * 7), _assembled(_WRITEV, "r14", registers, ("r8", "r9", "r11"))


@kernel
def copy_while(target, source, length, word, expected, row):
    """`stream_copy` while the int64 at `word` is `expected`. False: it differed, and some bytes may be copied."""
    restartable, done = X86 and i64(row)[R_OFFSET] != 0, np.int64(0)
    while done < length:
        piece = min(length - done, PIECE_BYTES)
        if restartable:
            if _copy(target + done, source + done, piece, word, expected, row) == 0:
                return False
        elif load(word) != expected:
            return False
        else:
            stream_copy(target + done, source + done, piece, i64(row)[R_BANKS_FROM], i64(row)[R_BANKS_BELOW])
        done += piece
    return True


@kernel
def writev_while(syscall, errno_location, pid, local, remote, n, word, expected, row):
    """`process_writev` if the int64 at `word` is `expected`. Bytes copied, minus an errno, or CHANGED if it differs."""
    if X86 and i64(row)[R_OFFSET] != 0:
        return _writev(pid, local, remote, n, word, expected, row)
    if load(word) != expected:
        return np.int64(CHANGED)
    moved = process_writev(syscall, pid, local, remote, n)
    return moved if moved >= 0 else -errno(errno_location)
