"""Event loops await batches, or room for another, by one eventfd an engine, which every such loop watches.

A worker that finishes an awaited batch writes to the eventfd, and so does whoever gives back awaited slots; the loop
that wakes resolves the futures of all finished batches and of all who wait for slots, in whichever loop they are.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from mooncache import forks
from mooncache.errors import Status
from mooncache.kernels import calls, waits

ROOM = -1
"""Instead of a handle: slots or batch rows are awaited."""


class _Waiter(NamedTuple):
    """A coroutine that awaits a batch, or room for one."""

    handle: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]


class Awaiting:
    """The event loops that wait for an engine's batches.

    Attributes:
        event_fd: what workers write to.
        ctl: address of a control block of the engine; any will do, since looking at a batch changes no counter.
    """

    def __init__(self) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.ctl = 0
        self._lock = threading.Lock()
        self._waiters: dict[int, _Waiter] = {}
        self._loops: set[asyncio.AbstractEventLoop] = set()
        self._closed = False
        forks.private(self)

    def disown(self) -> None:
        """Let go of the eventfd and the loops in a forked child; see `forks.Holder`."""
        self._closed, self._lock = True, threading.Lock()
        self._waiters.clear()
        self._loops.clear()
        forks.drop([self.event_fd])

    def finished(self, handle: int) -> asyncio.Future[None]:
        """Return a future of the running event loop, resolved when the batch is done or closed, or its engine is."""
        future = self._enter(handle)
        if not future.done() and waits.await_finish(self.ctl, handle) != Status.NOT_FINISHED:
            future.set_result(None)
        return future

    async def room(self, seen: int, timeout: float | None) -> None:
        """Return when slots or batch rows came back since the capacity bell was `seen`, at close, or after so long."""
        future = self._enter(ROOM)
        if not future.done() and waits.await_capacity(self.ctl, seen):
            future.set_result(None)
        await asyncio.wait([future], timeout=timeout)
        future.cancel()

    def _enter(self, handle: int) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            if self._closed:
                future.set_result(None)
                return future
            self._loops = {known for known in self._loops if not known.is_closed()} | {loop}
            loop.add_reader(self.event_fd, self._announce)
        self._waiters[id(future)] = _Waiter(handle, loop, future)
        future.add_done_callback(lambda f: self._waiters.pop(id(f), None))
        return future

    def _announce(self) -> None:
        """Resolve the futures of batches that are done, and of coroutines that wait for room."""
        with suppress(BlockingIOError):  # another event loop was faster
            os.eventfd_read(self.event_fd)
        for waiter in list(self._waiters.values()):
            if waiter.handle == ROOM or calls.status(self.ctl, waiter.handle) != Status.NOT_FINISHED:
                self._resolve(waiter)

    def _resolve(self, waiter: _Waiter) -> None:
        if not _tell(waiter.loop, _set_result, waiter.future):
            self._waiters.pop(id(waiter.future), None)

    def release(self) -> None:
        """Resolve all futures: the engine has closed."""
        for waiter in list(self._waiters.values()):
            self._resolve(waiter)

    def close(self) -> None:
        """Close the eventfd after every loop has stopped to watch it: numbers of closed files are reused."""
        with self._lock:
            self._closed = True
            self._loops = {loop for loop in self._loops if _tell(loop, self._leave, loop)}
            if not self._loops:
                self._close_descriptor()

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop watching, in a loop. The last loop to leave closes the eventfd."""
        with self._lock:
            loop.remove_reader(self.event_fd)
            self._loops.discard(loop)
            if not self._loops:
                self._close_descriptor()

    def _close_descriptor(self) -> None:
        descriptor, self.event_fd = self.event_fd, -1
        forks.drop([descriptor])


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> bool:
    """Have a function called in an event loop; return False when that loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _set_result(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
