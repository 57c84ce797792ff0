"""Careful copies of memory that may be gone by the time it is copied, because no object here keeps it mapped.

The kernel copies it (process_vm_readv and writev, of this process, too), and so finds a hole where a copy of ours would
end the process. What a thread needs for that is a *copier*, with pairs of iovecs.
"""

from __future__ import annotations

import os

import numpy as np

from mooncache.copy_ways import banks
from mooncache.kernels import restartable
from mooncache.kernels.arrays import WORD, Row, address_of, function_address, rows_of
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import ESRCH, errno, process_readv
from mooncache.kernels.records.base import address, record_at, row, where
from mooncache.kernels.records.linux import IOVEC, iovec_at
from mooncache.kernels.restartable import CHANGED, writev_while
from mooncache.kernels.verbs import WcStatus

COPIER = row(
    [
        ("syscall", np.int64),  # addresses of libc's functions
        ("errno", np.int64),
        ("own_pid", np.int64),  # this process, or 0 where the system forbids such calls
        ("word", np.int64),  # what `look` found
        ("local", np.int64),  # addresses of IOVEC[], of as many pairs: here
        ("remote", np.int64),  # and in the other process
        ("while_at", np.int64),  # another process is written to only while the int64 at this address
        ("while_is", np.int64),  # has this value
        ("restart", np.int64, restartable.ROW_WORDS),  # see `restartable.row`
    ]
)
copier_at = record_at(COPIER)
PROBE, FIRST = 0, 1  # pairs: one to look at single bytes with, then those that are copied
PAGE_BYTES = 4096  # or more


@kernel
def set_pair(copier, i, local, remote, length):
    """Set the i-th pair: `length` bytes here, at `local`, and as many in the other process."""
    ours, theirs = iovec_at(copier.local, i), iovec_at(copier.remote, i)
    ours.base = local
    ours.length = length
    theirs.base = remote
    theirs.length = length


@kernel
def write_while(copier, word, value):
    """Write only while the int64 at `word` has this value, from now on, whatever interrupts the thread."""
    copier.while_at = word
    copier.while_is = value


@kernel
def move(copier, pid, opcode, first, n):
    """Copy `n` pairs from the `first` on by one system call: out of process `pid` for a READ, else into it.

    Returns how many bytes it moved before it found any gone, minus an errno, or CHANGED: see `write_while`.
    """
    local, remote = address(iovec_at(copier.local, first)), address(iovec_at(copier.remote, first))
    if opcode != Opcode.READ:
        word, value, restarts = copier.while_at, copier.while_is, where(copier, "restart")
        return writev_while(copier.syscall, copier.errno, pid, local, remote, n, word, value, restarts)
    moved = process_readv(copier.syscall, pid, local, remote, n)
    return moved if moved >= 0 else -errno(copier.errno)


@kernel
def move_one(copier, pid, opcode, i):
    """Copy one pair; return a WcStatus, which says whose end is gone, or CHANGED."""
    local, length = iovec_at(copier.local, i).base, iovec_at(copier.local, i).length
    moved = move(copier, pid, opcode, i, 1)
    if moved == length:
        return np.int64(WcStatus.SUCCESS)
    if moved == CHANGED:
        return np.int64(CHANGED)
    if moved == -ESRCH:
        return np.int64(WcStatus.REM_ABORT_ERR)
    done = max(moved, 0)
    ours = is_gone(copier, opcode, local + done, length - done)
    return np.int64(WcStatus.LOC_PROT_ERR if ours else WcStatus.REM_OP_ERR)


@kernel
def is_gone(copier, opcode, at, length):
    """Return whether some byte of ours cannot be read; or, for a READ, not written, by the byte it holds."""
    pid, end = copier.own_pid, at + length
    while at < end and pid != 0:
        set_pair(copier, PROBE, where(copier, "word"), at, 1)
        if move(copier, pid, Opcode.READ, PROBE, 1) != 1:
            return True
        if opcode == Opcode.READ and move(copier, pid, Opcode.WRITE, PROBE, 1) not in (1, CHANGED):
            return True
        at += PAGE_BYTES - at % PAGE_BYTES
    return False


@kernel("int64(int64, int64, int64)")
def look(copier, pid, address):
    """Read an int64 of process `pid` into the copier; WORD, or minus an errno."""
    copier = copier_at(copier)
    set_pair(copier, PROBE, where(copier, "word"), address, WORD)
    return move(copier, pid, Opcode.READ, PROBE, 1)


class Copier:
    """The iovecs and the word by which one thread copies."""

    def __init__(self, pairs: int = 1) -> None:
        """`pairs`: most that are copied at once."""
        self._local, self._remote = (rows_of(IOVEC, FIRST + pairs) for _ in range(2))
        self._row = Row(rows_of(COPIER))
        self.address = self._row.address
        self._row.set(
            syscall=function_address("syscall"),
            errno=function_address("__errno_location"),
            local=address_of(self._local),
            remote=address_of(self._remote),
            while_at=self._row.where("while_is"),  # equal to itself: always
        )
        self._restart = self._row.array["restart"][0]
        self._restart[:] = restartable.row(*banks())
        self._row["own_pid"] = os.getpid() if look(self.address, os.getpid(), self.address) == WORD else 0

    @property
    def permitted(self) -> bool:
        """True if the system lets this process copy its own memory that way."""
        return bool(self._row["own_pid"])

    @property
    def restarts(self) -> bool:
        """True if a copy that was interrupted looks again before it goes on, as `write_while` says."""
        return restartable.restarts(self._restart)

    def look(self, pid: int, address: int) -> int:
        """Read a word of another process. Raises OSError."""
        moved = look(self.address, pid, address)
        if moved != WORD:
            raise OSError(-moved, os.strerror(-moved))
        return self._row["word"]
