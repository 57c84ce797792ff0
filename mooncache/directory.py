"""The open engines of this process, by name."""

from __future__ import annotations

import reprlib
import threading
import weakref
from itertools import count

from mooncache import forks
from mooncache.descriptor import Descriptor
from mooncache.errors import TransportError, UsageError
from mooncache.owner import Owner


class Directory:
    """The open engines of this process, by name. Holds none of them alive."""

    def __init__(self) -> None:
        self._engines: weakref.WeakValueDictionary[str, Owner] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()  # an engine may be collected, and leaves, in the middle of another's entry

    def disown(self) -> None:
        """Forget the engines in a forked child, so that none is found, or closed at exit; see `forks.Holder`."""
        self.__init__()  # type: ignore[misc]

    def enter(self, engine: Owner, name: str | None, prefix: str) -> str:
        """Enter an engine under its name, or the next free "<prefix>-<n>". Raises UsageError for a name in use."""
        with self._lock:
            if name is None:
                name = next(n for n in map(f"{prefix}-{{}}".format, count()) if n not in self._engines)
            if name in self._engines:
                raise UsageError(f"an engine named {name!r} is open in this process; names must be unique")
            self._engines[name] = engine
        return name

    def leave(self, engine: Owner) -> None:
        """Forget an engine that closes. Its name may be another's already."""
        with self._lock:
            if self._engines.get(engine.name) is engine:
                del self._engines[engine.name]

    def engines(self) -> list[Owner]:
        """Return all engines that are open."""
        return [engine for engine in self._engines.values() if not engine.closed]

    def address(self, name: str) -> str:
        """Return where the engine called `name` answers handshakes from here; empty when it does not."""
        engine = self._engines.get(name)
        return engine.near if engine is not None and not engine.closed else ""

    def look_up(self, name: str, provider: str) -> Descriptor:
        """Return the descriptor of the engine called `name` for peers on `provider`. Takes that engine's lock.

        Raises TransportError when there is none, or it uses another provider.
        """
        engine = self._engines.get(name)
        if engine is None or engine.closed:
            known = sorted(e.name for e in self.engines())
            raise TransportError(f"no engine named {name!r} in this process; there are: {reprlib.repr(known)}")
        described = engine.descriptor()
        if described.provider != provider:
            raise TransportError(
                f"peer {name!r} uses provider {described.provider!r}, this engine {provider!r}; both ends need the same"
            )
        return described


directory = forks.private(Directory())
