"""An engine's side of discovery: it answers peers, finds them, and keeps its own record in a store of names."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mooncache.deadline import Deadline
from mooncache.descriptor import Descriptor
from mooncache.directory import directory
from mooncache.discovery.address import parse_address
from mooncache.discovery.base import LEASE_S, Names, StoreDown
from mooncache.discovery.dial import dial
from mooncache.discovery.handshake import HANDSHAKE_S
from mooncache.discovery.listener import Listener
from mooncache.discovery.messages import Answer, Reply, Request
from mooncache.discovery.record import from_json, to_json
from mooncache.discovery.stores import open_names
from mooncache.errors import DiscoveryError, EngineClosed, MooncacheError, TransportError, UsageError
from mooncache.owner import Owner

log = logging.getLogger("mooncache")


TROUBLES, TROUBLE_CHARACTERS = 16, 200
"""The part of `stats().trouble` that an engine tells others, so that it fits into an answer."""


class Service:
    """A listener for peers from the start; it holds its engine weakly, so that a forgotten one can be collected.

    Once it has looked a name up in a store it watches that store: a name that another engine takes over, say its
    successor on another host, is connected to anew even where the old connections have not noticed anything. A name
    that goes away changes nothing: what is connected stays so until it breaks.

    Raises:
        UsageError: what `open_names` and `Listener` raise.
    """

    def __init__(
        self, engine: Owner, listen: str, secret: str | bytes | None, insecure: bool, discovery: str | None,
        advertise: str | None,
    ) -> None:  # fmt: skip
        self._engine = weakref.ref(engine)
        self._secret = secret.encode() if isinstance(secret, str) else secret
        self._name, self._generation = engine.name, engine.generation
        self._names: Names | None = None if discovery is None else open_names(discovery, lease=LEASE_S)
        self._lock = threading.Lock()  # held while the watch is started
        self._watched = False
        self._latest: dict[str, int] = {}  # generations that the store has told since each name was looked up
        self._addresses: dict[str, str] = {}  # of names, as the store last said
        try:
            self._listener = Listener(
                listen, secret=self._secret, insecure=insecure, name=engine.name, serve=_weakly(engine, _answer),
                quick=("describe",), advertise=advertise,
            )  # fmt: skip
        except BaseException:
            if self._names is not None:
                self._names.close()
            raise
        self.address, self.near, self.unix = self._listener.address, self._listener.near, self._listener.unix

    def announce(self) -> None:
        """Publish the engine's record under its name, where there is a store. Raises DiscoveryError when it is down."""
        engine = self._engine()
        if self._names is not None and engine is not None:
            self._names.announce(_weakly(engine, lambda engine: engine.descriptor()))

    def changed(self) -> None:
        """Publish the record again soon: the engine's regions have changed."""
        if self._names is not None:
            self._names.changed()

    def address_of(self, name: str, deadline: Deadline | None = None) -> str:
        """Return where to reach the engine called `name`: its address, by itself, this process or the store."""
        if ":" in name:
            parse_address(name)
            return name
        local = directory.address(name)
        if local:
            return local
        if self._names is not None:
            (deadline or Deadline()).waits_for(f"the store of names at {self._names.where}")
            return self._address_in(self._names, name)
        if any(engine.name == name for engine in directory.engines()):
            raise TransportError(
                f"peer {name!r} uses a provider that reaches engines of this process only; open both ends with the same"
            )
        raise DiscoveryError(
            f"no engine named {name!r} in this process, and this one looks up no names: call the peer by "
            "host:port, or give both engines the same discovery='redis://...' or 'etcd://...'"
        )

    def _address_in(self, names: Names, name: str) -> str:
        self._watch(names)
        try:
            self._addresses[name] = names.look_up(name).address
        except StoreDown as error:
            if name not in self._addresses:
                raise
            log.warning("peer %r is sought where it was last: %s", name, error)
        return self._addresses[name]

    def look_up(self, name: str, deadline: Deadline | None = None) -> Descriptor:
        """Ask the engine called `name` for its descriptor, now; the address in it is where it answered."""
        self._latest.pop(name, None)  # what is told from here on may be newer than what is found
        address = self.address_of(name, deadline)
        answer = self.dial(address, "describe", {}, deadline=deadline)
        answer.sock.close()
        described = from_json(answer.body, f"peer {name!r} at {address}")
        if ":" not in name and described.name != name:
            raise DiscoveryError(
                f"{address} is where {name!r} was, but {described.name!r} answers; has {name!r} ended?"
            )
        return replace(described, address=address)  # which worked; what it says of itself may be behind a mapping

    # -------------------------------------------------------------------------- names that change hands
    def _watch(self, names: Names) -> None:
        with self._lock:
            if not self._watched:
                self._watched = True
                names.watch(self._told)

    def _told(self, name: str, generation: int | None) -> None:
        """Note that a name has another owner, as the store says. In its thread."""
        if generation is None:
            self._latest.pop(name, None)
            return
        self._latest[name] = generation
        engine = self._engine()
        if engine is not None:
            engine.supersede(name, generation)

    def superseded(self, name: str, generation: int) -> bool:
        """Return whether the store has told of another engine under this name since it was looked up."""
        return self._latest.get(name, generation) != generation

    def forget(self, name: str) -> None:
        """Forget what the store has told of a peer."""
        self._latest.pop(name, None)
        self._addresses.pop(name, None)

    def dial(
        self, address: str, purpose: str, body: dict[str, Any], *, unix: str = "", deadline: Deadline | None = None
    ) -> Answer:
        """Ask the engine at an address; over its Unix socket when a name for that is given."""
        where = f"unix:{unix}" if unix else address
        limit = (deadline or Deadline()).within(HANDSHAKE_S)
        return dial(
            where, purpose, body, caller=self._name, generation=self._generation, secret=self._secret, deadline=limit
        )

    @property
    def trouble(self) -> tuple[str, ...]:
        """The trouble of the listener and of the store of names."""
        names = () if self._names is None else self._names.background.trouble
        return self._listener.background.trouble + names

    def close(self) -> None:
        """Stop answering, and withdraw the record."""
        if self._names is not None:
            self._names.close()
        self._listener.close()


def _weakly(engine: Owner, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the engine that does not keep it alive."""
    reference = weakref.ref(engine)

    def call(*arguments: Any) -> Any:
        alive = reference()
        if alive is None or alive.closed:
            raise EngineClosed("the engine is closed")
        return function(alive, *arguments)

    return call


def _answer(engine: Owner, request: Request) -> Reply:
    if request.purpose == "describe":
        return Reply(to_json(engine.descriptor()))
    if request.purpose == "trouble" and request.process is not None:  # it is nobody's on another host
        told = [line[:TROUBLE_CHARACTERS] for line in engine.stats().trouble[:TROUBLES]]
        return Reply({"name": engine.name, "process": os.getpid(), "trouble": told})
    try:
        return engine.provider.serve(request)
    except MooncacheError:
        raise  # one of ours says by itself what is wrong; UsageError is a ValueError, too
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"the body of {request.purpose!r} does not hold: {error!r}") from error
