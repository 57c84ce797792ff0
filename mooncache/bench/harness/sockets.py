"""Plain Python sockets: the reference for transfers through the network stack, as short as Python can write it.

One TCP connection over loopback. The sender gathers straight from its pages with `sendmsg`, IOV_MAX blocks a call; the
receiver scatters straight into its own with `recvmsg_into`, and answers with one byte when all are there:

    sender                                    receiver
    sendmsg([block, block, ...])  --------->  recvmsg_into([block, block, ...])
    recv(1)                       <---------  sendall(ANSWER)

A read is the mirror image: its initiator is the receiver, and sends the byte first.

Tuned: no Nagle, 4 MiB of socket buffers, cubic, lists of memoryviews made beforehand, MSG_WAITALL so that the receiver
wakes up a full list at a time.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import numpy as np

ANSWER = b"\6"
GONE = "the plain socket's other side is gone"
BUFFER_BYTES = 4 << 20
IOV_MAX = os.sysconf("SC_IOV_MAX")


def tuned(plain: socket.socket) -> socket.socket:
    """Set the socket's options, and return it. Buffers count only if they are set before listen and connect."""
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        plain.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    with suppress(OSError):  # a kernel without it: its default is what everybody has there
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return plain


def listening() -> socket.socket:
    """Open a socket that listens on a free port of loopback."""
    plain = tuned(socket.socket())
    plain.bind(("127.0.0.1", 0))
    plain.listen(1)
    return plain


def connected(port: int) -> socket.socket:
    """Connect to a port of loopback."""
    plain = tuned(socket.socket())
    plain.connect(("127.0.0.1", port))
    return plain


class Blocks:
    """The blocks of one buffer, in the order in which they go over the wire."""

    def __init__(self, buffer: np.ndarray, offsets: np.ndarray, length: int) -> None:
        memory = buffer.data
        self.length = length
        self.views = [memory[at : at + length] for at in offsets.tolist()]

    def exchange(self, plain: socket.socket, sends: bool, initiates: bool, at: int | None = None) -> None:
        """Do one side's part of moving all blocks, or block `at` alone, which is a ping-pong.

        The initiator of a write waits until the receiver has them; the initiator of a read asks for them first.
        """
        signal = take if sends else answer
        if sends != initiates:
            signal(plain)
        if at is None:
            self._send(plain) if sends else self._receive(plain)
        elif sends:
            plain.sendall(self.views[at])
        elif plain.recv_into(self.views[at], 0, socket.MSG_WAITALL) < self.length:
            raise ConnectionError(GONE)
        if sends == initiates:
            signal(plain)

    def _send(self, plain: socket.socket) -> None:
        at, skip = 0, 0
        while at < len(self.views):
            at, skip = divmod(at * self.length + skip + plain.sendmsg(self._some(at, skip)), self.length)

    def _receive(self, plain: socket.socket) -> None:
        at, skip = 0, 0
        while at < len(self.views):
            came = plain.recvmsg_into(self._some(at, skip), 0, socket.MSG_WAITALL)[0]
            if not came:
                raise ConnectionError(GONE)
            at, skip = divmod(at * self.length + skip + came, self.length)

    def _some(self, at: int, skip: int) -> list[memoryview]:
        """Return the views of one call, from block `at` on, whose first `skip` bytes have moved."""
        some = self.views[at : at + IOV_MAX]
        some[0] = some[0][skip:]
        return some


def take(plain: socket.socket) -> None:
    """Wait for the receiver's byte: a write has arrived, or a read may begin."""
    if not plain.recv(1):
        raise ConnectionError(GONE)


def answer(plain: socket.socket) -> None:
    """Send the receiver's byte."""
    plain.sendall(ANSWER)
