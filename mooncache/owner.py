"""The part of an engine that batches, regions, peers and the service need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mooncache.awaiting import Awaiting
from mooncache.descriptor import Descriptor
from mooncache.providers.base import Provider
from mooncache.stats import Stats


class Owner(Protocol):
    """An engine as the objects know it that it has made. `Engine`, the only one, says the rest.

    Attributes:
        name, generation: by which peers know it.
        closed: it takes no more calls.
        inherited: it belongs to the process that this one was forked from.
        provider, awaiting: its own.
    """

    name: str
    generation: int
    closed: bool
    inherited: bool
    provider: Provider
    awaiting: Awaiting

    @property
    def ctl(self) -> int:
        """The address of the calling thread's control block."""

    @property
    def memory(self) -> object:
        """The engine's arrays: a holder of this keeps them in place, also while it is closed."""

    @property
    def regions(self) -> Mapping[int, object]:
        """The registered regions, by the slot of their first part."""

    @property
    def near(self) -> str:
        """The address for others of this machine; empty when it answers in this process only."""

    def check_own(self) -> None:
        """Raise EngineInherited in a process that was forked from the engine's."""

    def check_open(self) -> None:
        """Raise EngineClosed or EngineInherited when it takes no calls."""

    def unregister(self, region: Any) -> None:
        """Withdraw a region."""

    def descriptor(self) -> Descriptor:
        """Return the description that peers get."""

    def supersede(self, name: str, generation: int) -> None:
        """Note that a peer's name is another engine's."""

    def retract_from(self, generation: int, limit_s: float) -> int:
        """Get back what is in flight to an engine of this process that fences this one.

        Return its queue pairs' number.
        """

    def stats(self) -> Stats:
        """Return counters and levels."""
