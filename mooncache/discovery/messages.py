"""The requests and answers between engines, as their services and providers know them.

How that travels, and is proven, is the handshake's matter (`handshake`); `dial` asks and `listener` answers.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mooncache.discovery.credentials import Process


@dataclass(frozen=True)
class Request:
    """A peer's request.

    Attributes:
        purpose: which of the engine's services.
        caller: name of the asking engine; proven, with all else here, if the listener has a secret.
        generation: of the asking engine.
        body: JSON object, as the service defines it; its contents are not checked yet.
        process: of this host, that asks, as the kernel says; fds can be handed to it. None: it came over TCP.
    """

    purpose: str
    caller: str
    generation: int
    body: dict[str, Any]
    process: Process | None

    @property
    def local(self) -> bool:
        """True if it came from a process of this host."""
        return self.process is not None


@dataclass(frozen=True)
class Reply:
    """The answer to a request.

    Attributes:
        body: JSON object.
        fds: file descriptors to send along, only to a local request. They stay the replier's, who keeps them open
            until `then` is called; without `then`, as long as the listener.
        then: takes over the connection once all is sent: a connected, non-blocking socket, which is its own from
            now on unless it raises. Called in a thread as `serve` is. Without it the connection is closed.
        undo: gives back what was made for the caller, when the answer cannot be sent, or `then` raises.
    """

    body: dict[str, Any]
    fds: Sequence[int] = ()
    then: Callable[[socket.socket], None] | None = None
    undo: Callable[[], object] | None = None

    def give_up(self) -> None:
        """Undo what was made for the caller, which nobody takes over."""
        if self.undo is not None:
            self.undo()


@dataclass(frozen=True)
class Answer:
    """The answer of `dial`. The caller owns `sock` (connected, blocking) and `fds`, and closes them."""

    body: dict[str, Any]
    sock: socket.socket
    fds: list[int]
