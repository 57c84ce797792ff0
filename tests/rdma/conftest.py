"""These tests need an RDMA device; without one they are skipped."""

from __future__ import annotations

import os

import pytest

from tests import helpers


@pytest.fixture(scope="session", autouse=True)
def bed() -> None:
    """What all tests of this folder stand on."""
    if not os.environ.get("MOONCACHE_TEST_RDMA_DEVICE"):
        pytest.skip("no RDMA device: `make test-rdma` boots a virtual machine that has one")


@pytest.fixture(scope="session")
def device(bed: None) -> str:
    """The device's name."""
    return os.environ["MOONCACHE_TEST_RDMA_DEVICE"]


@pytest.fixture(scope="session")
def rdma(device: str):
    """Makes a provider on the device. Its patience is long: a guest under emulation may be late."""
    from mooncache.providers.rdma.provider import Rdma

    helpers.LIMIT = 120
    return lambda **options: Rdma([device], timeout=18, **options)


@pytest.fixture
def pair(rdma):
    """Two engines on the device, of which the first writes to the second."""
    pair = helpers.Pair(rdma(), rdma(), arena=2 << 20, slices=16 * 1024)
    yield pair
    pair.close()
