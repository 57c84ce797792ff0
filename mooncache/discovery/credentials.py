"""The process at the other end of a Unix socket, by the kernel's word, which no process can make up."""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid

SO_PEERPIDFD = 77  # Linux 6.5; Python has no name for it


class Process(NamedTuple):
    """A process of this host, as it was when it listened or connected.

    Attributes:
        pid: 0 when it is in a namespace whose numbers mean nothing here.
        uid: of its user.
    """

    pid: int
    uid: int

    @property
    def ours(self) -> bool:
        """True if it runs as the same user as this one."""
        return self.uid == os.geteuid()

    @property
    def stopped(self) -> bool:
        """True if each of its threads was stopped by a signal, outside of any system call, or has ended.

        A thread that a debugger stopped may be on its way into a call, and counts as running.
        """
        tasks = f"/proc/{self.pid}/task"
        try:
            return self.pid != 0 and all(_state(f"{tasks}/{number}/stat") in "TXZ" for number in os.listdir(tasks))
        except OSError:  # it ends meanwhile, or may not be looked at
            return False


def _state(stat: str) -> str:
    """Read the letter for what a thread does: behind its name, which may be anything in brackets."""
    with open(stat, encoding="utf-8", errors="replace") as line:
        return line.read().rpartition(")")[2].split()[0]


def process_at(sock: socket.socket) -> Process:
    """Return the process at the other end of a connected Unix socket: the one that connected, or that listened."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Process(pid, uid)


def has_ended(sock: socket.socket) -> bool:
    """Return whether a process has ended, so that another may have its number. Kernels before 6.5: always False."""
    with suppress(OSError):
        try:
            descriptor = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except ProcessLookupError:
            return True
        try:
            watched = select.poll()
            watched.register(descriptor, select.POLLIN)
            return bool(watched.poll(0))
        finally:
            os.close(descriptor)
    return False
