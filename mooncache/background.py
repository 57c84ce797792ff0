"""Threads that work for an engine in the background. One that fails is logged, begun again and shown as trouble.

Nobody waits for such a thread, so an exception in it would only be printed, and whatever the thread looked after would
stand still. Here it is logged with its traceback, kept as `trouble` for `Engine.stats`, and told to what depended
on the thread; then the thread's work is begun again, after a pause that grows as long as it keeps failing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic

from mooncache import shortage
from mooncache.threads import Thread

log = logging.getLogger("mooncache")

PAUSE_S, PAUSE_MOST_S = 0.05, 5.0
"""Before work that failed is begun again; doubled each time. At the most as long as a handshake may take."""


class Background:
    """The threads of one owner: a provider, a store of names, a listener, an engine.

    Methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[Thread] = []
        self._trouble: dict[str, str] = {}
        self._closing = threading.Event()

    @property
    def trouble(self) -> tuple[str, ...]:
        """The present trouble, and what could not be set right, a sentence each; empty when all is well."""
        with self._lock:
            return tuple(f"{what}: {why}" for what, why in self._trouble.items())

    def start(
        self, name: str, run: Callable[[], object], failed: Callable[[Exception], object] | None = None
    ) -> Thread:
        """Do work in a new daemon thread of this name; return the thread.

        Args:
            run: all of the work. It returns when there is no more to do, or its owner closes. An exception is noted,
                and `run` called again after a pause; so it must leave things as they can be taken up again.
            failed: called in the thread, after an exception and before the pause: fails what depended on the work.

        Raises CapacityError: the system has no thread left.
        """
        thread = Thread(name, partial(self._run, name, run, failed))
        with self._lock, shortage.told(f"thread {name!r} cannot be started"):
            # Listed first: a `start` that an exception of a signal handler interrupts may have started it.
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()
        return thread

    def _run(self, name: str, run: Callable[[], object], failed: Callable[[Exception], object] | None) -> None:
        pause, times = PAUSE_S, 0
        while True:
            try:
                run()
                return
            except Exception as error:
                times += 1
                self._failed(name, error, times)
                if failed is not None:
                    self._tell(name, error, failed)
            if self._closing.wait(pause):
                return
            pause = min(2 * pause, PAUSE_MOST_S)

    def _failed(self, name: str, error: Exception, times: int) -> None:
        why = f"its thread failed and was started again: {type(error).__name__}: {error}"
        if self.note(name, why if times == 1 else f"{why} ({times} times)") and times == 1:
            log.error("background thread %r failed; it is started again", name, exc_info=error)

    def _tell(self, name: str, error: Exception, failed: Callable[[Exception], object]) -> None:
        try:
            failed(error)
        except Exception as another:
            self.note(f"{name}, after it had failed", f"{type(another).__name__}: {another}")
            log.error("what depends on background thread %r could not be failed", name, exc_info=another)

    def note(self, what: str, why: str) -> bool:
        """Note that something is wrong with `what`, until it is `settled`.

        Return whether that is news, to be logged.
        """
        with self._lock:
            news = self._trouble.get(what) != why
            self._trouble[what] = why
            return news

    def settled(self, what: str) -> bool:
        """Note that all is well with `what`. Return whether it was not before."""
        with self._lock:
            return self._trouble.pop(what, None) is not None

    def stop(self) -> None:
        """Begin no work again that fails from now on."""
        self._closing.set()

    def close(self, seconds: float = threading.TIMEOUT_MAX) -> bool:
        """Wait for all threads, which must have been told to end; not from one of them. Return whether all have."""
        self.stop()
        return self.join(seconds=seconds)

    def join(self, name: str = "", seconds: float = threading.TIMEOUT_MAX) -> bool:
        """Wait for all threads, or those of this name, to end. Return whether they have."""
        with self._lock:
            threads = [thread for thread in self._threads if name in ("", thread.name)]
        end = monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, end - monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def __repr__(self) -> str:
        return f"<Background of {len(self._threads)} threads, {len(self._trouble)} in trouble>"
