"""Profiles of hypothesis, and fixtures that give everything back whatever the test does."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from mooncache import Engine
from tests.family import Family
from tests.helpers import SMALL, Pair, usual_signals
from tests.kernels.entries import Gated
from tests.servers import Server
from tests.warm import warm

# Compiling within the first example takes seconds, hence no deadline.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=50, stateful_step_count=40, suppress_health_check=_SLOW
)
settings.register_profile(
    "fuzz", deadline=None, max_examples=5000, stateful_step_count=80, print_blob=True, suppress_health_check=_SLOW
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
usual_signals()

DESCRIPTORS = 4096  # 30 engines, each connected to all by a socket at both ends


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Tests are about to be spread over processes: compile once what all of these load."""
    warm()


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    """Makes small engines and closes them all."""
    made: list[Engine] = []

    def make(name: str | None = None, **options: Any) -> Engine:
        made.append(Engine(name, **{"provider": "loopback", **SMALL, **options}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def families() -> Iterator[Callable[..., Family]]:
    made: list[Family] = []

    def make(provider: str, **options: Any) -> Family:
        made.append(Family(provider, **options))
        return made[-1]

    yield make
    for family in made:
        family.close()


@pytest.fixture
def descriptors() -> Iterator[None]:
    """As many as the largest tests need, whatever soft limit was inherited."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < DESCRIPTORS:
        pytest.skip(f"{DESCRIPTORS} file descriptors are needed, and the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def pairs() -> Iterator[Callable[..., Pair]]:
    """Makes pairs of engines and closes them all."""
    made: list[Pair] = []

    def make(*arguments: Any, **options: Any) -> Pair:
        made.append(Pair(*arguments, **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def pair(pairs: Callable[..., Pair]) -> Pair:
    """Two engines over loopback."""
    return pairs()


@pytest.fixture
def switching() -> Iterator[None]:
    """Python threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def gated(pairs: Callable[..., Pair]) -> Pair:
    """Two engines whose transfers stay running until `here.provider.open_gate()`."""
    return pairs(Gated(), Gated())


@pytest.fixture(scope="session", params=["redis", "etcd"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A store of names."""
    server = Server(request.param, tmp_path_factory.mktemp(request.param))
    yield server
    server.kill()
