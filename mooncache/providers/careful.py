"""Copying memory that may be gone by the time it is copied, because no object that this process holds keeps it mapped.

The kernel copies it (process_vm_readv and writev, of this process, too), and so finds a hole where a copy of ours would
end the process. What a thread needs for that is a *copier*: words and, behind them, pairs of iovecs.
"""

from __future__ import annotations

import os

import numpy as np

from mooncache.kernels import restart
from mooncache.kernels.arrays import WORD, address_of, aligned, function_address
from mooncache.kernels.atomics import peek, poke
from mooncache.kernels.enums import Opcode
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import ESRCH, IOV_BASE, IOV_LEN, IOVEC_BYTES, errno, process_readv
from mooncache.kernels.restart import CHANGED, ROW_WORDS, writev_while
from mooncache.kernels.verbs import WcStatus

# C_SELF: this process, or 0 where the system forbids such calls; C_WORD: what `look` found
# C_WHILE, C_IS: another process is written to only while the word at that address has this value
# C_RESTART: see `restart.row`
C_SYSCALL, C_ERRNO, C_SELF, C_WORD, C_LOCAL, C_REMOTE, C_WHILE, C_IS, C_RESTART = 0, 1, 2, 3, 4, 5, 6, 7, 8
COPIER_WORDS = C_RESTART + ROW_WORDS
PROBE, FIRST = 0, 1  # pairs: one to look at single bytes with, then those that are copied
PAGE_BYTES = 4096  # or more


@kernel
def set_pair(copier, i, local, remote, length):
    """Say what the i-th pair is: `length` bytes here, at `local`, and as many in the other process."""
    ours = peek(copier + C_LOCAL * WORD) + i * IOVEC_BYTES
    theirs = peek(copier + C_REMOTE * WORD) + i * IOVEC_BYTES
    poke(ours + IOV_BASE, local)
    poke(ours + IOV_LEN, length)
    poke(theirs + IOV_BASE, remote)
    poke(theirs + IOV_LEN, length)


@kernel
def write_while(copier, word, value):
    """From now on write only while the int64 at `word` has this value, whatever interrupts the thread."""
    poke(copier + C_WHILE * WORD, word)
    poke(copier + C_IS * WORD, value)


@kernel
def move(copier, pid, opcode, first, n):
    """Copy `n` pairs from the `first` on by one system call: out of process `pid` for a READ, else into it.

    Returns how many bytes it moved before it found any gone, minus an errno, or CHANGED: see `write_while`.
    """
    local = peek(copier + C_LOCAL * WORD) + first * IOVEC_BYTES
    remote = peek(copier + C_REMOTE * WORD) + first * IOVEC_BYTES
    syscall, errno_location = peek(copier + C_SYSCALL * WORD), peek(copier + C_ERRNO * WORD)
    if opcode != Opcode.READ:
        word, value, row = peek(copier + C_WHILE * WORD), peek(copier + C_IS * WORD), copier + C_RESTART * WORD
        return writev_while(syscall, errno_location, pid, local, remote, n, word, value, row)
    moved = process_readv(syscall, pid, local, remote, n)
    return moved if moved >= 0 else -errno(errno_location)


@kernel
def move_one(copier, pid, opcode, i):
    """Copy one pair; a WcStatus, which says whose end is gone, or CHANGED."""
    iovec = peek(copier + C_LOCAL * WORD) + i * IOVEC_BYTES
    local, length = peek(iovec + IOV_BASE), peek(iovec + IOV_LEN)
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
def is_gone(copier, opcode, address, length):
    """Whether some byte of ours cannot be read; or, for a READ, not written, which the byte it holds is for that."""
    pid, end = peek(copier + C_SELF * WORD), address + length
    while address < end and pid != 0:
        set_pair(copier, PROBE, copier + C_WORD * WORD, address, 1)
        if move(copier, pid, Opcode.READ, PROBE, 1) != 1:
            return True
        if opcode == Opcode.READ and move(copier, pid, Opcode.WRITE, PROBE, 1) not in (1, CHANGED):
            return True
        address += PAGE_BYTES - address % PAGE_BYTES
    return False


@kernel("int64(int64, int64, int64)")
def look(copier, pid, address):
    """Read a word of process `pid` into C_WORD; WORD, or minus an errno."""
    set_pair(copier, PROBE, copier + C_WORD * WORD, address, WORD)
    return move(copier, pid, Opcode.READ, PROBE, 1)


class Copier:
    """What one thread copies with."""

    def __init__(self, pairs: int = 1) -> None:
        """`pairs`: most that are copied at once."""
        iovecs = (FIRST + pairs) * IOVEC_BYTES // WORD
        self.words = aligned(COPIER_WORDS + 2 * iovecs)
        self.address = address_of(self.words)
        self.words[[C_SYSCALL, C_ERRNO]] = function_address("syscall"), function_address("__errno_location")
        self.words[C_LOCAL] = self.address + COPIER_WORDS * WORD
        self.words[C_REMOTE] = self.words[C_LOCAL] + iovecs * WORD
        self.words[C_WHILE] = self.address + C_IS * WORD  # equal to itself: always
        self.words[C_RESTART:COPIER_WORDS] = restart.row()
        self.words[C_SELF] = os.getpid() if look(self.address, os.getpid(), self.address) == WORD else 0

    @property
    def permitted(self) -> bool:
        """Whether the system lets this process copy its own memory that way."""
        return bool(self.words[C_SELF])

    @property
    def restarts(self) -> bool:
        """Whether a copy that was interrupted looks again before it goes on, as `write_while` says."""
        return restart.restarts(self.words[C_RESTART:])

    def look(self, pid: int, address: int) -> int:
        """A word of another process. Raises OSError."""
        moved = look(self.address, pid, address)
        if moved != WORD:
            raise OSError(-moved, os.strerror(-moved))
        return int(self.words[C_WORD])
