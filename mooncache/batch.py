"""A batch: what `Engine.write` and `.read` return, and all that can be done with it."""

from __future__ import annotations

from collections.abc import Generator
from time import monotonic_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from mooncache.errors import REASON, EngineClosed, Failure, Status, TransferFailed, UsageError
from mooncache.kernels import calls, layout
from mooncache.operands import deadline_ns

if TYPE_CHECKING:
    from mooncache.engine import Engine

NAP_NS = 100_000_000
"""Longest sleep of a waiting thread before it lets Python run signal handlers; a signal also ends it at once."""


class Batch:
    """Requests that were submitted together. Close it when done with it: its slices live until then.

    The source and target ranges belong to the transfer from submission until `quiesced`. A batch that is garbage
    collected closes itself; in serving code close explicitly, because *where* that happens is what this engine is
    about.

    Attributes:
        peer: name of the peer.
        requests: how many requests it has; failures name them by index.
    """

    __slots__ = ("_closed", "_engine", "_failures", "_handle", "_notes", "_peer", "requests")

    def __init__(self, engine: Engine, handle: int, peer: str, requests: int, notified: bool) -> None:
        self._engine, self._handle, self._peer, self.requests = engine, handle, peer, requests
        self._notes = int(notified)  # slices that carry its notification
        self._closed = False
        self._failures: tuple[Failure, ...] | None = None

    @property
    def peer(self) -> str:
        """Name of the peer."""
        return self._peer

    @property
    def done(self) -> bool:
        """Whether every slice is answered: arrived, failed or cancelled. A closed batch counts as done."""
        return self._closed or calls.status(self._engine.ctl, self._handle) != Status.NOT_FINISHED

    @property
    def quiesced(self) -> bool:
        """Whether no more bytes can move, so that the buffers may be used again. Also valid after `close`."""
        return bool(calls.quiesced(self._engine.ctl, self._handle))

    @property
    def slices(self) -> int:
        """Slices the requests were cut into; 0 once closed."""
        return max(0, int(calls.read_word(self._engine.ctl, self._handle, layout.BATCH_SLICES)) - self._notes)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The failed requests (index, status, reason), ascending; empty when all arrived.

        A notification that failed on its own account is listed like a request, with the index `requests`.

        Raises:
            UsageError: the batch is not finished yet, or was closed before it was.
        """
        status = self._learn()
        if status == Status.NOT_FINISHED:
            raise UsageError("this batch is not finished; wait for it before asking for its failures")
        if self._failures is None:
            raise UsageError("this batch was closed before it finished; its failures were not kept")
        return self._failures

    def _learn(self) -> Status:
        """Note the outcome in `_failures` if it can be known. Returns what `calls.status` does.

        Another thread may close the batch at any moment, but notes the outcome first.
        """
        ctl, handle = self._engine.ctl, self._handle
        count = calls.failed(ctl, handle)
        if count == 0:
            self._failures = ()
        elif count > 0 and self._failures is None:
            request, why = np.zeros((2, self.requests + self._notes), np.int64)
            count = calls.failures(ctl, handle, request, why)
            if count >= 0:
                self._failures = tuple(
                    Failure(int(i), Status(int(code)), REASON[Status(int(code))])
                    for i, code in zip(request[:count], why[:count], strict=True)
                )
                if Status.REMOTE_ACCESS in why[:count]:
                    self._engine.refresh(self._peer)
        return Status.OK if count >= 0 else Status(-count)

    def wait(self, timeout: float | None = None) -> Batch:
        """Block until the batch is done; spins briefly, then sleeps. Other Python threads run meanwhile.

        Args:
            timeout: seconds, or None for no limit. When it passes the batch goes on; cancel or close it to stop it.

        Returns the batch. Raises:
            TimeoutError: not done in time.
            TransferFailed: some requests failed, the others arrived.
            UsageError: the batch is closed, or was by another thread before it was done. EngineClosed: the engine is.
        """
        self._check_held()
        deadline = deadline_ns(timeout)
        ctl, handle = self._engine.ctl, self._handle
        status = calls.status(ctl, handle)
        while status == Status.NOT_FINISHED:
            left = min(NAP_NS, deadline - monotonic_ns()) if deadline else NAP_NS
            if left <= 0:
                raise TimeoutError(f"{self!r} was not done within {timeout} s")
            status = calls.wait(ctl, handle, left)
        self._tell()
        return self

    def _check_held(self) -> None:
        if self._closed:
            if self._engine.closed:
                raise self._engine_closed()
            raise UsageError("this batch is closed; nothing is left to wait for")

    def _engine_closed(self) -> EngineClosed:
        return EngineClosed(f"engine {self._engine.name!r} was closed while {self!r} was open")

    def _tell(self) -> None:
        """The batch is done or closed: return if all arrived, else raise."""
        if self._learn() == Status.STALE_HANDLE and self._failures is None:
            if self._engine.closed:
                raise self._engine_closed()
            raise UsageError("another thread closed this batch before its outcome was known; wait first, then close")
        if self._failures:
            raise TransferFailed(self._failures, self.requests, self._peer)

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
        """Give the batch's slices back, as the engine's reclaim policy says. Once; a second close is an error.

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
        if not self._closed:
            self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "done" if self.done else "running"
        return f"<Batch of {self.requests} requests to {self._peer!r}, {state}>"
