"""A deadline is the time by which a call has to be back: one object, handed to all steps that may have to wait."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from mooncache.errors import EngineClosed


class _Shared:
    """The state that a deadline shares with all that were taken from it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.why = ""
        self.waiting = ""
        self.socks: set[socket.socket] = set()


class Deadline:
    """A time so many seconds from now, or no limit.

    Another thread may end it early: whoever waits under it is told at once, also in the middle of a `recv`.

    Attributes:
        seconds: how many there were in the beginning; None without a limit.
    """

    def __init__(
        self, seconds: float | None = None, *, left: float | None = None, shared: _Shared | None = None
    ) -> None:
        """`left`: how many of the seconds are left, if some have passed already."""
        self.seconds = seconds
        left = seconds if left is None else left
        self._end = float("inf") if left is None else monotonic() + left
        self._shared = shared or _Shared()

    def within(self, seconds: float) -> Deadline:
        """Return a part of the deadline: so many seconds from now, unless this one ends before."""
        return Deadline(min(seconds, max(0.0, self._end - monotonic())), shared=self._shared)

    def left(self, most: float = threading.TIMEOUT_MAX) -> float:
        """Return the seconds until the deadline, at most so many. Raises TimeoutError at 0, EngineClosed if ended."""
        if self._shared.ended.is_set():
            raise EngineClosed(self._shared.why)
        left = min(most, self._end - monotonic())
        if left <= 0:
            raise TimeoutError
        return left

    @property
    def ended(self) -> str:
        """The reason for which it was ended early; empty when it was not."""
        return self._shared.why

    @property
    def over(self) -> bool:
        """True once nobody should wait any more."""
        return self._shared.ended.is_set() or monotonic() >= self._end

    def sleep(self, seconds: float) -> None:
        """Sleep for that time, or what is left; return at once when the deadline is ended."""
        self._shared.ended.wait(max(0.0, min(seconds, self._end - monotonic())))

    def until(self, condition: Callable[[], bool], pause: float = 1e-3) -> bool:
        """Look again and again until the condition holds; return False at the deadline. Raises EngineClosed."""
        while not condition():
            if self._shared.ended.is_set():
                raise EngineClosed(self._shared.why)
            if self.over:
                return False
            self.sleep(pause)
        return True

    # -------------------------------------------------------------------------- what is waited for
    @property
    def waiting(self) -> str:
        """The last thing that was waited for, in words for a message."""
        return self._shared.waiting

    def waits_for(self, what: str) -> None:
        """Note what is waited for from now on."""
        self._shared.waiting = what

    @contextmanager
    def over_socket(self, sock: socket.socket) -> Iterator[None]:
        """Guard a wait for a socket: it is shut down when the deadline is ended."""
        with self._shared.lock:
            self._shared.socks.add(sock)
        try:
            self.left()
            yield
        finally:
            with self._shared.lock:
                self._shared.socks.discard(sock)

    def end(self, why: str) -> None:
        """End the deadline now, because the engine closes: waits raise EngineClosed with the reason."""
        shared = self._shared
        shared.why = why
        shared.ended.set()
        with shared.lock:
            for sock in shared.socks:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:  # not connected yet, or not any more
                    continue

    def __repr__(self) -> str:
        return f"<Deadline of {self.seconds} s, waiting for {self.waiting or 'nothing'}>"
