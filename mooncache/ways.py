"""Ways to peers: one try at a time to each, shared by all who wait for it, and none too soon after a failure.

A try runs in a thread of its own, so that each caller waits no longer than it wants to, as a thread or as a coroutine,
while the try goes on for the others, and for the next submit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # another than Python's until 3.11
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic

from mooncache.background import Background
from mooncache.deadline import Deadline
from mooncache.errors import EngineClosed, MooncacheError, TransportError
from mooncache.peer import Peer

CONNECT_S = 30.0
"""One try: names (two requests to a store), a handshake, lanes, and the first bytes over RDMA (20 s by themselves)."""

PAUSE_S, PAUSE_MOST_S = 0.05, 2.0
"""The pause after a failed try, before submits begin another; doubled each time. So a peer that is back is found by
submits within 2 s, and at once by `connect`, or when the store of names has news of it."""

KEPT = 1024
"""Names whose last try failed that are remembered, beyond which the oldest are forgotten."""

Attempt = Callable[[Deadline], Peer]


@dataclass
class _Try:
    """One try, and the callers that wait for it."""

    deadline: Deadline = field(default_factory=lambda: Deadline(CONNECT_S))
    future: Future[Peer] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # a caller that gives up must not cancel it for the others


@dataclass
class _Way:
    """The present try, and the last failure, of one name."""

    current: _Try | None = None
    next: _Try | None = None  # for those who want news that are newer than the current try
    failed: Exception | None = None
    failed_at: float = 0.0
    pause: float = 0.0


class Ways:
    """The ways from one engine to others.

    Args:
        engine: its name, for messages.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._lock = Lock()
        self._ways: dict[str, _Way] = {}
        self._closed = False
        self._threads = Background()

    def begin(self, name: str, attempt: Attempt, *, patient: bool = True, news: bool = False) -> Asked:
        """Take part in a try to reach `name`, or begin one.

        Args:
            attempt: connects, under a deadline, and returns the peer. Called in a thread.
            patient: within the pause after a failure, that failure is the answer.
            news: a try that has begun already does not do; what it has learnt may be older than what is asked for.

        Raises CapacityError when the system has no thread left.
        """
        with self._lock:
            if self._closed:
                raise EngineClosed(f"engine {self._engine!r} is closed")
            way = self._ways.get(name) or self._remember(name)
            if way.current is not None:
                if not news:
                    return Asked(name, way.current)
                way.next = way.next or _Try()
                return Asked(name, way.next)
            passed = monotonic() - way.failed_at
            if patient and way.failed is not None and passed < way.pause:
                known = _Try()
                known.future.set_exception(_once_more(way, passed))
                return Asked(name, known)
            way.current = begun = _Try()
            try:
                self._threads.start(f"{self._engine}-way-to-{name}", lambda: self._run(name, way, attempt))
            except BaseException:
                way.current = None
                raise
            return Asked(name, begun)

    def _remember(self, name: str) -> _Way:
        idle = [known for known, way in self._ways.items() if way.current is None]
        for known in idle[: max(0, len(self._ways) - KEPT)]:
            del self._ways[known]
        way = self._ways[name] = _Way()
        return way

    def _run(self, name: str, way: _Way, attempt: Attempt) -> None:
        """Run the current try in a thread, and the next one as long as somebody has asked for it meanwhile."""
        now = way.current
        while now is not None:
            try:
                peer, error = attempt(now.deadline), None
            except Exception as raised:
                peer, error = None, _typed(raised, name, now.deadline)
            with self._lock:
                ended, now = (now, way.next), None
                way.current = way.next = None
                if error is not None:
                    way.failed, way.failed_at = error, monotonic()
                    way.pause = min(2 * way.pause or PAUSE_S, PAUSE_MOST_S)
                elif ended[1] is not None:
                    now = way.current = ended[1]
                elif self._ways.get(name) is way:
                    del self._ways[name]
            for each in ended:
                if each is not None and each is not now:
                    _settle(each.future, peer, error)

    def hurry(self, name: str) -> None:
        """End the pause of this name, of which there is news: the next submit begins a try."""
        with self._lock:
            way = self._ways.get(name)
            if way is not None:
                way.failed, way.pause = None, 0.0

    def stop(self) -> None:
        """Begin no try any more, and end those under way, as far as they can be."""
        with self._lock:
            self._closed = True
            tries = [each for way in self._ways.values() for each in (way.current, way.next) if each is not None]
        for each in tries:
            each.deadline.end(f"engine {self._engine!r} was closed meanwhile")

    def close(self, seconds: float) -> bool:
        """Wait until all tries have ended, at most so long. Return whether they have."""
        self.stop()
        return self._threads.close(seconds)

    def __repr__(self) -> str:
        return f"<Ways of {self._engine!r}, {len(self._ways)} being tried or blocked>"


class Asked:
    """One caller's part in a try.

    Attributes:
        future: of the peer; cancelling it is without effect.
    """

    def __init__(self, name: str, tried: _Try) -> None:
        self._name, self._tried = name, tried
        self.future = tried.future

    def result(self, deadline: Deadline) -> Peer:
        """Wait for the peer, and return it.

        Raises the try's error, or TransportError at the deadline: the try goes on.
        """
        try:
            self.future.exception(max(0.0, deadline.left()))
        except (TimeoutError, FutureTimeoutError):
            raise self._late(deadline) from None
        return self._outcome()

    async def aresult(self, deadline: Deadline) -> Peer:
        """Wait for the peer as a coroutine, like `result`. Cancelling it leaves the try to the others."""
        awaited = asyncio.wrap_future(self.future)
        try:
            done, _ = await asyncio.wait([awaited], timeout=None if deadline.seconds is None else deadline.left())
        except TimeoutError:  # there was no time in the first place
            done = set()
        finally:
            awaited.cancel()
        if not done:
            raise self._late(deadline)
        return self._outcome()

    def _outcome(self) -> Peer:
        """Return the peer of a try that has ended, or raise its error: each caller's own, since raising changes it."""
        error = self.future.exception()
        if isinstance(error, MooncacheError):
            raise type(error)(*error.args) from error
        return self.future.result()

    def _late(self, deadline: Deadline) -> TransportError:
        """Raise the error for a caller whose deadline is over before the try is."""
        waiting = self._tried.deadline.waiting or "its turn"
        return TransportError(
            f"peer {self._name!r} was not connected within the {deadline.seconds:g} s of this call, which waited for "
            f"{waiting}; nothing was submitted"
        )


def _settle(future: Future[Peer], peer: Peer | None, error: Exception | None) -> None:
    if peer is not None:
        future.set_result(peer)
    else:
        future.set_exception(error)


def _typed(error: Exception, name: str, deadline: Deadline) -> Exception:
    if isinstance(error, TimeoutError) and not isinstance(error, MooncacheError):
        return TransportError(
            f"peer {name!r} was not connected within {CONNECT_S:g} s: no {deadline.waiting or 'answer'}"
        )
    return error


def _once_more(way: _Way, passed: float) -> Exception:
    """Return the failure that is told during the pause after it."""
    error = way.failed
    assert error is not None
    if not isinstance(error, MooncacheError) or len(error.args) != 1:
        return error
    return type(error)(
        f"{error} (that was {passed:.2f} s ago; a submit tries again in {way.pause - passed:.2f} s, `connect` at once)"
    )
