"""Memory that goes away while it is registered: its slices fail and say whose it was, all others arrive."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from mooncache import Engine, Status, TransferFailed, TransportError
from mooncache.providers import careful
from tests.helpers import LIMIT, assert_balanced, random_bytes

PAGE = mmap.PAGESIZE
PAGES, SLICES = 16, 24  # 64 KiB each
LENGTH = PAGES * PAGE
NONE, READ, BOTH = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Raw:
    """Memory that no object owns. It is protected rather than unmapped: nothing else may come to lie there."""

    def __init__(self, nbytes: int = SLICES * LENGTH) -> None:
        self.address = int(_libc.mmap(None, nbytes, BOTH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0))
        self.pair = self.address, nbytes
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))

    def protect(self, at: int, nbytes: int, rights: int) -> None:
        assert _libc.mprotect(self.address + at, nbytes, rights) == 0

    def close(self) -> None:
        _libc.munmap(*self.pair)


@pytest.fixture
def raw():
    made = []

    def make(*arguments):
        made.append(Raw(*arguments))
        return made[-1]

    yield make
    for memory in made:
        memory.close()


class Way(NamedTuple):
    """How bytes travel, between two engines of this process."""

    provider: str
    mapped: bool = False  # the other end's memory is an engine's own
    forbid: Callable[[Engine, str], None] = lambda *_: None  # what the system does not permit

    def connect(self, here: Engine, peer: str) -> None:
        here.connect(peer)
        self.forbid(here, peer)


def _others(here: Engine, peer: str) -> None:
    for queue in here.provider.queues_of(peer):
        queue.row["pid"] = 0


def _itself(here: Engine, peer: str) -> None:
    for copier in here.provider._copiers:
        copier._row["own_pid"] = 0


WAYS = {
    "tcp": Way("tcp"),
    "mapped": Way("shm", mapped=True),
    "mapped, by lane": Way("shm", mapped=True, forbid=_itself),
    "process": Way("shm"),
    "by lane": Way("shm", forbid=_others),
    "auto": Way("auto", mapped=True),
    "loopback": Way("loopback"),
    "emulated": Way("emulated"),
}
PLACES = ([0], [17], [SLICES - 1], [0, 1, 5, 6, 17, SLICES - 1], list(range(SLICES)))  # slices of a frame


class Ends:
    """Both engines, and memory of either: all slices of one go to, or come from, the other's."""

    def __init__(self, engines: Any, way: Way, here: Raw, there: Raw, *, whose: str, nbytes: int) -> None:
        self.here, self.there = (engines(provider=way.provider) for _ in range(2))
        self.peer = self.there.address or self.there.name
        self.ours, self.raw = here.bytes, here if whose == "ours" else there
        kept = way.mapped and whose == "ours"
        self.theirs = self.there.allocate(nbytes) if kept else there.bytes
        self.local = self.here.register(here.pair)
        self.remote = self.there.register(self.theirs if kept else there.pair)
        way.connect(self.here, self.peer)

    def move(self, opcode: str, at: np.ndarray, length: int = LENGTH) -> Any:
        if opcode == "write":
            return self.here.write(self.peer, self.local.address + at, self.remote.address + at, length)
        return self.here.read(self.peer, self.remote.address + at, self.local.address + at, length)

    @property
    def epochs(self) -> list[Any]:
        """Another one when a connection broke."""
        queues = self.here.provider._queues_of(self.peer)
        return [getattr(queue, "ticket", None) for queue in queues]


@pytest.mark.parametrize("opcode", ["write", "read"])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_gone_fails_its_slices_and_nothing_else(engines, raw, way, whose, opcode):
    ends = Ends(engines, WAYS[way], raw(), raw(), whose=whose, nbytes=SLICES * LENGTH)
    sent, got = (ends.ours, ends.theirs) if opcode == "write" else (ends.theirs, ends.ours)
    sent[:] = data = random_bytes(sent.size)
    at = np.arange(SLICES, dtype=np.int64) * LENGTH
    ends.move(opcode, at).wait(LIMIT).close()
    epochs = ends.epochs
    changed = (opcode == "read") == (whose == "ours")  # the end that may go away is written to
    status = Status.LOCAL_ERROR if whose == "ours" else Status.REMOTE_ERROR
    region, name = (ends.local, ends.here.name) if whose == "ours" else (ends.remote, ends.peer)

    for places, page, rights in itertools.product(PLACES, (0, 1, PAGES - 1), (NONE, READ)):
        got[:] = 0
        for i in places:
            ends.raw.protect(i * LENGTH + page * PAGE, LENGTH - page * PAGE, rights)
        fails = places if changed or rights == NONE else []
        batches = [ends.move(opcode, at[[i for i in range(SLICES) if i not in places]]) for _ in range(3)]
        batches.insert(1, ends.move(opcode, at))
        for i, batch in enumerate(batches):
            if fails and i == 1:
                with pytest.raises(TransferFailed, match=r"unmapped or protected .* bytes at"):
                    batch.wait(LIMIT)
                assert [(f.request, f.status) for f in batch.failures] == [(i, status) for i in fails]
                for failure in batch.failures:
                    where = f"{LENGTH} bytes at {region.address + failure.request * LENGTH:#x}"
                    assert where in failure.reason
                    assert repr(name) in failure.reason
            else:
                batch.wait(LIMIT)
            batch.close()
        for i in places:
            ends.raw.protect(i * LENGTH, LENGTH, BOTH)
        for i in set(range(SLICES)) - set(fails):
            assert (got[i * LENGTH : (i + 1) * LENGTH] == data[i * LENGTH : (i + 1) * LENGTH]).all(), (places, page, i)
        sent[:] = data

    got[:] = 0
    ends.move(opcode, at).wait(LIMIT).close()
    np.testing.assert_array_equal(got, data)
    assert ends.epochs == epochs
    ends.here.close()
    assert_balanced(ends.here)


@pytest.mark.parametrize("opcode", ["write", "read"])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("way", ["tcp", "by lane"])
def test_holes_are_told_from_sockets_that_are_full_or_empty(engines, raw, way, whose, opcode):
    """Frames of many times a socket's buffer, so that both happen at once."""
    slices, nbytes = 600, 600 * LENGTH
    ends = Ends(engines, WAYS[way], raw(nbytes), raw(nbytes), whose=whose, nbytes=nbytes)
    sent, got = (ends.ours, ends.theirs) if opcode == "write" else (ends.theirs, ends.ours)
    sent[:] = data = random_bytes(sent.size)
    at, epochs = np.arange(slices, dtype=np.int64) * LENGTH, ends.epochs
    gone = [0, 31, 32, 33, 255, 256, 300, 511, 599]
    for i in gone:
        ends.raw.protect(i * LENGTH + 7 * PAGE, PAGE, NONE)
    with ends.move(opcode, at) as batch, pytest.raises(TransferFailed):
        batch.wait(LIMIT)
    assert [f.request for f in batch.failures] == gone
    ends.raw.protect(0, nbytes, BOTH)
    assert all((got[a : a + LENGTH] == data[a : a + LENGTH]).all() for i, a in enumerate(at) if i not in gone)
    assert ends.epochs == epochs


@pytest.mark.parametrize("provider", ["loopback", "emulated"])
def test_where_the_kernel_does_not_copy_memory_that_nobody_holds_is_refused(engines, raw, provider, monkeypatch):
    engine, memory = engines(provider=provider), raw()
    monkeypatch.setattr(careful, "look", lambda *_: -1)
    with pytest.raises(TransportError, match=r"may go away.*register the array or tensor"):
        engine.register(memory.pair)
    engine.register(memory.bytes).unregister()


def test_an_engine_holds_its_own_memory_also_when_it_is_given_by_address(engines):
    engine = engines()
    array = engine.allocate(1 << 20)
    region = engine.register((array.ctypes.data, array.nbytes))
    array[:] = 7
    address = array.ctypes.data
    del array
    assert ctypes.string_at(address, 1 << 20) == b"\x07" * (1 << 20)
    region.unregister()
