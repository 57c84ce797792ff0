"""Wrong arguments: every public call refuses every wrong kind with an error of ours that says what it expected and what
came, and changes nothing."""

from __future__ import annotations

import errno
import os
import resource
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest

from mooncache import CapacityError, Engine, MooncacheError, TransportError, UsageError
from mooncache.directory import directory
from mooncache.discovery.address import parse_address
from mooncache.discovery.stores import open_names
from mooncache.memory import range_of
from mooncache.providers.shm.provider import Shm
from mooncache.providers.stream.tcp import Tcp
from mooncache.shortage import told
from tests.helpers import SMALL, unchanged

NAN, INF = float("nan"), float("inf")
LONG = "x" * 100_000
HUGE = 1 << 100_000  # more digits than Python prints
# Nothing that any call takes as a number, an address, a name or a buffer of its own.
KINDS: list[Any] = [
    None, True, 1.5, NAN, INF, -1, 0, HUGE, -HUGE, 1 << 63, Fraction(1, 3), 1j, "", "x", LONG, b"", b"x", "\0",
    "\ud800", [], [1], {}, {1}, (), (1,), (1, 2, 3), ("a", "b"), object(), object, len, Ellipsis, range(3),
    memoryview(b"x"), np.float64(1.5), np.array(1), np.array([object()]), np.zeros((2, 2)), np.zeros(0),
    np.datetime64("now"),
]  # fmt: skip


def name_of(value: object) -> str:
    return (
        "huge" if isinstance(value, int) and value.bit_length() > 64 else f"{type(value).__name__} {str(value)[:12]!r}"
    )


def refused(call: Callable[[], Any], *kinds: type[BaseException]) -> str:
    """The error that the call raises, which is of these kinds, of ours, short, and says what was expected."""
    with pytest.raises(kinds or (MooncacheError,)) as caught:
        call()
    text = str(caught.value)
    assert isinstance(caught.value, MooncacheError), repr(caught.value)
    assert 20 < len(text) < 1500, text
    return text


def check(what: str, value: object, call: Callable[[], Any]) -> None:
    try:
        refused(call)
    except BaseException as error:
        raise AssertionError(f"{what} with {name_of(value)}: {error!r}") from error


# ------------------------------------------------------------------------------ the calls of an engine
def calls(pair: Any) -> dict[str, Callable[[Any], Any]]:
    """Each takes one argument, the others are good."""
    a, b, peer = pair.local.address, pair.remote.address, pair.peer
    one = np.full(1, a)
    return {
        "write(peer)": lambda v: pair.here.write(v, a, b, 8),
        "write(source)": lambda v: pair.here.write(peer, v, b, 8),
        "write(target)": lambda v: pair.here.write(peer, a, v, 8),
        "write(length)": lambda v: pair.here.write(peer, a, b, v),
        "write(array, target)": lambda v: pair.here.write(peer, one, v, 8),
        "write(timeout)": lambda v: pair.here.write(peer, a, b, 8, timeout=v),
        "write(notify)": lambda v: pair.here.write(peer, a, b, 8, notify=v),
        "read(peer)": lambda v: pair.here.read(v, b, a, 8),
        "read(source)": lambda v: pair.here.read(peer, v, a, 8),
        "read(length)": lambda v: pair.here.read(peer, b, a, v),
        "connect(name)": lambda v: pair.here.connect(v),
        "forget(peer)": lambda v: pair.here.forget(v),
        "fence(peer)": lambda v: pair.here.fence(v),
        "register(buffer)": lambda v: pair.here.register(v).unregister(),
        "register((address, 1))": lambda v: pair.here.register((v, 1)).unregister(),
        "register((1 << 40, length))": lambda v: pair.here.register((1 << 40, v)).unregister(),
        "register(access)": lambda v: pair.here.register(np.zeros(8, np.uint8), access=v).unregister(),
        "unregister(region)": lambda v: pair.here.unregister(v),
        "allocate(nbytes)": lambda v: pair.here.allocate(v),
    }


# What each takes after all, or answers otherwise than with a refusal.
FINE: dict[str, Callable[[Any], bool]] = {
    "write(timeout)": lambda v: v is None or (isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9),
    "write(notify)": lambda v: (
        v is None or (isinstance(v, str | bytes | memoryview) and len(v) < 1024 and v != "\ud800")
    ),
    "register(buffer)": lambda v: (isinstance(v, bytes) and v == b"x") or isinstance(v, memoryview) or _is_array(v),
    "fence(peer)": lambda v: isinstance(v, str),  # one that is not there has nothing under way
}


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.nbytes > 0 and not value.dtype.hasobject


CALLS = (
    "write(peer)", "write(source)", "write(target)", "write(length)", "write(array, target)", "write(timeout)",
    "write(notify)", "read(peer)", "read(source)", "read(length)", "connect(name)",
    "forget(peer)", "fence(peer)", "register(buffer)",
    "register((address, 1))", "register((1 << 40, length))", "register(access)", "unregister(region)",
    "allocate(nbytes)",
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("provider", ["loopback", "tcp"])
def test_every_wrong_kind_of_argument_is_refused_in_our_words_and_changes_nothing(pairs, provider, call):
    pair = pairs(provider)
    pair.write(0, length=8).wait(20).close()
    function = calls(pair)[call]
    before = unchanged(pair)
    for value in KINDS:
        if not FINE.get(call, lambda v: False)(value):
            check(call, value, lambda value=value: function(value))
    assert unchanged(pair) == before
    assert len(pair.here.regions) == 1
    pair.write(100, length=8).wait(20).close()
    np.testing.assert_array_equal(pair.target[100:108], pair.source[100:108])


@pytest.mark.parametrize("timeout", [True, NAN, INF, -INF, "1", b"1", [1], HUGE, 1j, object()], ids=name_of)
def test_a_wrong_timeout_is_refused_by_all_that_wait(pair, timeout):
    with pair.write(0, length=8) as batch:
        fence = partial(pair.here.fence, pair.peer)
        for wait in (batch.wait, batch.wait_quiesced, pair.here.notifications().get, lambda t: fence(timeout=t)):
            assert "timeout in seconds" in refused(lambda wait=wait: wait(timeout), UsageError)
        batch.wait(20)


@pytest.mark.parametrize("timeout", [np.float32(20), np.int64(20), 20, 20.0, np.float64(20)])
def test_seconds_of_any_kind_of_number_are_seconds(pair, timeout):
    pair.write(0, length=8, timeout=timeout).wait(timeout).close()


def test_memory_of_python_objects_is_refused_however_it_is_given(pair):
    objects = np.array([object()] * 8)
    fields = np.zeros(4, np.dtype([("a", "i8"), ("b", "O")]))
    for buffer in (objects, fields, memoryview(objects), objects.reshape(2, 4)):
        assert "of Python objects" in refused(lambda buffer=buffer: pair.here.register(buffer), UsageError)


def test_a_region_of_another_engine_is_not_this_ones_to_withdraw(pair):
    assert "is not registered with engine" in refused(lambda: pair.here.unregister(pair.remote), UsageError)
    assert pair.remote.registered
    assert pair.local.registered
    pair.write(0, length=8).wait(20).close()


def test_buffers_of_all_kinds_have_their_range():
    for buffer in (np.zeros(8, np.uint8), bytearray(8), array("q", [1]), memoryview(bytearray(8)), b"12345678"):
        assert range_of(buffer).length == 8


# ------------------------------------------------------------------------------ opening
def is_zero(value: Any) -> bool:
    return type(value) is int and value == 0


OPENING: dict[str, Callable[[Any], bool]] = {  # what each argument takes after all
    "name": lambda v: v is None or (isinstance(v, str) and v == "x"),
    "provider": lambda v: False,
    "store": lambda v: False,
    "policy": lambda v: False,
    "listen": lambda v: False,
    "secret": lambda v: v is None or (isinstance(v, str | bytes) and len(v) > 0),
    "discovery": lambda v: v is None,
    "advertise": lambda v: v is None or (isinstance(v, str) and v in ("x",)),
    "workers": lambda v: False, "slices": lambda v: False, "batches": lambda v: False, "peers": lambda v: False,
    "slice_bytes": lambda v: False, "queue_depth": lambda v: False, "chain": lambda v: False,
    "poll_lot": lambda v: False, "retries": is_zero, "signal": is_zero, "cache_slices": is_zero,
    "reaper_lot": lambda v: False, "reaper_period_ns": lambda v: False, "spin_ns": is_zero, "nonsense": lambda v: False,
}  # fmt: skip


@pytest.mark.parametrize("argument", OPENING)
def test_every_wrong_kind_of_argument_opens_nothing(argument):
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    for value in KINDS:
        if not OPENING[argument](value):
            check(argument, value, lambda value=value: Engine(**{"provider": "tcp", **SMALL, argument: value}))
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.mark.parametrize("value", KINDS, ids=name_of)
def test_addresses_urls_and_lanes_of_the_wrong_kind_are_refused(value):
    for call in (parse_address, open_names, lambda v: Tcp(lanes=v), lambda v: Shm(lanes=v)):
        refused(lambda call=call: call(value), UsageError)


# ------------------------------------------------------------------------------ what the system refuses
def held() -> tuple[set[str], int, int]:
    return set(os.listdir("/proc/self/fd")), threading.active_count(), len(directory.engines())


@contextmanager
def no_gaps() -> Iterator[int]:
    """The number of the next descriptor, below which none is free."""
    last = max(map(int, os.listdir("/proc/self/fd")))
    filling = [os.open("/dev/null", os.O_RDONLY)]
    while filling[-1] < last:
        filling.append(os.open("/dev/null", os.O_RDONLY))
    try:
        yield filling[-1] + 1
    finally:
        for descriptor in filling:
            os.close(descriptor)


def opens(provider: str) -> str:
    """Open an engine and close it again; what it says if it cannot."""
    try:
        Engine(provider=provider, workers=2, **SMALL).close()
    except CapacityError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("provider", ["loopback", "tcp", "shm"])
def test_whichever_descriptor_is_the_one_too_many_it_is_told_and_nothing_is_left(provider):
    opens(provider)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    refusals = []
    with no_gaps() as first:
        before = held()
        for most in range(first, first + 60):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            try:
                refusal = opens(provider)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert held() == before
            if not refusal:
                break
            refusals.append(refusal)
            assert f"all {most} file descriptors" in refusal
            assert "ulimit -n" in refusal
    assert len(refusals) >= 3
    assert not refusal


@pytest.mark.parametrize("provider", ["loopback", "tcp", "shm"])
def test_whichever_thread_is_the_one_too_many_it_is_told_and_nothing_is_left(provider, monkeypatch):
    opens(provider)
    before, start, refusals = held(), threading.Thread.start, []
    for most in range(10):
        left = [most]

        def limited(thread: threading.Thread, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)
        refusal = opens(provider)
        monkeypatch.setattr(threading.Thread, "start", start)
        assert held() == before
        if not refusal:
            break
        refusals.append(refusal)
        assert "ulimit -u" in refusal
    assert len(refusals) >= 2
    assert not refusal


@pytest.mark.parametrize(
    ("number", "kind", "cure"),
    [
        (errno.EMFILE, CapacityError, "ulimit -n"),
        (errno.ENFILE, CapacityError, "fs.file-max"),
        (errno.ENOMEM, CapacityError, "`slices` or `batches`"),
        (errno.ENOSPC, CapacityError, "max_user_watches"),
        (errno.EPERM, TransportError, "forbid"),
        (errno.EIO, TransportError, "Input/output error"),
    ],
)
def test_what_the_system_refuses_is_told_with_its_own_cure(number, kind, cure):
    with pytest.raises(kind, match=cure), told("no engine can be opened"):
        raise OSError(number, os.strerror(number))


def test_settings_that_no_memory_holds_are_refused():
    with pytest.raises(CapacityError, match="`slices` or `batches`"), told("no engine can be opened"):
        raise MemoryError("Unable to allocate 8 EiB")
