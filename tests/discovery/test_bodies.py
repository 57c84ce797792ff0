"""What peers say to each other in JSON, whatever it is: a typed error for whoever said it, and nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mooncache import Engine, MooncacheError
from mooncache.discovery.dial import dial
from tests.helpers import SMALL
from tests.wires.fake import FakeTarget

INTEGERS = st.integers() | st.sampled_from([-1, 0, 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**300])
VALUES = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("lanes", "queue", "round", "have", "connection", "instance", "paths", "queues", "notes", "unix", "tickets")
BODIES = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), VALUES | st.just(1), max_size=5)
PURPOSES = (
    "describe",
    "lane",
    "retire",
    "share",
    "segments",
    "rdma-connect",
    "rdma-fence",
    "rdma-repair",
    "nothing of ours",
)
MANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["tcp", "shm", "auto"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(provider=request.param, **SMALL) as engine:
        engine.register(engine.allocate(4096))
        yield engine


@pytest.mark.fuzz
@MANY
@given(purpose=st.sampled_from(PURPOSES), body=BODIES, local=st.booleans())
def test_whatever_is_asked_is_answered_or_refused_in_our_words(engine, caplog, purpose, body, local):
    where = f"unix:{engine._service.unix}" if local else engine.address
    with caplog.at_level(logging.ERROR, "mooncache"), suppress(MooncacheError):
        answer = dial(where, purpose, body, caller="stranger", generation=1, secret=None)
        answer.sock.close()
        for descriptor in answer.fds:
            os.close(descriptor)
    assert caplog.records == []


@pytest.mark.fuzz
@MANY
@given(
    changes=st.dictionaries(
        st.sampled_from(["data", "regions", "address", "provider", "name", "generation", "version", "more"]),
        VALUES | BODIES | st.lists(st.fixed_dictionaries(
            {"address": INTEGERS, "length": INTEGERS, "rkeys": st.lists(INTEGERS, max_size=10), "access": INTEGERS}
        ), max_size=3), min_size=1, max_size=2,
    )
)  # fmt: skip
def test_whatever_a_peer_says_of_itself_it_is_connected_to_or_refused_in_our_words(engine, fake, changes):
    fake.changes = changes
    with suppress(MooncacheError):
        engine.connect(fake.address)
        engine.forget(fake.address)


@pytest.fixture
def fake() -> Iterator[Any]:
    with FakeTarget() as fake:
        yield fake
