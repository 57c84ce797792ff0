"""Fixtures of tests that run in one guest and drive another."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.testbed.network import CONTROL, RAILS
from tests.testbed.peer import Peer
from tests.testbed.rail import Rail


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that pulls the other guest's plug runs last: the guest does not come back."""
    items.sort(key=lambda item: "peer_to_lose" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def bed() -> None:
    """What all tests of this folder stand on."""
    if not os.environ.get("MOONCACHE_TEST_PEER"):
        pytest.skip("no other host: `make test-rdma-two-hosts` boots two virtual machines with two rails between them")


@pytest.fixture(scope="session")
def here(bed: None) -> str:
    """This guest's address on the control link, to listen on."""
    return CONTROL.address("left")


@pytest.fixture(scope="session")
def peer(bed: None) -> Peer:
    """The other guest; `peer.host` is its address on the control link."""
    peer = Peer(os.environ["MOONCACHE_TEST_PEER"])
    peer.wait_until_up(300)
    return peer


@pytest.fixture
def peer_to_lose(peer: Peer) -> Peer:
    """The other guest, for the one test that may call `power_off`."""
    return peer


@pytest.fixture
def rails(peer: Peer) -> Iterator[list[Rail]]:
    """Both rails; whatever was pulled is plugged in again."""
    rails = [Rail(link, peer) for link in RAILS]
    yield rails
    for rail in rails:
        rail.plug_in_here()
        if not peer.gone:
            rail.plug_in_there()
