from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import threading

import pytest

from mooncache import Engine, background
from mooncache.background import Background
from tests.helpers import SMALL, until
from tests.test_forks import descriptors


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(background, "PAUSE_S", 1e-3)


def test_work_that_fails_is_logged_once_shown_told_and_begun_again(caplog):
    threads, tries, told, end = Background(), [], [], threading.Event()

    def run():
        tries.append(1)
        if len(tries) <= 3:
            raise ValueError("no number")
        end.wait()

    thread = threads.start("keeper", run, told.append)
    until(lambda: len(tries) == 4, "the fourth try")
    assert [str(error) for error in told] == ["no number"] * 3
    (trouble,) = threads.trouble
    assert trouble == "keeper: its thread failed and was started again: ValueError: no number (3 times)"
    (logged,) = caplog.records
    assert logged.levelno == logging.ERROR
    assert logged.exc_info[0] is ValueError
    end.set()
    threads.close()
    assert not thread.is_alive()


def test_what_cannot_be_told_is_trouble_too(caplog):
    threads, tries = Background(), []

    def run():
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("first")

    def failed(error):
        raise KeyError("second")

    threads.start("watcher", run, failed)
    threads.close()
    assert len(threads.trouble) == 2
    assert "KeyError: 'second'" in threads.trouble[1]
    assert len(caplog.records) == 2


def test_closing_ends_a_pause_at_once(monkeypatch, caplog):
    monkeypatch.setattr(background, "PAUSE_S", 3600.0)
    threads, told = Background(), threading.Event()
    threads.start("keeper", lambda: 1 / 0, lambda error: told.set())
    told.wait()
    threads.close()


def test_trouble_is_news_once_and_goes_when_it_is_settled():
    threads = Background()
    assert threads.note("names", "down")
    assert not threads.note("names", "down")
    assert threads.note("names", "still down")
    assert threads.trouble == ("names: still down",)
    assert threads.settled("names")
    assert not threads.settled("names")
    assert threads.trouble == ()


class Interrupted(BaseException):
    """As a signal handler raises."""


@pytest.mark.parametrize("provider", ["loopback", "emulated", "tcp", "shm", "auto"])
def test_an_open_that_is_interrupted_while_a_thread_starts_ends_those_that_run(provider, monkeypatch, caplog):
    start, before = threading.Thread.start, set(threading.enumerate())
    started: list[str] = []

    def start_and_raise(thread):
        start(thread)
        started.append(thread.name)
        if len(started) == most:
            raise Interrupted

    Engine(provider=provider, **SMALL).close()
    held = descriptors()
    for most in itertools.count(1):
        started.clear()
        with monkeypatch.context() as patched, contextlib.suppress(Interrupted):
            patched.setattr(threading.Thread, "start", start_and_raise)
            Engine(provider=provider, **SMALL).close()
        assert set(threading.enumerate()) <= before
        gc.collect()
        assert descriptors() == held
        if len(started) < most:
            break
    assert most > 1
    assert caplog.text == ""
