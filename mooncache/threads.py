"""Threads whose start and end stay known when an exception of a signal handler interrupts `start` or `join`.

Such an exception may leave `threading.Thread.start` while the new thread has not begun yet, and what it was to use is
given back under it. It may also leave `threading.Thread.join`, which then takes a running thread for one that has ended
(Python 3.10 to 3.12, https://github.com/python/cpython/issues/90882).
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Thread(threading.Thread):
    """A daemon thread. A `start` that raises has started it entirely, or not at all: `is_alive` says which.

    Args:
        name: of the thread.
        work: is called in the thread.
    """

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._gate = threading.Lock()
        self._due = self._begun = False
        self._over = threading.Event()

    def start(self) -> None:
        """Start the thread. Raises RuntimeError when the system has none left, and what signal handlers raise."""
        try:
            self._due = True
            super().start()
        except BaseException:
            with self._gate:
                self._due = self._begun
            raise

    def run(self) -> None:
        """Work, unless `start` has said that it will not."""
        with self._gate:
            if not self._due:
                return
            self._begun = True
        try:
            self._work()
        finally:
            del self._work  # which may hold whoever holds this thread
            self._over.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, so many seconds at most; not at all for one that was not started."""
        if self._due and self._over.wait(timeout):
            super().join(timeout)  # for the few instructions that are left

    def is_alive(self) -> bool:
        """Return whether the thread was started and its work has not ended."""
        return self._due and not self._over.is_set()
