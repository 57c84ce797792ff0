"""The contract of every wire, over a verbs device."""

import itertools

import pytest

from tests.helpers import POLICIES, STORES, Pair
from tests.test_contract import ARENA, test_the_contract  # noqa: F401  (collected here, with the fixture below)


@pytest.fixture(params=itertools.product(STORES, POLICIES), ids="-".join)
def matched(rdma, request):
    store, policy = request.param
    pair = Pair(
        rdma(), rdma(), arena=ARENA, store=store, policy=policy, workers=2, slices=32 * 1024, queue_depth=64, chain=16,
        cache_slices=2048, slice_bytes=4096,
    )  # fmt: skip
    yield pair
    pair.close()
