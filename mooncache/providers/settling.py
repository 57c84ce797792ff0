"""Settling finds out, after a connection ended with slices on it, when none of these can land any more.

What was sent may still lie in the socket of a peer that is stopped, or of a host that is cut off. So the peer is asked,
again and again, to let go of what ended. Nothing is in doubt any more as soon as

    it confirms: whatever has not landed is dropped there
    it is dead: its host refuses the connection, so that no engine is at its address any more
    nothing was heard of it for HOST_LOST_S: by then an engine that was only suspended drops what came before by itself
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod

from mooncache.background import Background
from mooncache.deadline import Deadline
from mooncache.errors import DiscoveryError, EngineClosed, TransportError
from mooncache.kernels.publication import rise
from mooncache.providers.base import Link

log = logging.getLogger("mooncache")

HOST_LOST_S = 60.0
"""A peer that does not answer for so long counts as dead: six times the stall limit (connections.STALL_S), after which
an engine that goes on after having been suspended drops its peers' connections by itself."""

PAUSE_S, PAUSE_MOST_S = 0.05, 1.0
"""Between two questions; doubled each time. A peer that goes on again is asked within the longest."""


class Counters:
    """The counts of a peer's ended connections; see records/table.py, `epoch` and those behind it."""

    def __init__(self, link: Link) -> None:
        self._table = link.table

    @property
    def breaks(self) -> int:
        """The number of connections that ended with slices on them."""
        return self._table["breaks"]

    @property
    def confirmed(self) -> int:
        """The number of those of which nothing lands any more."""
        return self._table["confirmed"]

    def confirm(self, seen: int) -> None:
        """Note that of the first `seen` connections nothing lands any more."""
        if self.confirmed < seen:
            self._table.put("confirmed", seen)

    def end_epoch(self, *, doubtful: bool) -> None:
        """End the epoch: what was submitted so far is posted no more; `doubtful`: some was sent and not answered."""
        if doubtful:
            rise(self._table.where("breaks"))
        rise(self._table.where("epoch"))


class Settler(ABC):
    """A helper that finds out, for one peer, when nothing is in doubt any more. Any thread may call it."""

    def __init__(self, peer: str, link: Link, background: Background) -> None:
        self.peer, self.link, self.counters = peer, link, Counters(link)
        self._background = background
        self._lock = threading.Lock()
        self._asking = False
        self._closed = False
        self.deadline = Deadline()  # of whatever it waits for: none, but it ends with this

    @abstractmethod
    def ask(self) -> None:
        """Ask the peer once to let go of all that ended so far. Blocks as long as a handshake may.

        Raises TransportError or DiscoveryError: it did not answer.
        """

    def forgive(self) -> None:  # noqa: B027  (most keep no count of their own)
        """Take all for settled: the peer is dead."""

    @property
    def in_doubt(self) -> bool:
        """True while something may still land."""
        return self.counters.breaks > self.counters.confirmed

    def look(self) -> None:
        """Let a thread find out, if something is in doubt. Returns at once."""
        with self._lock:
            if self._asking or not self.in_doubt or self._closed:
                return
            self._asking = True
        self._background.start(f"mooncache-settle-{self.peer}", self._ask_until_known)

    def _ask_until_known(self) -> None:
        since, pause = time.monotonic(), PAUSE_S
        while not self._known():
            try:
                self.ask_now()
                continue
            except EngineClosed:  # from this end, which is about to be closed; or from the other, which is no answer
                pass
            except (TransportError, DiscoveryError) as error:
                if time.monotonic() - since > HOST_LOST_S:
                    log.warning("peer %r counts as dead: not heard of for %.0f s (%s)", self.peer, HOST_LOST_S, error)
                    self._bury(self.counters.breaks)
            self.deadline.sleep(pause)
            pause = min(2 * pause, PAUSE_MOST_S)

    def _known(self) -> bool:
        with self._lock:
            self._asking = self.in_doubt and not self._closed
            return not self._asking

    def ask_now(self) -> None:
        """Ask once; a peer whose host refuses the connection is dead. Raises what `ask` does."""
        seen = self.counters.breaks
        try:
            self.ask()
        except TransportError as error:
            if not isinstance(error.__cause__, ConnectionRefusedError):
                raise
            self._bury(seen)
        self.counters.confirm(seen)

    def _bury(self, seen: int) -> None:
        self.forgive()
        self.counters.confirm(seen)

    def close(self) -> None:
        """Ask no more, and let go of whoever is asking: what is in doubt now stays so."""
        self._closed = True
        self.deadline.end("this engine is closed, or its peer forgotten")
