"""What one peer may take of an engine, and all of them together of its process."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from mooncache import CapacityError, Engine
from mooncache.discovery.dial import dial
from mooncache.discovery.messages import Answer
from mooncache.providers.stream import quotas
from mooncache.providers.stream.lane import FRAMES_VERSION
from tests.helpers import until


@pytest.fixture
def engine(engines: Callable[..., Engine]) -> Engine:
    return engines(provider="shm")


@pytest.fixture
def asked(engine: Engine) -> Iterator[Callable[..., Answer]]:
    """Asks the engine as a peer of some name does, for a lane or for its memory; both stay until the end."""
    with ExitStack() as undo:

        def ask(caller: str, purpose: str) -> Answer:
            where = engine.address if purpose == "lane" else f"unix:{engine._service.unix}"
            body = {"lanes": FRAMES_VERSION, "queue": 1, "round": 1} if purpose == "lane" else {"have": []}
            answer = dial(where, purpose, body, caller=caller, generation=1, secret=None)
            undo.enter_context(answer.sock)
            for descriptor in answer.fds:
                undo.callback(os.close, descriptor)
            return answer

        yield ask


def incoming(engine: Engine) -> int:
    return sum(lane.incoming for port in engine.provider.ports for lane in port.lanes)


def test_a_peer_has_only_so_many_connections(engine, asked, monkeypatch):
    monkeypatch.setattr(quotas, "LANES", 3)
    first = [asked("greedy", "lane") for _ in range(3)]
    until(lambda: incoming(engine) == 3, "its connections")
    with pytest.raises(CapacityError, match="'greedy' has 3 connections to this engine, as many as one peer may"):
        asked("greedy", "lane")
    asked("another", "lane")
    first[0].sock.close()
    until(lambda: incoming(engine) == 3, "the end of one")
    asked("greedy", "lane")


def test_a_peer_maps_memory_only_so_often(engine, asked):
    first = [asked("greedy", "share") for _ in range(quotas.LEASES)]
    with pytest.raises(CapacityError, match="'greedy' maps memory of this engine 4 times already"):
        asked("greedy", "share")
    asked("another", "share")
    first[0].sock.close()
    until(lambda: len([lease for lease in engine.provider._leases if not lease.ended]) == quotas.LEASES, "its end")
    asked("greedy", "share")


@pytest.mark.parametrize(("purpose", "each"), [("lane", 1), ("share", 2)])
def test_peers_leave_half_of_the_descriptors_to_the_process(engine, asked, monkeypatch, purpose, each):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * each, 8 * each))
    for number in range(4):
        asked(f"peer {number}", purpose)
    until(lambda: incoming(engine) == 4 or purpose == "share", "their connections")
    held = 4 * each
    with pytest.raises(CapacityError, match=rf"peers hold {held} descriptors .*half of the {2 * held} .*ulimit -n"):
        asked("one too many", purpose)


def test_without_a_limit_there_is_no_half(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    quotas.check_lanes(["peer"], "another")
