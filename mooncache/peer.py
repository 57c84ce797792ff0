"""Peers: who is there in this process, and what an engine knows of another."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mooncache.errors import TransportError, UsageError
from mooncache.kernels.state import RegionTable
from mooncache.providers.base import Descriptor, RemoteRegion

if TYPE_CHECKING:
    from mooncache.engine import Engine


class Peer:
    """An engine this one is connected to. `table` mirrors what it has registered."""

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name = index, name
        self.table = RegionTable(f"peer {name!r}")
        self._known: dict[RemoteRegion, int] = {}

    def refresh(self, regions: Iterable[RemoteRegion]) -> None:
        """Bring the table up to date with what the peer says it has registered."""
        now = set(regions)
        for gone in [region for region in self._known if region not in now]:
            self.table.remove(self._known.pop(gone))
        for region in now - self._known.keys():
            self._known[region] = self.table.add(*region)

    def __repr__(self) -> str:
        return f"<Peer {self.name!r}, {len(self.table)} regions>"


class Directory:
    """The open engines of this process, by name. Holds none of them alive."""

    def __init__(self) -> None:
        self._engines: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def enter(self, engine: Engine, name: str | None) -> str:
        """Enter an engine under its name, or the next free "engine-<n>". Raises UsageError for a name in use."""
        with self._lock:
            if name is None:
                n = 0
                while f"engine-{n}" in self._engines:
                    n += 1
                name = f"engine-{n}"
            if name in self._engines:
                raise UsageError(f"an engine named {name!r} is open in this process; names must be unique")
            self._engines[name] = engine
        return name

    def leave(self, name: str) -> None:
        """Forget an engine that has closed."""
        with self._lock:
            self._engines.pop(name, None)

    def engines(self) -> list[Engine]:
        """All that are open."""
        return [engine for engine in self._engines.values() if not engine.closed]

    def look_up(self, name: str, provider: str) -> Descriptor:
        """What the engine called `name` tells peers on `provider`. Takes that engine's lock.

        Raises TransportError when there is none, or it uses another provider.
        """
        engine = self._engines.get(name)
        if engine is None or engine.closed:
            known = ", ".join(sorted(e.name for e in self.engines())) or "none"
            raise TransportError(f"no engine named {name!r} in this process; there are: {known}")
        described = engine.describe()
        if described.provider != provider:
            raise TransportError(
                f"peer {name!r} uses provider {described.provider!r}, this engine {provider!r}; both ends need the same"
            )
        return described


directory = Directory()
