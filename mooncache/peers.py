"""The peers of one engine: connecting to them, learning what they have registered, and forgetting them."""

from __future__ import annotations

import logging
import reprlib
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

from mooncache import forks
from mooncache.callers import Callers
from mooncache.deadline import Deadline
from mooncache.descriptor import Descriptor
from mooncache.directory import directory
from mooncache.errors import CapacityError, EngineClosed, MooncacheError, TransportError, UsageError, came
from mooncache.kernels import calls, look, publication
from mooncache.operands import check_called, is_text
from mooncache.peer import Peer
from mooncache.providers.base import HERE, Link
from mooncache.providers.inprocess.base import InProcessProvider
from mooncache.runtime import Runtime
from mooncache.service import Service
from mooncache.ways import Asked, Ways

log = logging.getLogger("mooncache")

REST_SECONDS = 5.0
ROOM_SECONDS = 0.5  # that a peer which is gone may take to make room for another


class Peers:
    """The peers that one engine is connected to, or has been. Methods may be called from any thread.

    Args:
        name: of the engine.
        service: asks peers of other processes; None where the provider reaches engines of this one only.

    Attributes:
        known: by each name they were called by. A new dictionary takes its place when one is forgotten.
        vacant: rows that no peer has.
    """

    def __init__(self, name: str, runtime: Runtime, callers: Callers, service: Service | None) -> None:
        self._name, self._callers, self._service = name, callers, service
        self._state, self._provider, self._looker = runtime.state, runtime.provider, runtime.looker
        self._orders = runtime.actors.orders.ctl  # of the provider's thread, to give orders about queue pairs
        self._ways = Ways(name)
        self._lock = threading.RLock()
        self._closed = False
        self.known: dict[str, Peer] = {}
        self.vacant = list(range(self._state.settings.peers - 1, -1, -1))
        forks.private(self)

    def disown(self) -> None:
        """Forget the peers in a forked child; see `forks.Holder`."""
        self._closed, self._lock = True, threading.RLock()

    def own(self, peer: Any) -> Peer:
        """Return a peer that `connect` has returned, as long as it is of use. Raises UsageError for anything else."""
        if not isinstance(peer, Peer):
            raise UsageError(f"expected a peer's name, or what this engine's connect() returned, got {came(peer)}")
        if peer.forgotten:
            raise UsageError(f"{peer!r} was forgotten; give its name, or connect() again")
        if self.known.get(peer.name) is not peer:
            raise UsageError(f"{peer!r} belongs to another engine; give its name, or what this one's connect() returns")
        return peer

    @property
    def wires(self) -> dict[str, str]:
        """The wire to each peer, by its name, in a few words."""
        with self._lock:
            return {peer.name: self._provider.wire(peer.name) for peer in self.known.values()}

    # ------------------------------------------------------------------------------ connecting
    def connected(self, name: str) -> Peer | None:
        """Return the peer, if nothing has to be asked of it first. Raises UsageError for what is no str."""
        if not is_text(name):
            raise UsageError(
                f"expected a peer's name, its 'host:port', or what this engine's connect() returned, got {came(name)}"
            )
        peer = self.known.get(name)
        return None if peer is None or self._has_ended(peer) else peer

    def ask(self, name: str, *, patient: bool = True, news: bool = False) -> Asked:
        """Begin to connect to a peer, or to learn what it has registered by now, or take part in that; see `Ways`."""
        check_called(name)
        return self._ways.begin(name, partial(self._reach, name), patient=patient, news=news)

    def _reach(self, name: str, deadline: Deadline) -> Peer:
        """Connect to a peer, or learn what it has registered by now, in a thread of `Ways`.

        It may even be another engine, opened under the same name.
        """
        while True:
            described = self._look_up(name, deadline)  # asks the peer, so never while holding one's own lock
            peer = self._enter(name, described)
            try:
                if self._meet(peer, described, deadline):
                    return peer
            except BaseException:
                if not peer.connecting.locked():  # or another thread has it yet to find out
                    self._give_back(peer, lambda peer: not peer.met)
                raise

    def _meet(self, peer: Peer, described: Descriptor, deadline: Deadline) -> bool:
        """Connect, or look again; return False when the peer was forgotten meanwhile."""
        deadline.waits_for(f"another try to reach peer {peer.name!r}, by another of its names")
        if not peer.connecting.acquire(timeout=deadline.left()):
            raise TimeoutError
        try:
            if not peer.forgotten:
                self._learn(peer, described, deadline)
            return not peer.forgotten
        finally:
            peer.connecting.release()

    def _look_up(self, name: str, deadline: Deadline) -> Descriptor:
        if self._service is None:
            return directory.look_up(name, self._provider.name)
        return self._service.look_up(name, deadline)

    def _enter(self, name: str, described: Descriptor) -> Peer:
        """Enter a peer not connected to yet, or one known by another name."""
        while True:
            with self._lock:
                self._check_open()
                known = [p for p in self.known.values() if p.name == name or p.generation == described.generation]
                if known:
                    self.known[name] = known[0]
                    return known[0]
                if self.vacant:
                    peer = Peer(self.vacant.pop(), name, self._state.settings.regions)
                    peer.generation = described.generation
                    self._state.connect(peer.index, peer.table, [])
                    peer.handle = self._state.handle(peer.index)
                    self.known[name] = peer
                    return peer
                gone = sorted(filter(self._is_gone, set(self.known.values())), key=lambda peer: peer.met)
            if not any(self._give_back(peer, self._is_gone) for peer in gone):
                raise CapacityError(
                    f"engine {self._name!r} is connected to {self._state.settings.peers} peers, as many as it may: "
                    "forget() those that are not needed, or open it with more `peers`"
                )

    def _is_gone(self, peer: Peer) -> bool:
        """Return whether a peer has to be connected to anew, and nobody is at it."""
        return self._has_ended(peer) and not (peer.connecting.locked() and not peer.met)

    def _has_ended(self, peer: Peer) -> bool:
        """Return whether a connection to a peer has ended, or never was: it has to be connected to anew."""
        return peer.gone or (peer.met > 0 and not self._provider.connected(peer.name))

    def _learn(self, peer: Peer, described: Descriptor, deadline: Deadline) -> None:
        dial = HERE.dial if self._service is None else partial(self._service.dial, described.address)
        # Providers keep the link, and their threads do: it must not hold the engine.
        link = Link(peer.table.header, dial, self._name, deadline)
        queue_pairs = self._provider.connect(replace(described, name=peer.name), link)
        if not self._state.fits(peer.index, queue_pairs):
            peer.gone = True  # nothing is submitted meanwhile
            self._await_rest(peer, lambda: True, deadline)
            self._take_rows(peer, self._state.take_rows)
        with self._lock:
            self._check_open()
            peer.refresh(described, calls.oldest_submit(self._callers.ctl, peer.index))
            queues = self._state.connect(peer.index, peer.table, queue_pairs)
            peer.handle = self._state.handle(peer.index)
        self._provider.start(peer.name, queues, self._orders)
        with self._lock:
            peer.gone, peer.met = False, monotonic()
            superseded = self._service is not None and self._service.superseded(peer.name, peer.generation)
            if superseded or not self._provider.connected(peer.name):  # it broke meanwhile
                peer.gone = True

    def supersede(self, name: str, generation: int) -> None:
        """Note that a peer's name is another engine's: the next submit connects anew. What is under way goes on."""
        self._ways.hurry(name)
        peer = self.known.get(name)
        if peer is not None and peer.generation != generation:
            peer.gone = True

    # ------------------------------------------------------------------------------ slices that peers refused
    def look_where_asked(self) -> None:
        """Look again at peers that refused what workers believed they had; each in a thread."""
        for peer in set(self.known.values()):
            if number := look.begin(peer.table.header.address):
                try:
                    self._looker.background.start(f"{self._name}-look", partial(self._look, peer, number))
                except BaseException:
                    look.end(self._callers.ctl, peer.table.header.address, number)
                    raise

    def _look(self, peer: Peer, number: int) -> None:
        try:
            self.ask(peer.name, news=True).result(Deadline())
        except MooncacheError as error:
            log.info("peer %r refused a range and could not be asked again: %s", peer.name, error)
        finally:
            if not self._closed:
                look.end(self._callers.ctl, peer.table.header.address, number)

    # ------------------------------------------------------------------------------ forgetting
    def forget(self, peer: str | Peer) -> None:
        """Forget a peer, and free all that belongs to it; see `Engine.forget`."""
        known = self.known.get(peer) if isinstance(peer, str) else self.own(peer)
        if known is None:
            raise UsageError(
                f"engine {self._name!r} is not connected to {came(peer)}; its peers: {reprlib.repr(sorted(self.known))}"
            )
        self._forget(known, lambda peer: True)

    def _give_back(self, peer: Peer, still: Callable[[Peer], bool]) -> bool:
        """Forget a peer, or let it be if that cannot be done now."""
        try:
            return self._forget(peer, still, ROOM_SECONDS)
        except TransportError:
            return False

    def _forget(self, peer: Peer, still: Callable[[Peer], bool], seconds: float = REST_SECONDS) -> bool:
        """Forget a peer; return False if another thread has, or `still` does not hold."""
        with peer.connecting:
            if peer.forgotten or not still(peer):
                return False
            peer.gone = True  # nothing is submitted from here on
            self._provider.disconnect(peer.name)
            self._await_rest(peer, lambda: self._provider.quiet(peer.name), Deadline(seconds))
            self._take_rows(peer, self._state.disconnect)
            self._provider.forget(peer.name)
            with self._lock:
                peer.forgotten = True
                self.known = {name: known for name, known in self.known.items() if known is not peer}
                self.vacant.append(peer.index)
        if self._service is not None:
            self._service.forget(peer.name)
        return True

    def _await_rest(self, peer: Peer, quiet: Callable[[], bool], deadline: Deadline) -> None:
        """Wait until no batch to a peer is under way, its queue pairs rest, and so says `quiet`."""
        limit = deadline.within(REST_SECONDS)
        limit.waits_for(f"what is under way to peer {peer.name!r}")
        if not limit.until(
            lambda: (
                calls.oldest_submit(self._callers.ctl, peer.index) == calls.NEVER
                and all(row.at_rest for row in self._state.rows_of(peer.index))
                and quiet()
            )
        ):
            raise TransportError(
                f"what is under way to peer {peer.name!r} did not come back within {limit.seconds:.3g} s; try again"
            )
        self._let_workers_turn()

    def _take_rows(self, peer: Peer, take: Callable[[int], object]) -> None:
        """Take a peer's rows, which rest, from the workers."""
        with self._lock:
            self._provider.stop(peer.name, self._state.rows_of(peer.index))
            peer.kept.append(take(peer.index))
        self._let_workers_turn()
        peer.kept.clear()

    def _let_workers_turn(self) -> None:
        """Wait until every worker has begun a new round: then nobody holds what was withdrawn before."""
        epoch = calls.grace(self._callers.ctl)
        if not Deadline(REST_SECONDS).until(lambda: bool(calls.graced(self._callers.ctl, epoch)), 1e-4):
            raise TransportError(
                f"workers of engine {self._name!r} began no new round within {REST_SECONDS:g} s; call forget() again"
            )

    # ------------------------------------------------------------------------------ fences
    def fence(self, peer: str | Peer, generation: int, limit_s: float) -> int:
        """Let nothing land here any more that a peer has submitted so far; see `Engine.fence`.

        `generation`: of this engine, by which engines of this process know it.
        """
        known = self.known.get(peer) if isinstance(peer, str) else self.own(peer)
        names = {known.name, known.engine} if known is not None else {str(peer)}
        if self._service is not None:
            return sum(self._provider.fence(name, limit_s) for name in names if name)
        callers = [engine for engine in directory.engines() if engine.name in names]
        return sum(engine.retract_from(generation, limit_s) for engine in callers)

    def retract_from(self, generation: int, limit_s: float) -> int:
        """Get back what is in flight to an engine of this process that fences this one.

        Return its queue pairs' number.
        """
        assert isinstance(self._provider, InProcessProvider)
        there = {peer for peer in self.known.values() if peer.generation == generation}
        for peer in there:
            publication.rise(peer.table.header.where("epoch"))
        return sum(self._provider.retract(peer.name, limit_s) for peer in there)

    # ------------------------------------------------------------------------------ the end
    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed(f"engine {self._name!r} is closed")

    def close(self) -> None:
        """Enter no other peer from now on."""
        with self._lock:
            self._closed = True

    def end_tries(self) -> None:
        """Begin no try to connect any more, and end those under way, as far as they can be."""
        self._ways.stop()

    def join(self, seconds: float) -> None:
        """Wait for tries to end, for at most so long."""
        self._ways.close(seconds)
