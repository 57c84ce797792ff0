"""An engine's side of discovery: it answers peers, finds them, and keeps its own record where names are looked up."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mooncache.discovery.address import parse_address
from mooncache.discovery.base import Names, open_names
from mooncache.discovery.dial import Answer, dial
from mooncache.discovery.listener import Listener, Reply, Request
from mooncache.discovery.record import from_json, to_json
from mooncache.errors import DiscoveryError, EngineClosed, UsageError
from mooncache.peer import directory
from mooncache.providers.base import Descriptor

if TYPE_CHECKING:
    from mooncache.engine import Engine


class Service:
    """Listens for peers from the start; holds its engine weakly, so that a forgotten one can be collected."""

    def __init__(
        self, engine: Engine, listen: str, secret: str | bytes | None, insecure: bool, discovery: str | None,
        advertise: str | None,
    ) -> None:  # fmt: skip
        self._engine = weakref.ref(engine)
        self._secret = secret.encode() if isinstance(secret, str) else secret
        self._name, self._generation = engine.name, engine.generation
        self._names: Names | None = None if discovery is None else open_names(discovery)
        try:
            self._listener = Listener(
                listen, secret=self._secret, insecure=insecure, name=engine.name, serve=_weakly(engine, _answer),
                advertise=advertise,
            )  # fmt: skip
        except BaseException:
            if self._names is not None:
                self._names.close()
            raise
        self.address, self.unix = self._listener.address, self._listener.unix

    def announce(self) -> None:
        """Publish the engine's record under its name, where there is a store. Raises DiscoveryError when it is down."""
        engine = self._engine()
        if self._names is not None and engine is not None:
            self._names.announce(_weakly(engine, lambda engine: engine.descriptor()))

    def changed(self) -> None:
        """The engine's regions have changed: its record will follow."""
        if self._names is not None:
            self._names.changed()

    def address_of(self, name: str) -> str:
        """Where to reach the engine called `name`: an address already, an engine of this process, or in the store."""
        if ":" in name:
            parse_address(name)
            return name
        local = directory.address(name)
        if local:
            return local
        if self._names is not None:
            return self._names.look_up(name).address
        raise DiscoveryError(
            f"no engine named {name!r} in this process, and this one looks up no names: call the peer by "
            "host:port, or give both engines the same discovery='redis://...' or 'etcd://...'"
        )

    def look_up(self, name: str) -> Descriptor:
        """What the engine called `name` says of itself, now, asked over the network."""
        address = self.address_of(name)
        answer = self.dial(address, "describe", {})
        answer.sock.close()
        return from_json(answer.body, f"peer {name!r} at {address}")

    def dial(self, address: str, purpose: str, body: dict[str, Any]) -> Answer:
        """Ask the engine at an address."""
        return dial(address, purpose, body, caller=self._name, generation=self._generation, secret=self._secret)

    def close(self) -> None:
        """Stop answering, and withdraw the record."""
        if self._names is not None:
            self._names.close()
        self._listener.close()


def _weakly(engine: Engine, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the engine that does not keep it alive."""
    reference = weakref.ref(engine)

    def call(*arguments: Any) -> Any:
        alive = reference()
        if alive is None or alive.closed:
            raise EngineClosed("the engine is closed")
        return function(alive, *arguments)

    return call


def _answer(engine: Engine, request: Request) -> Reply:
    if request.purpose == "describe":
        return Reply(to_json(engine.descriptor()))
    try:
        return engine.provider.serve(request)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the body of {request.purpose!r} does not hold: {error!r}") from error
