"""One try for all who wait, in threads and in event loops."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import SimpleNamespace

import pytest

from mooncache import ways
from mooncache.deadline import Deadline
from mooncache.errors import DiscoveryError, EngineClosed, TransportError
from mooncache.ways import Ways
from tests.helpers import LIMIT, Task, until

PEER = SimpleNamespace(name="peer")


class Attempts:
    """What `Ways` calls: counts, waits for its gate, then fails or not."""

    def __init__(self) -> None:
        self.count, self.gate, self.error = 0, threading.Event(), None
        self.gate.set()

    def __call__(self, deadline):
        self.count += 1
        deadline.waits_for("an answer")
        if not deadline.until(self.gate.is_set):
            raise TimeoutError
        if self.error is not None:
            raise self.error
        return PEER


@pytest.fixture
def tried():
    return Attempts()


@pytest.fixture
def to():
    opened = Ways("here")
    yield opened
    assert opened.close(LIMIT)


def test_all_who_wait_share_one_try_and_each_gets_its_failure_at_once(to, tried):
    tried.gate.clear()
    tried.error = TransportError("silent")
    asked = [to.begin("peer", tried) for _ in range(8)]
    tasks = [Task(lambda one=one: one.result(Deadline())) for one in asked]
    tried.gate.set()
    errors = []
    for task in tasks:
        with pytest.raises(TransportError, match=r"^silent$") as failed:
            task.result()
        errors.append(failed.value)
    assert tried.count == 1
    assert len({id(error) for error in errors}) == 8  # raising one object in eight threads would mix their traces
    assert all(error.__cause__ is tried.error for error in errors)


def test_within_the_pause_the_failure_is_told_at_once_saying_so_and_connect_does_not_wait(to, tried, monkeypatch):
    monkeypatch.setattr(ways, "PAUSE_S", 3600.0)
    monkeypatch.setattr(ways, "PAUSE_MOST_S", 3600.0)
    tried.error = DiscoveryError("nobody of that name")
    with pytest.raises(DiscoveryError):
        to.begin("peer", tried).result(Deadline())
    with pytest.raises(DiscoveryError, match=r"nobody of that name \(that was 0.\d\d s ago; a submit tries again in 3"):
        to.begin("peer", tried).result(Deadline())
    assert tried.count == 1
    tried.error = None
    assert to.begin("peer", tried, patient=False).result(Deadline()) is PEER
    assert to.begin("peer", tried).result(Deadline()) is PEER
    assert tried.count == 3


def test_the_pause_doubles_up_to_a_limit_and_is_forgotten_after_success(to, tried):
    tried.error = TransportError("refused")
    pauses = []
    for _ in range(8):
        with pytest.raises(TransportError):
            to.begin("peer", tried, patient=False).result(Deadline())
        pauses.append(to._ways["peer"].pause)
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    tried.error = None
    to.begin("peer", tried, patient=False).result(Deadline())
    assert to._ways == {}


def test_news_of_a_name_end_its_pause(to, tried, monkeypatch):
    monkeypatch.setattr(ways, "PAUSE_S", 3600.0)
    tried.error = TransportError("refused")
    with pytest.raises(TransportError):
        to.begin("peer", tried).result(Deadline())
    to.hurry("peer")
    to.hurry("another")
    tried.error = None
    assert to.begin("peer", tried).result(Deadline()) is PEER


def test_a_caller_out_of_time_is_told_what_was_waited_for_and_the_try_goes_on(to, tried):
    tried.gate.clear()
    asked = to.begin("peer", tried)
    until(lambda: asked._tried.deadline.waiting, "the try")
    with pytest.raises(TransportError, match=r"'peer' was not connected within the 0.01 s of this call.*an answer"):
        asked.result(Deadline(0.01))
    with pytest.raises(TransportError, match="within the 0 s"):
        asked.result(Deadline(0))
    tried.gate.set()
    assert asked.result(Deadline()) is PEER
    assert tried.count == 1


def test_who_wants_news_gets_a_try_that_began_later_and_shares_it(to, tried):
    tried.gate.clear()
    before = to.begin("peer", tried)
    after = [to.begin("peer", tried, news=True) for _ in range(3)]
    assert before.future not in {one.future for one in after}
    tried.gate.set()
    assert all(one.result(Deadline()) is PEER for one in [before, *after])
    assert tried.count == 2


def test_closing_ends_tries_under_way(to, tried):
    tried.gate.clear()
    asked = [to.begin("peer", tried), to.begin("peer", tried, news=True), to.begin("another", tried)]
    assert to.close(LIMIT)
    for one in asked:
        with pytest.raises(EngineClosed, match="'here' was closed meanwhile"):
            one.result(Deadline())
    with pytest.raises(EngineClosed):
        to.begin("peer", tried)


def test_coroutines_share_the_try_with_threads_and_giving_up_leaves_it_to_them(to, tried):
    tried.gate.clear()
    asked = to.begin("peer", tried)
    thread = Task(lambda: asked.result(Deadline()))

    async def run():
        gives_up = asyncio.ensure_future(to.begin("peer", tried).aresult(Deadline()))
        stays = asyncio.ensure_future(to.begin("peer", tried).aresult(Deadline()))
        await asyncio.sleep(0)
        gives_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gives_up
        with pytest.raises(TransportError, match=r"within the 0.01 s"):
            await to.begin("peer", tried).aresult(Deadline(0.01))
        tried.gate.set()
        return await stays

    assert asyncio.run(run()) is PEER
    assert thread.result() is PEER
    assert tried.count == 1


def test_an_error_that_nobody_foresaw_reaches_everybody_too(to, tried):
    tried.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        to.begin("peer", tried).result(Deadline())


# ------------------------------------------------------------------------------ deadlines
def test_an_ended_deadline_wakes_who_receives_under_it_or_a_part_of_it():
    deadline = Deadline()
    part = deadline.within(3600)
    here, there = socket.socketpair()

    def receive():
        with part.over_socket(here):
            return here.recv(1)

    task = Task(receive)
    until(lambda: deadline._shared.socks, "the receiver")
    deadline.end("closed")
    assert task.result() == b""
    with pytest.raises(EngineClosed, match="closed"):
        part.left()
    with pytest.raises(EngineClosed, match="closed"), part.over_socket(here):
        raise AssertionError
    here.close()
    there.close()


def test_a_part_of_a_deadline_is_never_longer_than_it():
    assert Deadline(1).within(3600).left() <= 1
    assert Deadline(3600).within(1).left() <= 1
    assert Deadline().left(2.5) == 2.5
    with pytest.raises(TimeoutError):
        Deadline(0).left()
    assert not Deadline(0).until(lambda: False)
    assert Deadline(0).until(lambda: True)
