"""Threads whose start, or a wait for whose end, is interrupted."""

from __future__ import annotations

import threading

import pytest

from mooncache.threads import Thread
from tests.helpers import LIMIT


class Interrupted(BaseException):
    """As a signal handler raises."""


def test_work_is_done_in_a_daemon_thread_of_that_name():
    seen = []
    thread = Thread("somebody", lambda: seen.append(threading.current_thread()))
    assert not thread.is_alive()
    thread.join()  # not started: returns
    thread.start()
    thread.join(LIMIT)
    assert seen == [thread]
    assert (thread.name, thread.daemon, thread.is_alive()) == ("somebody", True, False)


@pytest.mark.parametrize("moment", ["before it is made", "before it begins", "after it has begun"])
def test_a_start_that_is_interrupted_has_started_it_entirely_or_not_at_all(monkeypatch, moment):
    made, let_go, begun, done = threading.Thread, threading.Event(), threading.Event(), threading.Event()
    start, run = made.start, Thread.run

    def interrupted(thread):
        if moment != "before it is made":
            start(thread)
        if moment == "after it has begun":
            assert begun.wait(LIMIT)
        raise Interrupted

    def late(thread):
        if moment == "before it begins":
            assert let_go.wait(LIMIT)
        run(thread)
        done.set()

    worked = []
    thread = Thread("somebody", lambda: (begun.set(), let_go.wait(LIMIT), worked.append(True)))
    monkeypatch.setattr(made, "start", interrupted)
    monkeypatch.setattr(Thread, "run", late)
    with pytest.raises(Interrupted):
        thread.start()
    assert thread.is_alive() == (moment == "after it has begun")
    let_go.set()
    thread.join(LIMIT)
    assert not thread.is_alive()
    assert moment == "before it is made" or done.wait(LIMIT)
    assert worked == [True] * (moment == "after it has begun")


def test_a_wait_that_is_interrupted_leaves_a_thread_alive(monkeypatch):
    let_go = threading.Event()
    thread = Thread("somebody", lambda: let_go.wait(LIMIT))
    thread.start()

    def interrupted(*_):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(threading.Condition, "wait", interrupted)
        with pytest.raises(Interrupted):
            thread.join(LIMIT)
    assert thread.is_alive()
    let_go.set()
    thread.join(LIMIT)
    assert not thread.is_alive()
