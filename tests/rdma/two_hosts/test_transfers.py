"""Layers of KV pages between two hosts over two rails, and what happens when cables and plugs are pulled."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from mooncache import Engine, MooncacheError, TransferFailed
from mooncache.errors import Status
from mooncache.kernels.enums import QueueState
from tests import helpers
from tests.helpers import assert_balanced, until
from tests.testbed.network import CONTROL
from tests.testbed.peer import Peer, Process
from tests.testbed.rail import Rail

WAIT = helpers.LIMIT = 300  # seconds; emulated guests move a few MB/s
PEER_GONE_S = 60  # of the emulated guests' clocks; on real machines 15
ARENA = 6 << 20
LAYERS, SLICES = 20, 500
OPEN_BATCHES = 30  # 80 MB: half a minute
FORKS = 7099  # port on the other host
SIZES = np.array([512, 1024, 4096, 16384])


class Far:
    """An engine on the other host, in a process of its own."""

    def __init__(self, peer: Peer, port: int, devices: list[str]) -> None:
        self._peer = peer
        self._socket = socket.create_connection((CONTROL.address("right"), FORKS), timeout=WAIT)
        self._lines = self._socket.makefile("rw")
        told = self.ask(f"{CONTROL.address('right')}:{port} {ARENA} {' '.join(devices)}").split()
        assert len(told) == 3, "the engine on the other host did not open, see its output"
        self.address, self.pid, self.base = told[1], int(told[0]), int(told[2])

    def ask(self, command: str) -> str:
        """Send a command, return its answer."""
        self._lines.write(command + "\n")
        self._lines.flush()
        return self._lines.readline().strip()

    def kill(self) -> None:
        """As if it crashed."""
        killer = self._peer.start("kill", "-9", str(self.pid))
        assert killer.wait() == 0

    def close(self) -> None:
        """Let it close its engine."""
        with self._socket, self._lines:
            self._socket.shutdown(socket.SHUT_WR)


Opener = Callable[[int], Far]


@pytest.fixture(scope="module")
def forks(peer: Peer) -> Iterator[Process]:
    """The process on the other host that engines are forked from."""
    process = peer.start("python", "-m", "tests.rdma.two_hosts.far", f"{CONTROL.address('right')}:{FORKS}")
    process.expect("^ready", limit=WAIT)
    yield process
    with suppress(OSError):  # its host may be gone
        process.kill()


@pytest.fixture
def far(peer: Peer, forks: Process, rails: list[Rail]) -> Iterator[Opener]:
    """Opens an engine on the other host, by its port."""
    opened: list[Far] = []

    def open_one(port: int) -> Far:
        opened.append(Far(peer, port, [rail.device for rail in rails]))
        return opened[-1]

    yield open_one
    for one in opened:
        with suppress(OSError):
            one.close()


@pytest.fixture
def near(here: str, rails: list[Rail]) -> Iterator[Callable[..., Engine]]:
    """Opens engines on this host."""
    from mooncache.providers.rdma.provider import Rdma

    opened: list[Engine] = []

    def open_one(**options: Any) -> Engine:
        provider = Rdma([rail.device for rail in rails], timeout=17, **options)
        opened.append(Engine(provider=provider, listen=f"{here}:0", insecure=True, slices=16 * 1024))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()


def layer(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pages of many sizes in a random order at both ends: offsets here and there, and lengths."""
    stream = np.random.Generator(np.random.Philox(key=[seed, 7]))
    length = stream.choice(SIZES, SLICES)

    def places() -> np.ndarray:
        order = stream.permutation(SLICES)
        starts = np.zeros(SLICES, np.int64)
        starts[order] = np.cumsum(length[order]) - length[order]
        return starts

    return places(), places(), length


def expected(source: np.ndarray, here: np.ndarray, there: np.ndarray, length: np.ndarray) -> np.ndarray:
    """What the far memory has to look like after a layer was written into zeros."""
    target = np.zeros(ARENA, np.uint8)
    for h, t, n in zip(here, there, length, strict=True):
        target[t : t + n] = source[h : h + n]
    return target


def digest(memory: np.ndarray) -> str:
    return hashlib.blake2b(memory.tobytes(), digest_size=16).hexdigest()


def source_bytes(seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, 0])).integers(1, 256, ARENA, dtype=np.uint8)


def outgoing(engine: Engine, far: Far) -> Any:
    return engine.provider._outgoing[far.address]  # type: ignore[attr-defined]


def ready(engine: Engine, far: Far) -> int:
    return sum(row.state == QueueState.READY for row in outgoing(engine, far)._rows)


def test_layers_of_scattered_pages_arrive_whole_both_ways_from_two_ranks(
    far: Opener, near: Callable[..., Engine]
) -> None:
    ranks = [(far(7100 + i), near(), i) for i in range(2)]
    failed: list[BaseException] = []

    def run(there: Far, engine: Engine, rank: int) -> None:
        try:
            source = source_bytes(rank)
            local = engine.register(source)
            for number in range(LAYERS // 2):
                at_here, at_there, length = layer(100 * rank + number)
                there.ask("clear")
                with engine.write(
                    there.address, local.address + at_here, there.base + at_there, length, notify=b"layer"
                ) as batch:
                    batch.wait(WAIT)
                assert there.ask(f"note {WAIT}") == "layer"
                assert there.ask("sum") == digest(expected(source, at_here, at_there, length))
                copy = source.copy()
                for h, n in zip(at_here, length, strict=True):
                    source[h : h + n] = 0
                with engine.read(there.address, there.base + at_there, local.address + at_here, length) as batch:
                    batch.wait(WAIT)
                np.testing.assert_array_equal(source, copy)
            assert_at_rest(engine)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=rank) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def assert_at_rest(engine: Engine) -> None:
    stats = engine.stats()
    assert stats.open_batches == 0
    assert stats.free_slices == stats.capacity_slices
    assert stats.counts["stale"] == 0


@pytest.mark.parametrize("end", ["pull_here", "pull_there"])
def test_a_rail_that_goes_down_in_the_middle_costs_nothing_and_is_used_again_when_it_is_back(
    far: Opener, near: Callable[..., Engine], rails: list[Rail], end: str
) -> None:
    there, engine = far(7200), near()
    source, copy = source_bytes(3), np.zeros(ARENA, np.uint8)
    local, back = engine.register(source), engine.register(copy)
    peer = engine.connect(there.address)
    until(lambda: ready(engine, there) == 4, "both rails ready")
    for number in range(3):
        at_here, at_there, length = layer(number)
        there.ask("clear")
        batch = engine.write(peer, local.address + at_here, there.base + at_there, length)
        if number == 0:
            getattr(rails[0], end)()
        batch.wait(WAIT)
        batch.close()
        assert there.ask("sum") == digest(expected(source, at_here, at_there, length))
        # The pages are released now, and filled anew: nothing that was under way may still be written to them.
        there.ask("fill 9")
        filled = there.ask("sum")
        with engine.read(peer, there.base, back.address, back.length) as batch:
            batch.wait(WAIT)
        assert digest(copy) == there.ask("sum") == filled
    until(lambda: ready(engine, there) == 2, "one rail gone")
    rails[0].plug_in_here()
    rails[0].plug_in_there()
    until(lambda: ready(engine, there) == 4, "both rails ready again")
    with engine.write(peer, local.address, there.base, 4096) as batch:
        batch.wait(WAIT)
    assert_at_rest(engine)


@pytest.mark.parametrize("end", ["here", "there"])
def test_a_rail_that_is_down_when_a_peer_is_connected_to_is_used_once_it_is_up(
    far: Opener, near: Callable[..., Engine], rails: list[Rail], end: str
) -> None:
    there, engine = far(7250), near()
    getattr(rails[1], f"pull_{end}")()
    if end == "here":
        until(lambda: bool(engine.provider.down), "the port's event")  # type: ignore[attr-defined]
    source = source_bytes(8)
    local, (at_here, at_there, length) = engine.register(source), layer(8)
    for count in (2, 4):
        there.ask("clear")
        with engine.write(there.address, local.address + at_here, there.base + at_there, length, notify=b"x") as batch:
            batch.wait(WAIT)
        assert there.ask(f"note {WAIT}") == "x"
        assert there.ask("sum") == digest(expected(source, at_here, at_there, length))
        assert ready(engine, there) == count
        getattr(rails[1], f"plug_in_{end}")()
        until(lambda: ready(engine, there) == 4, "both rails ready")
    assert_at_rest(engine)


def lose_in_the_middle(there: Far, engine: Engine, seed: int, end: Callable[[], None]) -> None:
    """Write a layer many times over, end the peer meanwhile, and see all that was not done by then fail as gone."""
    local = engine.register(source_bytes(seed))
    at_here, at_there, length = layer(seed)
    peer = engine.connect(there.address)
    batches = [engine.write(peer, local.address + at_here, there.base + at_there, length) for _ in range(OPEN_BATCHES)]
    batches[0].wait(WAIT).close()
    end()
    since, failed = time.monotonic(), list[TransferFailed]()
    for batch in batches[1:]:
        try:
            batch.wait(WAIT)
        except TransferFailed as error:
            failed.append(error)
        batch.close()
    assert time.monotonic() - since < PEER_GONE_S
    assert {failure.status for error in failed for failure in error.failures} == {Status.PEER_GONE}
    assert_at_rest(engine)
    assert_balanced(engine)


def test_a_killed_peer_fails_all_open_batches_as_gone_and_its_successor_is_served(
    far: Opener, near: Callable[..., Engine]
) -> None:
    there, engine = far(7300), near()
    lose_in_the_middle(there, engine, 4, there.kill)
    with pytest.raises(MooncacheError):
        engine.write(there.address, next(iter(engine.regions.values())).address, there.base, 64)
    again = far(7300)
    source = source_bytes(5)
    local, (at_here, at_there, length) = engine.register(source), layer(5)
    with engine.write(again.address, local.address + at_here, again.base + at_there, length) as batch:
        batch.wait(WAIT)
    assert again.ask("sum") == digest(expected(source, at_here, at_there, length))


def test_a_host_that_loses_power_fails_all_open_batches_as_gone(
    far: Opener, near: Callable[..., Engine], rails: list[Rail], peer_to_lose: Peer
) -> None:
    lose_in_the_middle(far(7400), near(), 6, peer_to_lose.power_off)
    for rail in rails:  # else what nobody takes from the links keeps Soft-RoCE from destroying a queue pair for 50 s
        rail.pull_here()
