"""A batch is the answer of `Engine.write` and `read`: it is waited for, asked, cancelled and closed."""

from __future__ import annotations

from collections.abc import Generator
from enum import IntEnum
from time import monotonic_ns, sleep
from types import TracebackType
from typing import Any

import numpy as np

from mooncache.errors import REASON, EngineClosed, Failure, Status, TransferFailed, UsageError
from mooncache.kernels import calls, waits
from mooncache.operands import deadline_ns
from mooncache.owner import Owner
from mooncache.peer import Peer

NAP_NS = 100_000_000
"""Longest sleep of a waiting thread before it lets Python run signal handlers; a signal also ends it at once."""


NAP_S, NAP_MOST_S = 1e-4, 5e-3
"""Between two looks of `wait_quiesced`; doubled each time."""


class Quiesced(IntEnum):
    """The ends at which no byte of a batch can move any more. True only for BOTH."""

    NO = 0  # slices are without an answer: neither range may be touched
    SOURCE = 1  # this engine touches its own ranges no more, but what was sent may still land at the peer
    BOTH = 2  # at both ends

    def __bool__(self) -> bool:
        return self is Quiesced.BOTH


# an enum's member costs several times as much to look up
NOT_QUIESCED, NOT_FINISHED = Quiesced.NO, int(Status.NOT_FINISHED)
STALE = -int(Status.STALE_HANDLE)


class Batch:
    """Requests that were submitted together. Close it when done with it: its slices live until then.

    The source and target ranges belong to the transfer from submission until `quiesced`. A batch that is garbage
    collected closes itself; in serving code close explicitly, because *where* that happens is what this engine is
    about.

    Attributes:
        peer: name of the peer.
        requests: how many requests it has; failures name them by index.
    """

    __slots__ = ("_breaks", "_closed", "_engine", "_failures", "_handle", "_notes", "_quiesced", "_to", "requests")

    def __init__(self, engine: Owner, handle: int, to: Peer, requests: int, notified: bool, breaks: int) -> None:
        self._engine, self._handle, self._to, self.requests = engine, handle, to, requests
        self._breaks = breaks  # of the peer's connections, before it was submitted
        self._quiesced = NOT_QUIESCED
        self._notes = int(notified)  # slices that carry its notification
        self._closed = False
        self._failures: tuple[Failure, ...] | None = None

    @property
    def peer(self) -> str:
        """The name of the peer."""
        return self._to.name

    @property
    def done(self) -> bool:
        """True once every slice is answered: arrived, failed or cancelled. A closed batch counts as done."""
        return self._closed or calls.status(self._engine.ctl, self._handle) != Status.NOT_FINISHED

    @property
    def quiesced(self) -> Quiesced:
        """The ends at which no more bytes can move, so that the ranges there may be used again.

        True (`Quiesced.BOTH`) once every slice is answered and, if a connection ended with slices of this time on it,
        the peer has confirmed that nothing of it lands any more, or is known to be dead: its host refuses connections
        to it, or nothing was heard of it for 60 s. Until then `Quiesced.SOURCE` says that the ranges of this engine are
        free. Also valid after `close`, and after the engine's, which gives peers 1 s to confirm.
        """
        if self._quiesced is not Quiesced.BOTH and calls.quiesced(self._engine.ctl, self._handle):
            to = self._to  # the worker counts a break before it answers the slices that were on the connection
            settled = to.confirmed >= to.breaks or to.breaks == self._breaks or self._arrived()
            self._quiesced = Quiesced.BOTH if settled else Quiesced.SOURCE
        return self._quiesced

    def _arrived(self) -> bool:
        """Return whether it is known that all has arrived."""
        return self._failures == () or (not self._closed and int(calls.failed(self._engine.ctl, self._handle)) == 0)

    def wait_quiesced(self, timeout: float | None = None) -> None:
        """Block until no more bytes can move at either end. Also valid after `close`.

        A batch that is not done is waited for, so cancel or close it first to make that short.

        Args:
            timeout: seconds, or None for no limit.

        Raises TimeoutError: not so in time; it says which ranges are still in use.
        """
        deadline, nap = deadline_ns(timeout), NAP_S
        while not self.quiesced:
            if deadline and monotonic_ns() >= deadline:
                free = "this engine's are free" if self.quiesced is Quiesced.SOURCE else "at neither end they are free"
                raise TimeoutError(f"ranges of {self!r} are still in use after {timeout} s: {free}")
            sleep(nap)
            nap = min(2 * nap, NAP_MOST_S)

    @property
    def slices(self) -> int:
        """The slices that the requests were cut into; 0 once closed."""
        return max(0, int(calls.slices(self._engine.ctl, self._handle)) - self._notes)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The failed requests (index, status, reason), ascending; empty when all arrived.

        A notification that failed on its own account is listed like a request, with the index `requests`.

        Raises:
            UsageError: the batch is not finished yet, or was closed before it was.
        """
        if self._learn() == -NOT_FINISHED:
            raise UsageError("this batch is not finished; wait for it before asking for its failures")
        if self._failures is None:
            raise UsageError("this batch was closed before it finished; its failures were not kept")
        return self._failures

    def _learn(self) -> int:
        """Note the outcome in `_failures` if it can be known. Return what `calls.failed` does.

        Another thread may close the batch at any moment, but notes the outcome first.
        """
        ctl, handle = self._engine.ctl, self._handle
        count = calls.failed(ctl, handle)
        if count == 0:
            self._failures = ()
        elif count > 0 and self._failures is None:
            request, why = np.zeros((2, self.requests + self._notes), np.int64)
            where = np.zeros((request.size, 3), np.int64)
            count = calls.failures(ctl, handle, request, why, where)
            if count >= 0:
                self._failures = tuple(
                    Failure(int(i), Status(int(code)), self._reason(Status(int(code)), *at))
                    for i, code, at in zip(request[:count], why[:count], where[:count].tolist(), strict=True)
                )
        return int(count)

    def _reason(self, status: Status, local: int, remote: int, length: int) -> str:
        """Explain why a request failed; where memory is at fault, name the range and its owner."""
        if status == Status.LOCAL_ERROR:
            return f"{REASON[status]}: {length} bytes at {local:#x} of engine {self._engine.name!r}"
        if status == Status.REMOTE_ERROR:
            return f"{REASON[status]}: {length} bytes at {remote:#x} of peer {self._to.name!r}"
        return REASON[status]

    def wait(self, timeout: float | None = None) -> Batch:
        """Block until the batch is done; spins briefly, then sleeps. Other Python threads run meanwhile.

        Args:
            timeout: seconds, or None for no limit. When it passes the batch goes on; cancel or close it to stop it.

        Returns the batch. Raises:
            TimeoutError: not done in time. Its ranges are still in use: cancel or close it, then `wait_quiesced`.
            TransferFailed: some requests failed, the others arrived.
            UsageError: the batch is closed, or was by another thread before it was done. EngineClosed: the engine is.
        """
        if self._closed or self._engine.inherited:
            self._check_held()
        deadline = deadline_ns(timeout)
        ctl, handle = self._engine.ctl, self._handle
        held = self._engine.memory  # by this thread, while it is in `waits.wait`
        status = calls.status(ctl, handle)
        while status == NOT_FINISHED:
            left = min(NAP_NS, deadline - monotonic_ns()) if deadline else NAP_NS
            if left <= 0:
                raise TimeoutError(
                    f"{self!r} was not done within {timeout} s, and its ranges are still in use: wait on, or close it "
                    "and use them again after wait_quiesced()"
                )
            status = waits.wait(ctl, handle, left)
        del held
        self._tell()
        return self

    def _check_held(self) -> None:
        self._engine.check_own()
        if self._closed:
            if self._engine.closed:
                raise self._engine_closed()
            raise UsageError("this batch is closed; nothing is left to wait for")

    def _engine_closed(self) -> EngineClosed:
        return EngineClosed(f"engine {self._engine.name!r} was closed while {self!r} was open")

    def _tell(self) -> None:
        """Return if all arrived, else raise: the batch is done or closed."""
        if self._learn() == STALE:
            if self._engine.closed:
                raise self._engine_closed()
            if self._failures is None:
                raise UsageError(
                    "another thread closed this batch before its outcome was known; wait first, then close"
                )
        if self._failures:
            raise TransferFailed(self._failures, self.requests, self.peer)

    def __await__(self) -> Generator[Any, None, Batch]:
        """`await batch` does what `wait()` does, without a thread: the engine's eventfd wakes the event loop."""
        self._check_held()
        while not self.done:
            yield from self._engine.awaiting.finished(self._handle).__await__()
        self._tell()
        return self

    def cancel(self) -> None:
        """Stop posting: slices the NIC does not have yet fail as CANCELLED; those it has are waited for as usual.

        Has no effect on a batch that is done.
        """
        self._check_held()
        if calls.cancel(self._engine.ctl, self._handle) == Status.STALE_HANDLE and self._engine.closed:
            raise self._engine_closed()

    def close(self) -> None:
        """Delete the batch's slices, as the engine's reclaim policy says. Once; a second close is an error.

        A batch that is not done is cancelled and detached: the worker gives it back when the NIC has answered for
        the last slice. Until `quiesced` its buffers must not be used again.

        Raises:
            UsageError: closed before.
        """
        if self._closed:
            raise UsageError("this batch is closed already")
        ctl = self._engine.ctl
        if self._failures is None:
            self._learn()  # before the row goes, for other threads that wait
        status = calls.close(ctl, self._handle, self._failures is None)
        if status == Status.HAS_FAILURES:  # it has finished in between
            self._learn()
            status = calls.close(ctl, self._handle, False)
        elif status == Status.OK and self._failures is None:
            self._failures = ()
        self._closed = True
        if status == Status.STALE_HANDLE and not self._engine.closed:
            raise UsageError("another thread has closed this batch already")

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed and not self._engine.inherited:
            self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._engine.inherited:
            self.close()

    def __repr__(self) -> str:
        if self._engine.inherited:
            return f"<Batch of {self.requests} requests to {self.peer!r}, of {self._engine!r}>"
        state = "closed" if self._closed else "done" if self.done else "running"
        return f"<Batch of {self.requests} requests to {self.peer!r}, {state}>"
