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
from mooncache.kernels.arrays import WORD, Row, address_of, aligned, function_address
from mooncache.kernels.records.inbox import COUNTS_BYTES, INBOX
from mooncache.kernels.settings import Settings
from mooncache.limits import NOTE_BYTES, NOTE_BYTES_MOST, SENDER_BYTES
from mooncache.operands import deadline_ns

MARK = b"\0"
"""Before each message as it travels, so that none is empty."""


class Notification(NamedTuple):
    """One message, and the engine that sent it. All bytes of the batch it came with are in this engine's memory.

    Attributes:
        peer: the name under which the sender proved to know the secret when it connected.
    """

    peer: str
    message: bytes


def pack(message: object, most: int = NOTE_BYTES) -> np.ndarray:
    """Encode a message as it travels, uint8. Raises UsageError for one of more than `most` bytes."""
    if isinstance(message, str):
        try:
            message = message.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"expected a notification that UTF-8 can hold, got {came(message)}: {error}") from error
    if not isinstance(message, bytes | bytearray | memoryview):
        raise UsageError(f"expected a notification of bytes or str, got {type(message).__name__}")
    message = bytes(message)
    if len(message) > most:
        raise UsageError(
            f"expected a notification of at most {most} bytes, got {len(message)}; the setting note_bytes, of both "
            f"engines, permits longer ones, up to {NOTE_BYTES_MOST}"
        )
    return np.frombuffer(MARK + message, np.uint8).copy()


def unpack(entry: bytes) -> Notification:
    """Decode an entry of the inbox: the sender that `kernels.sender` wrote, then the message of `pack`."""
    first = kernels.LENGTH_BYTES
    end = first + int.from_bytes(entry[:first], "little")
    return Notification(entry[first:end].decode(errors="replace"), entry[end + len(MARK) :])


class Inbox:
    """The notifications that have arrived and were not fetched yet. A batch whose message finds no room fails.

    A sender finds room as long as it has fewer messages there than places are free.

    Iterating takes out what is there now; `async for` waits for more, for ever; `get` waits once.
    """

    def __init__(self, settings: Settings) -> None:
        notes, self._longest = settings.notes, SENDER_BYTES + settings.note_stride
        entries = notes * (kernels.ENTRY_BYTES + settings.note_stride)
        self.words = aligned((INBOX.itemsize + COUNTS_BYTES + entries) // WORD, sparse=True)
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        Row(kernels.header(self.words)).set(
            notes=notes,
            bytes=settings.note_stride,
            event_fd=self._event_fd,
            write=function_address("write"),
            read=function_address("read"),
        )
        self._left: list[Notification] = []  # what had not been fetched when the words were let go
        self._lock = threading.Lock()
        self._closed = self._inherited = False
        self._lent: set[int] = set()  # descriptors of those who wait
        forks.private(self)

    def disown(self) -> None:
        """Close the eventfd in a forked child; see `forks.Holder`."""
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
        words = self.words  # may be let go meanwhile
        if not words.size:
            return self._left.pop(0) if self._left else None
        buffer = np.empty(self._longest, np.uint8)  # of this call alone: others fetch as well
        length = kernels.fetch(address_of(words), buffer)
        return None if length == kernels.EMPTY else unpack(buffer[:length].tobytes())

    def get(self, timeout: float | None = None) -> Notification:
        """Return the oldest notification; wait for it.

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
        """Return a descriptor that is readable while something can be fetched, or the inbox is shut.

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
        """Refuse notifications from now on, and let those who wait know."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            kernels.shut(address_of(self.words))
            descriptor, self._event_fd = self._event_fd, -1
            os.close(descriptor)

    def release(self) -> None:
        """Free the memory, once the inbox is closed and nobody delivers any more; unfetched notifications are kept."""
        left = list(self)
        self.words = self.words[:0].copy()
        self._left += left
