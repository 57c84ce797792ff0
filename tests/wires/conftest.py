"""Fixtures: other processes, and every way bytes travel between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from mooncache import Engine
from tests.helpers import random_bytes
from tests.wires import there
from tests.wires.processes import Far, Nursery
from tests.wires.there import Place


class Wire(NamedTuple):
    """A way for bytes to travel."""

    provider: str
    mapped: bool = False  # memory that an engine allocated
    by_lanes: bool = False  # as if the system refused process_vm_writev

    def connect(self, here: Engine, address: str) -> None:
        here.connect(address)
        if self.by_lanes:
            for queue in here.provider.queues_of(address):
                queue.row["pid"] = 0


WIRES = {
    "tcp": Wire("tcp"),
    "mapped": Wire("shm", mapped=True),
    "process": Wire("shm"),
    "by_lanes": Wire("shm", by_lanes=True),
    "auto": Wire("auto", mapped=True),
}
OVER_SOCKETS = ("tcp", "by_lanes")


def over(*names: str) -> Any:
    """Parametrise a test over these wires only."""
    return pytest.mark.parametrize("wire", [WIRES[name] for name in names], ids=names)


@pytest.fixture(params=WIRES.values(), ids=WIRES)
def wire(request: pytest.FixtureRequest) -> Any:
    """Every one in turn."""
    return request.param


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def fars(nursery: Nursery) -> Iterator[Callable[[], Far]]:
    """Makes processes and ends them all."""
    made: list[Far] = []

    def make() -> Far:
        made.append(nursery.fork())
        return made[-1]

    yield make
    for far in made:
        far.let_go()
    for far in made:
        far.close()


@pytest.fixture
def far(fars: Callable[[], Far]) -> Far:
    """Another process."""
    return fars()


class Joined:
    """An engine here and one in another process, each with one registered range of the same length.

    The range there is filled with random bytes (`there_at_first`), this one with others.
    """

    def __init__(self, wire: Wire, far: Far, here: Engine, nbytes: int, options: dict[str, Any]) -> None:
        self.wire, self.far, self.here = wire, far, here
        self.place: Place = far(there.target, nbytes, mapped=wire.mapped, seed=2, provider=wire.provider, **options)
        self.data = here.allocate(nbytes) if wire.mapped else np.zeros(nbytes, np.uint8)
        self.data[:] = random_bytes(nbytes, 1)
        self.local = here.register(self.data)
        self.peer = self.place.address
        wire.connect(here, self.peer)

    @property
    def there_at_first(self) -> np.ndarray:
        return random_bytes(self.data.size, 2)

    def write(self, offset: Any = 0, to: Any = None, length: Any = 64, **options: Any) -> Any:
        """By offsets into both ranges."""
        to = offset if to is None else to
        return self.here.write(self.peer, self.local.address + offset, self.place.base + to, length, **options)

    def read(self, offset: Any = 0, to: Any = None, length: Any = 64, **options: Any) -> Any:
        """From `offset` there to `to` here."""
        to = offset if to is None else to
        return self.here.read(self.peer, self.place.base + offset, self.local.address + to, length, **options)

    def there(self) -> np.ndarray:
        """What the range there holds now."""
        return np.frombuffer(self.far(there.read), np.uint8)


@pytest.fixture
def join(engines: Callable[..., Engine], fars: Callable[[], Far]) -> Callable[..., Joined]:
    """Makes joined engines: `join(wire, nbytes, there={...}, **options of the engine here)`."""

    def make(
        wire: Wire, nbytes: int = 1 << 20, *, here: Engine | None = None, there: dict[str, Any] | None = None,
        **options: Any,
    ) -> Joined:  # fmt: skip
        engine = here or engines(provider=wire.provider, **{"slices": 256 * 1024, "batches": 1024, **options})
        return Joined(wire, fars(), engine, nbytes, there or {})

    return make
