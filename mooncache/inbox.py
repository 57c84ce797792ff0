"""Notifications: short messages that came with batches of peers, in the order in which each peer submitted them."""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from time import monotonic_ns
from typing import NamedTuple

import numpy as np

from mooncache import forks
from mooncache.errors import EngineClosed, EngineInherited, UsageError, came
from mooncache.kernels import inbox as kernels
from mooncache.kernels.layout import aligned
from mooncache.kernels.state import address_of, function_address
from mooncache.operands import deadline_ns

MESSAGE_BYTES = 1024
MARK = b"\0"
"""Before each message as it travels, so that none is empty."""


class Notification(NamedTuple):
    """One message, and the engine that sent it. All bytes of the batch it came with are in this engine's memory.

    Attributes:
        peer: the name under which the sender proved to know the secret when it connected.
    """

    peer: str
    message: bytes


def pack(message: object) -> np.ndarray:
    """As it travels, uint8. Raises UsageError for one too long."""
    if isinstance(message, str):
        try:
            message = message.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"expected a notification that UTF-8 can hold, got {came(message)}: {error}") from error
    if not isinstance(message, bytes | bytearray | memoryview):
        raise UsageError(f"expected a notification of bytes or str, got {type(message).__name__}")
    message = bytes(message)
    if len(message) > MESSAGE_BYTES:
        raise UsageError(f"expected a notification of at most {MESSAGE_BYTES} bytes, got {len(message)}")
    return np.frombuffer(MARK + message, np.uint8).copy()


def unpack(entry: bytes) -> Notification:
    """An entry of the inbox: what `kernels.sender` wrote of the sender, then what `pack` made, or a stranger sent."""
    first = kernels.LENGTH_BYTES
    end = first + int.from_bytes(entry[:first], "little")
    return Notification(entry[first:end].decode(errors="replace"), entry[end + len(MARK) :])


class Inbox:
    """What has arrived and was not fetched yet, at most limits.INBOX_NOTES; a batch whose message finds no room fails.

    A sender finds room as long as it has fewer messages there than places are free.

    Iterating takes out what is there now; `async for` waits for more, for ever; `get` waits once.
    """

    def __init__(self) -> None:
        self.words = aligned(kernels.INBOX_WORDS)
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.words[kernels.I_EVENT_FD] = self._event_fd
        self.words[[kernels.I_WRITE, kernels.I_READ]] = function_address("write"), function_address("read")
        self._address = address_of(self.words)
        self._lock = threading.Lock()
        self._closed = self._inherited = False
        self._lent: set[int] = set()  # descriptors of those who wait
        forks.private(self)

    def disown(self) -> None:
        """See `forks.Holder`."""
        self._closed = self._inherited = True
        self._lock = threading.Lock()
        forks.drop([self._event_fd, *self._lent])
        self._lent.clear()

    def __iter__(self) -> Iterator[Notification]:
        while (note := self._fetch()) is not None:
            yield note

    def _fetch(self) -> Notification | None:
        if self._inherited:
            raise EngineInherited("these notifications belong to the process that this one was forked from")
        buffer = np.empty(kernels.ENTRY_BYTES, np.uint8)  # of this call alone: others fetch as well
        length = kernels.fetch(self._address, buffer)
        return None if length == kernels.EMPTY else unpack(buffer[:length].tobytes())

    def get(self, timeout: float | None = None) -> Notification:
        """The oldest one; waits for it.

        Args:
            timeout: seconds, or None for no limit.

        Raises TimeoutError: none came in time. EngineClosed: the engine closed meanwhile.
        """
        deadline = deadline_ns(timeout)
        while (note := self._fetch()) is None:
            left = deadline - monotonic_ns() if deadline else None
            if left is not None and left <= 0:
                raise TimeoutError(f"no notification came within {timeout} s")
            with self._watched() as descriptor:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.poll(None if left is None else left / 1e6)
        return note

    @contextmanager
    def _watched(self) -> Iterator[int]:
        """A descriptor that is readable while something can be fetched, or the inbox is shut.

        Each waiter has one of its own: an event loop knows one reader a descriptor, and it outlives `close`.
        """
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine was closed; nothing more will come")
            descriptor = os.dup(self._event_fd)
            self._lent.add(descriptor)
        try:
            yield descriptor
        finally:
            with self._lock:
                if descriptor in self._lent:
                    self._lent.remove(descriptor)
                    os.close(descriptor)

    async def __aiter__(self) -> AsyncIterator[Notification]:
        loop = asyncio.get_running_loop()
        while True:
            for note in self:
                yield note
            with self._watched() as descriptor:
                stirred = asyncio.Event()
                loop.add_reader(descriptor, stirred.set)
                try:
                    await stirred.wait()
                finally:
                    loop.remove_reader(descriptor)

    def close(self) -> None:
        """Refuse what still comes, and let those who wait know."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            kernels.shut(self._address)
            descriptor, self._event_fd = self._event_fd, -1
            os.close(descriptor)
