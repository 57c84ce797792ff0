"""Every thread that works in the background, when what it calls raises: logged once, shown, told to what depends on it,
and begun again."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from mooncache import Engine, Quiesced, Status, TransferFailed, background
from mooncache.discovery.address import parse_address
from mooncache.kernels import look
from mooncache.providers.inprocess.emulated import Emulated, Nic
from tests.helpers import LIMIT, Pair, until
from tests.servers import Server
from tests.wires.fake import FakeTarget


class Fault:
    """In what a thread calls: that raises while the fault is `on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.on, self.times, self._original = False, 0, getattr(owner, name)
        monkeypatch.setattr(owner, name, self._call)

    def _call(self, *arguments: Any, **options: Any) -> Any:
        if self.on:
            self.times += 1
            raise ValueError("broken on purpose")
        return self._original(*arguments, **options)


class Case(NamedTuple):
    """A thread, known by this name in `trouble`, that calls `method` of `owner` when it is stirred."""

    name: str
    owner: Any
    method: str
    stir: Callable[[], object]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(background, "PAUSE_S", 1e-3)
    monkeypatch.setattr(background, "PAUSE_MOST_S", 1e-2)


def shown(engine: Engine, name: str) -> bool:
    return any(name in line and "ValueError: broken on purpose" in line for line in engine.stats().trouble)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [str(record.exc_info) for record in caplog.records if record.levelno >= logging.ERROR]


def check(engine: Engine, case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It fails three times, which is logged once and shown."""
    fault = Fault(monkeypatch, case.owner, case.method)
    fault.on = True
    for _ in range(3):
        before = fault.times
        case.stir()
        until(lambda before=before: fault.times > before, "the fault")
    until(lambda: shown(engine, case.name), "the trouble")
    fault.on = False
    (logged,) = errors(caplog)
    assert "broken on purpose" in logged


# ------------------------------------------------------------------------------ each of them
THREADS: dict[str, tuple[Callable[[], Any], Callable[[Engine], Case]]] = {
    "lanes": (
        lambda: "tcp",
        lambda here: Case(
            "mooncache-lanes", here.provider, "look_around", here.provider.watcher.stir
        ),
    ),
    "listener": (
        lambda: "tcp",
        lambda here: Case(
            f"listener of {here.name!r}", here._service._listener, "_admit",
            lambda: socket.create_connection(parse_address(here.address)).close(),
        ),
    ),
    "looker": (
        lambda: "loopback",
        lambda here: Case(
            f"{here.name}-looker", look, "begin", partial(os.eventfd_write, here._runtime.looker.event_fd, 1)
        ),
    ),
    "mender": (
        lambda: Emulated(Nic(breaks=True)),
        lambda here: Case("mooncache-mender", here.provider._mender, "_mend", here.provider._mender.look_again),
    ),
}  # fmt: skip


@pytest.mark.parametrize("thread", THREADS)
def test_a_thread_that_fails_is_logged_once_shown_and_begun_again(pairs, thread, monkeypatch, caplog):
    provider, case = THREADS[thread]
    pair = pairs(provider(), provider())
    pair.write(0).wait(LIMIT).close()
    check(pair.here, case(pair.here), monkeypatch, caplog)
    until(lambda: _writes(pair), "a write that arrives")


def _writes(pair: Pair) -> bool:
    with pair.write(64) as batch:
        until(lambda: batch.done, "the end of a write")
        assert {failure.status for failure in batch.failures} <= {Status.PEER_GONE}  # as what depends on it is told
        return not batch.failures


@pytest.mark.parametrize("method", ["_refresh_own", "_generations"])
def test_a_keeper_of_names_that_fails_is_logged_once_shown_and_keeps_the_name(
    engines, server: Server, method, monkeypatch, caplog
):
    here, there = (engines(f"{who}-{method}", provider="tcp", discovery=server.url) for who in ("here", "there"))
    names = here._service._names
    names.watch(lambda name, generation: None)
    check(here, Case("names-keeper", names, method, names._due.set), monkeypatch, caplog)
    assert there.connect(here.name).name == here.name
    with here.register(np.zeros(64, np.uint8)) as region:  # which the keeper publishes
        until(lambda: len(there._service._names.look_up(here.name).regions) == 1, "the new record")
        assert region.registered


@pytest.mark.parametrize("wait", ["names-listener"])
def test_a_listener_to_names_that_fails_is_logged_once_and_names_are_looked_at_all_the_same(
    engines, server: Server, wait, monkeypatch, caplog
):
    here = engines("here", provider="tcp", discovery=server.url)
    names = here._service._names
    fault = Fault(monkeypatch, names, "_listen")
    fault.on = True
    told: list[str] = []
    names.watch(lambda name, generation: told.append(name))
    until(lambda: fault.times >= 3 and shown(here, wait), "the trouble")
    assert len(errors(caplog)) == 1
    until(lambda: here.name in told, "the keeper")
    fault.on = False


# ------------------------------------------------------------------------------ what depends on them
@pytest.fixture
def fake():
    with FakeTarget() as fake:
        yield fake


def test_when_who_watches_connections_fails_what_is_under_way_fails_and_the_next_submit_connects_anew(
    engines, fake, monkeypatch
):
    here = engines(provider="tcp")
    local = here.register(np.ones(64, np.uint8))
    here.connect(fake.address)
    lane = fake.lane()
    fault = Fault(monkeypatch, here.provider, "look_around")
    batch = here.write(fake.address, local.address, fake.base, 64)
    lane.recv(1)  # it is under way, and never answered
    fault.on = True
    here.provider.watcher.stir()
    with pytest.raises(TransferFailed, match="PEER_GONE"):
        batch.wait(LIMIT)
    fault.on = False
    here.write(fake.address, local.address, fake.base, 64).close()
    until(
        lambda: fake.lane().recv(1), "a lane that carries it, after the one that asks the peer to let go of the former"
    )


def test_when_who_asks_a_peer_what_landed_fails_the_ranges_there_stay_in_use_until_it_has(
    engines, fake, monkeypatch, caplog
):
    here = engines(provider="tcp")
    local = here.register(np.ones(64, np.uint8))
    here.connect(fake.address)
    fault = Fault(monkeypatch, here.provider._settlers[fake.address], "ask")
    fault.on = True
    batch = here.write(fake.address, local.address, fake.base, 64)
    lane = fake.lane()
    lane.recv(1)
    lane.close()
    with pytest.raises(TransferFailed, match="PEER_GONE"):
        batch.wait(LIMIT)
    until(lambda: fault.times >= 3 and shown(here, f"mooncache-settle-{fake.address}"), "the trouble")
    assert batch.quiesced is Quiesced.SOURCE
    assert len(errors(caplog)) == 1
    fault.on = False
    batch.wait_quiesced(LIMIT)


def test_when_who_mends_queue_pairs_fails_what_waits_for_them_fails(pairs, monkeypatch):
    pair = pairs(Emulated(Nic(breaks=True)), Emulated(Nic(breaks=True)))
    pair.write(0).wait(LIMIT).close()
    fault = Fault(monkeypatch, pair.here.provider._mender, "_mend")
    fault.on = True
    pair.here.provider.take_down(0)
    with pytest.raises(TransferFailed, match="PEER_GONE"):
        pair.write(0).wait(LIMIT)
    fault.on = False
    pair.here.provider.bring_up(0)
    until(lambda: _writes(pair), "a write that arrives")


@pytest.mark.parametrize("method", ["begin", "ask"])
def test_when_who_asks_a_peer_that_refused_fails_the_slices_are_told_so_or_asked_for_again(pairs, monkeypatch, method):
    pair = pairs()
    pair.write(0).wait(LIMIT).close()
    fault = Fault(monkeypatch, look if method == "begin" else pair.here._peers, method)
    pair.remote.unregister()
    pair.remote = pair.there.register(pair.target)
    fault.on = True
    batch = pair.write(0)
    until(lambda: fault.times >= 2, "the fault")
    if method == "ask":  # that look is over, and has found nothing
        with pytest.raises(TransferFailed, match="REMOTE_ACCESS"):
            batch.wait(LIMIT)
    fault.on = False
    if method == "begin":
        batch.wait(LIMIT)
