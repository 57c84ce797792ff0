"""Errors: statuses for kernels, exceptions for people.

Kernels return a `Status`; 0 is success and every other value says what was lost:

    1xx  only time           the pool is empty, a queue is full: try again
    2xx  this call           the caller's mistake; nothing was changed
    3xx  one slice           the wire refused or lost it; its request failed
    4xx  a connection        the peer or the way to it is gone; connect again
    9xx  the engine          it is closing; nothing more can be done with it

Exceptions say whose fault it was. `check` turns one into the other.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple


class Status(IntEnum):
    """The answer of a kernel, grouped by what is lost."""

    OK = 0
    POOL_EMPTY = 101
    BATCHES_EMPTY = 102
    HEAP_EMPTY = 103
    NOT_FINISHED = 104
    HAS_FAILURES = 105
    STALE_HANDLE = 201
    LENGTH = 202
    SOURCE_NOT_REGISTERED = 203
    TARGET_NOT_REGISTERED = 204
    ACCESS_DENIED = 205
    TOO_LARGE = 206
    READ_ONLY = 207
    OPERANDS_CHANGED = 208
    STALE_PEER = 209
    CANCELLED = 301
    TIMED_OUT = 302
    LOCAL_ERROR = 303
    REMOTE_ACCESS = 304
    REMOTE_ERROR = 305
    RETRIES_EXCEEDED = 306
    FLUSHED = 307
    INBOX_FULL = 308
    PEER_GONE = 401
    CLOSED = 901


REASON: dict[Status, str] = {
    Status.CANCELLED: "the batch was cancelled or closed before this request was posted",
    Status.TIMED_OUT: "the batch's deadline passed before this request was answered; whether its bytes arrived is not "
    "known, and more may arrive until the batch is quiesced",
    Status.LOCAL_ERROR: "this engine's range could not be read or written: its memory was unmapped or protected "
    "while it was registered, or the device refused it",
    Status.REMOTE_ACCESS: "the target refused the range or its key: was the region unregistered there?",
    Status.REMOTE_ERROR: "the peer's range could not be read or written there: its memory was unmapped or protected "
    "while it was registered, or the device refused it",
    Status.RETRIES_EXCEEDED: "the wire lost it more often than the engine retries",
    Status.FLUSHED: "the connection broke down with this request on it",
    Status.INBOX_FULL: "the data arrived, but the target's inbox has no room for more notifications of this engine "
    "(does it fetch them?), or takes none this long: its settings are notes and note_bytes",
    Status.PEER_GONE: "the connection to the peer is gone; whether the bytes arrived is not known. Submit it again: "
    "that connects anew",
}


def came(value: object) -> str:
    """Quote a refused value: short, and with its type, since `4` and `"4"` print alike."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python itself refuses to print the longest
        return f"an integer of {value.bit_length()} bits"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


class MooncacheError(Exception):
    """Base of every exception this package raises on purpose.

    One that was raised in another process arrives whole: `args` are what it is made of, `str` makes the text.
    """


class UsageError(MooncacheError, ValueError):
    """A mistake of the caller. Nothing was changed."""


class CapacityError(MooncacheError):
    """A bounded resource stayed exhausted until the deadline, or could never hold what was asked."""


class TransportError(MooncacheError):
    """A provider could not be opened, connected or used."""


class DiscoveryError(MooncacheError):
    """A peer could not be found or did not prove who it is, or a store of names could not be asked."""


class EngineClosed(MooncacheError):
    """The engine was closed before or during the call."""


class EngineInherited(EngineClosed):
    """The engine belongs to the process that this one was forked from. Open one here, after the fork."""


class Failure(NamedTuple):
    """One failed request of a batch."""

    request: int  # index into the arrays given to write() or read()
    status: Status
    reason: str


class TransferFailed(MooncacheError):
    """Some requests of a batch failed; the others arrived.

    Attributes:
        failures: one `Failure` per failed request, ordered by request index.
        requests: how many the batch had.
        peer: name of the peer the batch was addressed to.
    """

    def __init__(self, failures: Sequence[Failure], requests: int, peer: str) -> None:
        super().__init__(tuple(failures), requests, peer)  # what it is made of again when it was pickled or copied
        self.failures, self.requests, self.peer = tuple(failures), requests, peer

    def __str__(self) -> str:
        first = self.failures[0]
        if first.request == self.requests:
            what = f"the notification to peer {self.peer!r} failed, all {self.requests} requests arrived"
        else:
            failed = sum(failure.request < self.requests for failure in self.failures)
            what = f"{failed} of {self.requests} requests to peer {self.peer!r} failed; the first is request "
            what += str(first.request)
        return f"{what}: {first.status.name} ({first.reason})"
