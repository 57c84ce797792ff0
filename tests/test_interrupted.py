"""Exceptions that a signal handler raises while an engine is opened, used and closed: they come out, nothing stays."""

from __future__ import annotations

import _thread
import contextlib
import random
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from mooncache import Engine
from mooncache.kernels.arrays import address_of, rows_of
from mooncache.kernels.records.batch import BATCH
from tests.helpers import SMALL, until

PROVIDERS = ["loopback", "emulated", "tcp", "shm", "auto"]
MOMENTS = 100
PYTHONS_OWN = (contextlib.__file__, threading.__file__)
"""Modules in which an interruption loses what a context or condition holds; it comes at a later call."""


class Interrupted(BaseException):
    """As a signal handler raises."""


class Signal(int):
    """A signal's number."""

    comes = property(_thread.interrupt_main)
    """Looking at this sends the signal to the main thread. No call of Python's: the handler runs after the caller."""


class Interruption:
    """Sends a signal as a Python function is entered, whose handler raises.

    Attributes:
        calls: functions entered so far.
        where: the stack of the call that was interrupted.
        lost: the handler raised in a finalizer, where Python prints an exception and goes on.
    """

    def __init__(self, at: int) -> None:
        self._at, self.calls, self.lost, self.where = at, 0, False, ""
        self._signal = Signal(signal.SIGUSR1)

    @contextlib.contextmanager
    def comes(self) -> Iterator[None]:
        """Count the calls inside, and interrupt one."""
        handler = signal.signal(self._signal, self._raise)
        hook, sys.unraisablehook = sys.unraisablehook, self._was_lost
        sys.settrace(self._entered)
        try:
            yield
        finally:
            sys.settrace(None)
            sys.unraisablehook = hook
            signal.signal(self._signal, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.where = "".join(traceback.format_stack(frame))
        raise Interrupted

    def _was_lost(self, unraisable: Any) -> None:
        self.lost = self.lost or unraisable.exc_type is Interrupted

    def _entered(self, frame: FrameType, event: str, argument: object) -> None:
        self.calls += 1
        if self.calls >= self._at and frame.f_code.co_filename not in PYTHONS_OWN:
            self._at = sys.maxsize
            self._signal.comes  # noqa: B018


def use(provider: str, opened: list[Engine]) -> None:
    """Open an engine, register memory, and close it."""
    engine = Engine("interrupted", provider=provider, **SMALL)
    opened.append(engine)
    engine.register(engine.allocate(4096)).unregister()
    engine.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of sockets that nobody had yet: they close themselves
@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_interruption_at_any_moment_comes_out_and_a_close_leaves_no_thread(provider: str, caplog) -> None:
    threads = set(threading.enumerate())
    with Interruption(sys.maxsize).comes():
        use(provider, [])
    counting = Interruption(sys.maxsize)
    with counting.comes():
        use(provider, [])
    chance = random.Random(f"{provider} interrupted")
    came = 0
    for at in sorted(chance.sample(range(1, counting.calls), MOMENTS)):
        opened: list[Engine] = []
        interruption = Interruption(at)
        try:
            with interruption.comes():
                use(provider, opened)
        except Interrupted:
            came += 1
        else:
            assert interruption.lost or interruption.calls < at
        for engine in opened:
            engine.close()
        until(
            lambda: set(threading.enumerate()) <= threads, f"no thread of its own, interrupted in\n{interruption.where}"
        )
    assert came > MOMENTS / 2
    assert caplog.text == ""


def test_looking_up_an_address_loses_no_exception() -> None:
    rows = rows_of(BATCH)
    counting = Interruption(sys.maxsize)
    with counting.comes():
        address_of(rows)
    assert counting.calls > 3
    for at in range(1, counting.calls - 1):  # the last two are of the context manager
        with pytest.raises(Interrupted), Interruption(at).comes():
            address_of(rows)
