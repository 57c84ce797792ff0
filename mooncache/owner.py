"""What batches, regions, peers and the service need of the engine that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mooncache.awaiting import Awaiting
from mooncache.descriptor import Descriptor
from mooncache.providers.base import Provider
from mooncache.stats import Stats


class Owner(Protocol):
    """An engine, seen by what it has made. See `Engine`, which is the only one, for what is not said here.

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
        """Address of the calling thread's control block."""

    @property
    def memory(self) -> object:
        """Whoever holds this keeps the engine's arrays in place, also while it is closed."""

    @property
    def regions(self) -> Mapping[int, object]:
        """What is registered, by the slot of its first part."""

    @property
    def near(self) -> str:
        """Where it answers others of this machine; empty when it answers in this process only."""

    def check_own(self) -> None:
        """Raise EngineInherited in a process that was forked from the engine's."""

    def check_open(self) -> None:
        """Raise EngineClosed or EngineInherited when it takes no calls."""

    def unregister(self, region: Any) -> None:
        """Withdraw a region."""

    def descriptor(self) -> Descriptor:
        """What peers are told."""

    def supersede(self, name: str, generation: int) -> None:
        """A peer's name is another engine's now."""

    def retract_from(self, generation: int, limit_s: float) -> int:
        """An engine of this process, of this generation, fences this one. Returns how many queue pairs lead there."""

    def stats(self) -> Stats:
        """Counters and levels."""
