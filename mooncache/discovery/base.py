"""The contract of a store of names, and the part that all share: keep a record alive, watch, outlast outages.

A record is held by a lease that its engine's keeper thread prolongs; an engine that vanishes is forgotten when the
lease ends. The last engine to announce a name has it: a process restarted under its name need not wait for the lease
of the one before, and whoever loses its name this way says so in the log and lets go.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from reprlib import repr as short
from time import monotonic
from typing import Any, cast
from urllib.parse import SplitResult

from mooncache.background import Background
from mooncache.descriptor import Descriptor
from mooncache.discovery.fields import WORD, is_name
from mooncache.discovery.record import decode, encode
from mooncache.errors import DiscoveryError, EngineClosed, MooncacheError, UsageError
from mooncache.threads import Thread

log = logging.getLogger("mooncache")

LEASE_S = 10.0
"""A record outlives its engine for as long as a TCP connection takes to notice (handshake.TCP_OPTIONS)."""

TIMEOUT_S = 3.0
"""The time for one request to a store. A refresh every third of the lease may fail once and the record stays."""

SIMILAR = 5
"""Names that an error message suggests."""


class StoreDown(DiscoveryError):
    """A store of names cannot be asked: whether it knows a name is not known."""


Changed = Callable[[str, int | None], None]


class Names(ABC):
    """A store of names, as one engine uses it. Methods may be called from any thread.

    A store writes the methods at the end; they are bounded in time and raise StoreDown when it cannot be asked.

    Attributes:
        where: its address, as messages call it, without passwords.
        lease: seconds that a record lives without being refreshed, which happens every third of it.
        background: its threads, and what is wrong with them or the store.
    """

    def __init__(self, where: str, lease: float) -> None:
        self.where, self.lease = where, lease
        self._describe: Callable[[], Descriptor] | None = None  # while announced
        self._own: tuple[str, int] = ("", 0)  # name and generation announced
        self._changed = threading.Event()
        self._watchers: list[_Watcher] = []
        self._due = threading.Event()
        self._closing = threading.Event()
        self._writing = threading.Lock()  # held while the own record is written or removed
        self.background = Background()
        self._threads: dict[str, Thread] = {}
        self._starting = threading.Lock()
        self._down = False
        self._settled = 0.0  # monotonic s; until then, a name that is missing may still come back

    # -------------------------------------------------------------------------- what an engine uses
    def announce(self, describe: Callable[[], Descriptor]) -> None:
        """Publish this engine's record, without keys, under its name, and keep it alive until `withdraw`.

        Args:
            describe: the engine as it is now. Called here, and by the keeper thread after `changed` or an outage;
                name and generation stay the same. It may raise EngineClosed.

        Raises:
            UsageError: already announced. CapacityError: the record would be too large.
            StoreDown: the store cannot be asked. (Later outages are logged, and outlasted.)
        """
        own = describe()
        record = encode(own, keys=False)
        with self._writing:
            if self._describe is not None:
                raise UsageError(f"{self!r} has announced {self._own[0]!r}; withdraw it first")
            self._publish(own.name, own.generation, record, take=True)
            self._own, self._describe = (own.name, own.generation), describe
        self._start("keeper", self._keep)

    def changed(self) -> None:
        """Publish the changed description soon. Returns at once; many calls become one publication."""
        self._changed.set()
        self._due.set()

    def withdraw(self) -> None:
        """Remove the own record, if it is still this engine's. If the store is down, it goes with its lease."""
        with self._writing:
            if self._describe is None:
                return
            self._describe = None
            try:
                self._remove(*self._own)
            except DiscoveryError as error:
                log.info("%r stays at %s until its lease ends: %s", self._own[0], self.where, error)

    def look_up(self, name: str) -> Descriptor:
        """Return the record announced under a name, without rkeys.

        Raises DiscoveryError if there is none; StoreDown.
        """
        record = self._fetch(name)
        if record is None:
            names = self._generations().keys()
            similar = ", ".join(get_close_matches(name, names, SIMILAR, cutoff=0.0)) or "none"
            raise DiscoveryError(
                f"no engine named {name!r} at {self.where}; of {len(names)} the most similar: {similar}"
            )
        source = f"the record of {name!r} at {self.where}"
        described = decode(record, source)
        if described.name != name:
            raise DiscoveryError(f"{source}: expected its own name in it, got {described.name!r}")
        return described

    def watch(self, callback: Changed) -> None:
        """Watch all names, the own one included. `callback(name, generation)` is called for each that is there, is new,
        or has another owner than before, and `callback(name, None)` when it is gone.

        Called from the store's keeper thread, which waits for it; must not block. During an outage of the store no name
        counts as gone, and after it only if it is not announced again within a lease.
        """
        self._watchers.append(_Watcher(callback))
        self._start("keeper", self._keep)
        self._start("listener", self._hear)
        self._due.set()

    def close(self) -> None:
        """Withdraw the record, and end threads and connections; not from a callback. A second close does nothing."""
        self._closing.set()  # before it withdraws, which also wakes a listener of ours
        self._due.set()
        self.withdraw()
        self.background.close()
        self._disconnect()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.where}>"

    # -------------------------------------------------------------------------- the threads
    def _start(self, role: str, run: Callable[[], None]) -> None:
        with self._starting:
            if role not in self._threads:
                self._threads[role] = self.background.start(f"names-{role}", run)

    def _keep(self) -> None:
        """Keep the record alive: write and look every third of the lease, or when there is reason to."""
        while not self._closing.is_set():
            try:
                try:
                    self._refresh_own()
                finally:
                    self._look()
            except EngineClosed:
                pass  # from `describe`: the engine is about to close this as well
            except MooncacheError as error:
                if not self._down:
                    log.warning("names at %s are not kept up to date: %s; trying again", self.where, error)
                self.background.note(f"names at {self.where}", f"not kept up to date: {error}")
                self._down = True
            else:
                if self._down:
                    log.info("%s answers again", self.where)
                    self._settled = monotonic() + self.lease
                    self.background.settled(f"names at {self.where}")
                self._down = False
            self._due.wait(self.lease / 3)
            self._due.clear()

    def _refresh_own(self) -> None:
        describe, (name, generation) = self._describe, self._own
        if describe is None:
            return
        holder = self._write(describe, lambda: self._refresh(name, generation))
        if holder is None or (holder == generation and self._changed.is_set()):
            self._changed.clear()
            try:
                record = encode(describe(), keys=False)  # not while holding the lock: it may wait for the engine's
                holder = self._write(describe, lambda: self._publish(name, generation, record, take=False))
            except MooncacheError:
                self._changed.set()
                raise
        if holder != generation and self._describe is describe:
            self._describe = None
            log.warning("name %r at %s has been taken over by another engine (generation %s)", name, self.where, holder)

    def _write(self, describe: Callable[[], Descriptor], write: Callable[[], int | None]) -> int | None:
        """Write the record unless it was withdrawn meanwhile; return the name's owner."""
        with self._writing:
            return write() if self._describe is describe else self._own[1]

    def _look(self) -> None:
        if self._watchers and not self._closing.is_set():
            now = self._generations()
            settled = not self._down and monotonic() >= self._settled
            for watcher in self._watchers:
                watcher.see(now, settled)

    def _hear(self) -> None:
        """Listen, and wake the keeper. Without it names are still looked at every third of the lease."""
        while not self._closing.is_set():
            try:
                self._listen(self._due.set)
            except DiscoveryError:  # the keeper finds out and tells; should the store be back by then, it may be empty
                self._settled = monotonic() + self.lease
            self._due.set()
            self._closing.wait(self.lease / 3)

    def _holders(self, found: Iterable[tuple[bytes, object]]) -> dict[str, int]:
        """Return each name's owner, of what a store has under its keys. A record that is none is logged once."""
        holders: dict[str, int] = {}
        bad: list[bytes] = []
        for key, value in found:
            try:
                name, generation = key.decode(), int(cast(Any, value))
            except (TypeError, ValueError):  # which UnicodeDecodeError is, too
                bad.append(key)
                continue
            if is_name(name) and 0 < generation < WORD:
                holders[name] = generation
            else:
                bad.append(key)
        what = f"records at {self.where}"
        if not bad:
            self.background.settled(what)
        elif self.background.note(what, f"{len(bad)} are no engine's and are skipped: {short(sorted(bad))}"):
            log.warning("%s: %d are no engine's and are skipped: %s", what, len(bad), short(sorted(bad)))
        return holders

    # -------------------------------------------------------------------------- what a store writes
    @abstractmethod
    def _publish(self, name: str, generation: int, record: bytes, *, take: bool) -> int:
        """Write a record and start its lease. Unless `take`, leave the name alone if another generation holds it.

        Returns the generation that holds the name afterwards.
        """

    @abstractmethod
    def _refresh(self, name: str, generation: int) -> int | None:
        """Prolong the lease if this generation holds the name. Return the generation that does; None: nobody."""

    @abstractmethod
    def _remove(self, name: str, generation: int) -> None:
        """Remove the record if this generation holds the name."""

    @abstractmethod
    def _fetch(self, name: str) -> bytes | None:
        """Return the record under a name."""

    @abstractmethod
    def _generations(self) -> dict[str, int]:
        """Return the owner of each name."""

    @abstractmethod
    def _listen(self, heard: Callable[[], None]) -> None:
        """Call `heard` when what `_generations` returns may have changed, and once at the beginning.

        Returns soon after `_closing` was set. It may also return earlier, to be called again.
        """

    @abstractmethod
    def _disconnect(self) -> None:
        """Close all connections; no thread uses them any more."""


class _Watcher:
    """One watcher, and what it has been told."""

    def __init__(self, callback: Changed) -> None:
        self._callback = callback
        self._told: dict[str, int] = {}

    def see(self, now: dict[str, int], settled: bool) -> None:
        """Tell the differences; names that are missing only when things have settled."""
        for name in [name for name in self._told if name not in now] if settled else ():
            del self._told[name]
            self._tell(name, None)
        for name, generation in now.items():
            if self._told.get(name) != generation:
                self._told[name] = generation
                self._tell(name, generation)

    def _tell(self, name: str, generation: int | None) -> None:
        try:
            self._callback(name, generation)
        except Exception:
            log.exception("a watcher of names failed at %r", name)


def where_of(parts: SplitResult) -> str:
    """Return the URL for messages: without user and password."""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def unreachable(where: str, error: Exception) -> StoreDown:
    """Return the error to raise when a store's library has failed."""
    return StoreDown(f"{where} cannot be asked ({type(error).__name__}: {error}); is it up, and this its address?")
