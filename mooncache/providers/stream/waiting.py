"""Waiting for workers: until a condition holds, or while somebody is in the middle of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mooncache.deadline import Deadline
from mooncache.errors import TransportError
from mooncache.kernels.arrays import Row
from mooncache.providers.stream.connections import STALL_S

SETTLE_S = 5.0
"""Seconds for workers to answer what was on a broken queue pair, before it is connected again."""

LOOK_S = 0.01
"""The time after which a copier is looked at: it was stopped, or shares its core. Looking costs a peer its slice."""


class Copier(Protocol):
    """The owner of guards that are waited for."""

    copier: str  # as messages call it
    ended: bool

    def lands_no_more(self) -> bool:
        """Return whether a copy that it is in the middle of lands nothing more, although its guard is odd."""


def wait_while_odd(
    words: Sequence[tuple[np.ndarray | Row, Any]], whose: Copier | None = None, limit_s: float = STALL_S
) -> None:
    """Return when each word that is odd now has changed, or its owner has ended, or lands nothing more.

    Whoever made it odd is copying, which takes microseconds. Raises TransportError after `limit_s`: it was stopped.
    """
    since = time.monotonic()
    look_at, deadline = since + LOOK_S, since + limit_s
    for array, index in words:
        seen = int(array[index])
        while seen % 2 == 1 and int(array[index]) == seen and not (whose and whose.ended):
            now = time.monotonic()
            if whose and now > look_at:
                if whose.lands_no_more():
                    return
                look_at = now + LOOK_S
            if now > deadline:
                raise TransportError(
                    f"{whose.copier if whose else 'a worker'} was stopped in the middle of a copy and may go on with "
                    "it at any time: end that process before this memory is used for anything else"
                )
            time.sleep(0)


def wait_until(condition: Callable[[], bool], what: str, deadline: Deadline | None = None) -> None:
    """Return once a worker has made the condition true. Raises TransportError, naming `what`, after SETTLE_S or at the
    deadline, and EngineClosed when that was ended."""
    limit = (deadline or Deadline()).within(SETTLE_S)
    limit.waits_for(what)
    if not limit.until(condition):
        raise TransportError(f"{what} did not come within {limit.seconds:.3g} s; try again")
