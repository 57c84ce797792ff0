"""What belongs to a peer ends with the peer, or with `forget`, or was never there if connecting to it failed."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress

import numpy as np
import pytest

from mooncache import CapacityError, Engine, MooncacheError, Status, TransferFailed, UsageError, limits
from mooncache.deadline import Deadline
from mooncache.discovery.messages import Request
from mooncache.kernels.state import State
from mooncache.peer import Peer
from mooncache.providers.shm import mappings
from mooncache.providers.stream import connections
from tests.helpers import Task, assert_balanced, until
from tests.wires import there
from tests.wires.conftest import over
from tests.wires.test_peers_lost import gone

KiB, MiB = 1 << 10, 1 << 20
NETWORKED = ["tcp", "shm", "auto"]


def mapped_bytes() -> int:
    """Of memory that engines allocated, this process's own included."""
    total = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            if "memfd:mooncache" in line:
                first, _, last = line.split()[0].partition("-")
                total += int(last, 16) - int(first, 16)
    return total


def held() -> tuple[int, int]:
    """Descriptors, and bytes mapped."""
    return there.usage().descriptors, mapped_bytes()


class Load:
    """Batches that are in flight to one peer all the time, from a thread of their own."""

    def __init__(self, pair) -> None:
        self._pair, self._stop, self.rounds = pair, threading.Event(), 0
        self._task = Task(self._run)

    def _run(self) -> None:
        flying: deque = deque()
        while not self._stop.is_set():
            flying.append(self._pair.write(0, 0, self._pair.data.size))
            if len(flying) > 3:
                flying.popleft().wait(20).close()
                self.rounds += 1
        for batch in flying:
            batch.wait(20).close()

    def end(self) -> None:
        self._stop.set()
        self._task.result()


# ------------------------------------------------------------------------------ peers that die
@over("mapped", "auto", "process")
def test_a_peer_that_dies_is_unmapped_beside_a_load_to_another(join, wire):
    other = join(wire, 4 * MiB)
    load = Load(other)
    before = mapped_bytes()
    pair = join(wire, 8 * MiB, here=other.here)
    pair.write(0, 0, 8 * MiB).wait(20).close()
    pair.far.kill()
    until(lambda: gone(pair), "the peer, gone")
    own = 8 * MiB if wire.mapped else 0
    until(lambda: mapped_bytes() <= before + own, "the peer's memory, unmapped")
    rounds = load.rounds
    until(lambda: load.rounds > rounds, "the other's batches, going on")
    load.end()


@over("mapped", "auto")
def test_new_memory_of_a_peer_is_mapped_beside_a_load_to_it_and_former_memory_unmapped(join, wire):
    pair = join(wire, 4 * MiB)
    load = Load(pair)
    until(lambda: load.rounds > 1, "a load")
    before = mapped_bytes()
    names = [f"new {k}" for k in range(5)]
    for name in names:
        pair.far(there.hold, MiB, name=name, mapped=True)
        place = pair.far(there.register, name)
        pair.here.write(pair.peer, pair.local.address, place.base, MiB).wait(20).close()
        assert pair.far(there.read, name) == pair.data[:MiB].tobytes()
    for name in names:
        pair.far(there.unregister, name)
        pair.far(there.free, name)
    pair.here._peers.ask(pair.peer, news=True).result(Deadline())
    until(lambda: mapped_bytes() <= before, "former memory, unmapped")
    load.end()
    pair.here.close()
    assert_balanced(pair.here)


@over("mapped")
def test_retired_mappings_live_until_what_was_posted_by_them_is_answered(join, wire):
    """The worker's queue says so: its tail has passed what was its head."""
    pair = join(wire, MiB)
    provider = pair.here.provider
    queue = provider.queues_of(pair.peer)[0]
    mapping = provider._shares[pair.peer].segments
    retired = mappings.Retired([(queue, queue.row["head"] + 1)], provider._shares[pair.peer].maps, [], None)
    assert mapping
    assert not retired.over
    pair.write(0, 0, 64).wait(20).close()
    assert retired.over


# ------------------------------------------------------------------------------ forget
def test_forget_gives_back_all_that_belonged_to_a_peer_and_it_can_be_connected_to_again(join, wire, engines):
    here = engines(provider=wire.provider, slices=4096, batches=64)
    pair = join(wire, MiB, here=here)
    here.forget(pair.peer)
    until(lambda: pair.far(there.connections) == 0, "the end of all connections, there")
    before = held()
    old = here.connect(pair.peer)
    with pair.write(0, 0, MiB).wait(20) as batch:
        here.forget(pair.peer)
        assert batch.done
        assert batch.quiesced
        assert batch.failures == ()
    assert here.describe()["peers"] == {}
    until(lambda: held() == before, "all given back here")
    until(lambda: pair.far(there.connections) == 0, "the end of all connections, there")
    for refused in (lambda: here.write(old, pair.local.address, pair.place.base, 64), lambda: here.forget(old)):
        with pytest.raises(UsageError, match=r"was forgotten; give its name, or connect\(\) again"):
            refused()
    with pytest.raises(UsageError, match="is not connected to"):
        here.forget(pair.peer)
    pair.data[:] = 7
    pair.write(0, 0, MiB).wait(20).close()
    assert (pair.there() == 7).all()
    assert here.connect(pair.peer) is not old
    here.close()
    assert_balanced(here)


def test_forget_ends_what_is_under_way_and_nothing_is_left_of_it(join, wire):
    pair = join(wire, 4 * MiB, workers=2)
    at = np.arange(63, dtype=np.int64) * 65_537
    batches = [pair.write(at, None, 65_536) for _ in range(200)]
    pair.here.forget(pair.peer)
    for batch in batches:
        with batch:
            assert batch.done
            assert batch.quiesced
            assert {failure.status for failure in batch.failures} <= {Status.PEER_GONE}
    pair.write(0, 0, MiB).wait(20).close()
    pair.here.close()
    assert_balanced(pair.here)


def test_forget_beside_submits_by_name_loses_none(join, wire):
    """Those that come in between connect anew; none is taken for another peer's."""
    pair = join(wire, MiB)
    stop, rounds, failed = threading.Event(), [], []

    def submit() -> None:
        while not stop.is_set():
            try:
                pair.write(0, 0, 64 * KiB).wait(20).close()
                rounds.append(1)
            except TransferFailed as error:
                failed.extend(failure.status for failure in error.failures)

    task = Task(submit)
    for _ in range(20):
        seen = len(rounds)
        until(lambda seen=seen: len(rounds) > seen or not task.running, "a batch that arrived")
        with suppress(UsageError):  # the thread has not connected anew yet
            pair.here.forget(pair.peer)
    stop.set()
    task.result()
    assert set(failed) <= {Status.PEER_GONE}
    assert len(pair.here._peers.vacant) + len(set(pair.here._peers.known.values())) == pair.here._settings.peers


# ------------------------------------------------------------------------------ many peers
@pytest.mark.parametrize("provider", [*NETWORKED, "loopback", "emulated"])
def test_peers_that_are_gone_make_room_for_others(engines, provider):
    here = engines(provider=provider, peers=2)
    region = here.register(np.full(KiB, 5, np.uint8))

    def once() -> None:
        with Engine(provider=provider, slices=1024, batches=16, peers=2) as short:
            data = short.allocate(KiB)
            place = short.register(data)
            peer = here.connect(short.address or short.name)
            here.write(peer, region.address, place.address, KiB).wait(20).close()
            assert (data == 5).all()
        with pytest.raises(MooncacheError):
            here.write(peer, region.address, place.address, KiB, timeout=1).wait(20)

    for _ in range(4):
        once()
    before = there.usage()
    rows = here._state.worker_rows["queue_count"].copy()
    for _ in range(30):
        once()
    until(lambda: there.usage().descriptors <= before.descriptors, "descriptors, given back")
    assert (here._state.worker_rows["queue_count"] == rows).all()
    assert len(here._peers.known) <= 2
    here.close()


def test_a_peer_that_is_there_never_makes_room(engines):
    here = engines(provider="tcp", peers=2)
    others = [engines(provider="tcp") for _ in range(3)]
    peers = [here.connect(other.address) for other in others[:2]]
    with pytest.raises(CapacityError, match=r"is connected to 2 peers, as many as it may: forget\(\) those"):
        here.connect(others[2].address)
    assert not any(peer.forgotten for peer in peers)
    here.forget(peers[0])
    here.connect(others[2].address)
    assert [peers[0].forgotten, peers[1].forgotten] == [True, False]


@pytest.mark.parametrize("provider", ["tcp", "loopback"])
def test_how_many_peers_is_a_setting_that_the_wire_follows(engines, provider):
    here = engines(provider=provider, peers=limits.PEERS + 1)
    assert all(port.queues.size >= limits.PEERS + 1 for port in here.provider.lists)
    here._peers.vacant = [limits.PEERS]  # as if all others were had
    other = engines(provider=provider)
    target = np.zeros(KiB, np.uint8)
    place, local = other.register(target), here.register(np.full(KiB, 3, np.uint8))
    here.write(other.address or other.name, local.address, place.address, KiB).wait(20).close()
    assert (target == 3).all()


# ------------------------------------------------------------------------------ steps that fail
def failing_after(function, calls: int, error: Exception):
    """The function, but the call after so many raises."""
    left = [calls]

    def call(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return function(*arguments, **options)

    return call


STEPS = {
    "own lane": (connections.Port, "reserve", 0, CapacityError("no lane")),
    "own lane of the second worker": (connections.Port, "reserve", 1, CapacityError("no lane")),
    "queue memory": (connections.StreamQueue, "__init__", 1, MemoryError()),
    "rows": (State, "_check_room", 0, CapacityError("no row")),
    "region slots": (Peer, "refresh", 0, CapacityError("no slot")),
    "mapping": (mappings, "Mapping", 1, OSError(12, "no memory")),
    "mapping of the last": (mappings, "Mapping", 2, OSError(12, "no memory")),
}


@pytest.mark.parametrize("step", STEPS)
@over("tcp", "mapped", "auto")
def test_a_step_of_connecting_that_fails_leaves_things_as_they_were(engines, far, wire, monkeypatch, step):
    owner, name, calls, error = STEPS[step]
    if "mapping" in step and not wire.mapped:
        pytest.skip("nothing is mapped over tcp")
    here = engines(provider=wire.provider, workers=2)
    data = here.allocate(MiB)
    local = here.register(data)
    place = far(there.target, MiB, provider=wire.provider, mapped=wire.mapped, seed=1)
    before = held()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_after(getattr(owner, name), calls, error))
        with pytest.raises((MooncacheError, MemoryError)):
            here.connect(place.address)
    until(lambda: held() == before, "all given back")
    until(lambda: far(there.connections) == 0, "all given back there")
    assert here.describe()["peers"] == {}
    assert len(here._peers.vacant) == here._settings.peers
    assert here._state.queues == {}
    here.read(place.address, place.base, local.address, MiB).wait(20).close()
    assert data.tobytes() == far(there.read)


@pytest.mark.parametrize("provider", NETWORKED)
def test_connecting_with_few_descriptors_left_succeeds_or_leaves_nothing(far, fars, provider):
    """With each number of descriptors from none on, until it succeeds."""
    address = far(there.open_engine, provider=provider)
    trying = fars()
    trying(there.open_engine, provider=provider, workers=2)
    trying(there.try_connect, "127.0.0.1:1")  # whatever is made once
    before = trying(there.usage).descriptors
    for more in range(40):
        trying(there.limit_descriptors, before - 1 + more)
        error = trying(there.try_connect, address)
        trying(there.limit_descriptors, None)
        if error is None:
            return
        until(lambda: trying(there.usage).descriptors == before, error)
        until(lambda: far(there.connections) == 0, "all given back there")
    raise AssertionError(error)


# ------------------------------------------------------------------------------ ports
def test_lanes_go_where_there_are_fewest_and_a_full_engine_says_so_in_the_handshake(engines, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(limits, "LANES", 3)
        target = engines(provider="tcp", workers=2)
    callers = [engines(provider="tcp") for _ in range(8)]
    ports = target.provider.ports
    (lane,) = ports[0].reserve(1)  # as if somebody had it
    for caller in callers[:5]:
        caller.connect(target.address)
    assert sorted(port.load for port in ports) == [3, 3]
    with pytest.raises(CapacityError, match="serves at most 3 connections, and all are in use: give the engine more"):
        callers[5].connect(target.address)
    ports[0].release([lane])
    callers[6].connect(target.address)
    callers[0].forget(target.address)
    until(lambda: sum(port.load for port in ports) == 5, "a lane, free")
    callers[7].connect(target.address)  # not the one that was refused, which pauses before it tries again


def test_a_lane_whose_caller_hung_up_before_the_answer_is_free_again(engines):
    target = engines(provider="tcp")
    body = {"lanes": connections.lanes.FRAMES_VERSION, "queue": 7, "round": 1}
    reply = target.provider.serve(Request("lane", "a caller", 1, body, False))
    assert [port.load for port in target.provider.ports] == [1]
    reply.give_up()
    assert [port.load for port in target.provider.ports] == [0]
