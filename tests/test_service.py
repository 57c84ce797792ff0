"""How engines find each other: by address, and by name in this process or in a store. Real servers, real processes."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mooncache import DiscoveryError, Engine, TransferFailed, TransportError, UsageError, service
from mooncache.descriptor import Descriptor
from mooncache.directory import directory
from mooncache.discovery.base import LEASE_S, Names
from mooncache.discovery.record import decode, encode
from mooncache.discovery.stores import open_names
from mooncache.errors import Status
from mooncache.providers.stream import waiting
from tests.helpers import LIMIT, SMALL, in_threads, random_bytes, until
from tests.servers import Server, free_ports, has_ipv6
from tests.wires import there
from tests.wires.processes import Far, Nursery

NBYTES = 1 << 16
SHORT = 1.0  # seconds: etcd has no shorter leases
_numbers = itertools.count()


# ------------------------------------------------------------------------------ in other processes
def open_named(name: str, url: str, provider: str, lease: float) -> there.Place:
    """An engine announced in a store, with one region."""
    service.LEASE_S = lease
    there.engines["it"] = Engine(name, provider=provider, discovery=url, **SMALL)
    there.hold(NBYTES)
    return there.register()


def generation() -> int:
    return there.engines["it"].generation


def write_back(peer: str, address: int) -> None:
    """Write what is here to another engine."""
    engine, region = there.engines["it"], there.regions["it"]
    engine.write(peer, region.address, address, region.length).wait(LIMIT).close()


def withdraw() -> None:
    names_of(there.engines["it"]).withdraw()


class Target:
    """Such an engine in a process of its own."""

    def __init__(self, far: Far, name: str, url: str, provider: str, lease: float) -> None:
        self.far, self.name = far, name
        self.place = far(open_named, name, url, provider, lease)
        self.generation: int = far(generation)

    def holds(self, content: np.ndarray) -> bool:
        return bool(self.far(there.read) == content.tobytes())


# ------------------------------------------------------------------------------ fixtures
@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def targets(nursery: Nursery, server: Server) -> Iterator[Callable[..., Target]]:
    """Makes targets, and ends them all."""
    fars: list[Far] = []

    def make(name: str, provider: str = "tcp", lease: float = LEASE_S) -> Target:
        fars.append(nursery.fork())
        return Target(fars[-1], name, server.url, provider, lease)

    yield make
    for far in fars:
        far.kill()


@pytest.fixture
def here(engines: Callable[..., Engine], server: Server) -> Callable[..., Sender]:
    """Makes engines of this process that look names up in the store."""
    return lambda name=None, **options: Sender(
        engines(name, **{"provider": "tcp", "discovery": server.url, **options})
    )  # fmt: skip


@pytest.fixture
def store(server: Server) -> Iterator[Names]:
    """The store as the test sees it."""
    names = open_names(server.url)
    yield names
    names.close()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of this process take short leases."""
    monkeypatch.setattr(service, "LEASE_S", SHORT)


class Sender:
    """An engine with one region, whose content changes with every write."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.memory = np.zeros(NBYTES, np.uint8)
        self.region = engine.register(self.memory)

    def begin(self, target: Target, called: str | None = None) -> Any:
        self.memory[:] = random_bytes(NBYTES, next(_numbers))
        return self.engine.write(called or target.name, self.region.address, target.place.base, NBYTES)

    def write(self, target: Target, called: str | None = None) -> None:
        """Write everything to a target, wherever its name leads, and see that it is there."""
        with self.begin(target, called) as batch:
            batch.wait(LIMIT)
        assert target.holds(self.memory)


def fresh(name: str) -> str:
    """A name that no other test uses."""
    return f"{name}-{next(_numbers)}"


def names_of(engine: Engine) -> Names:
    assert engine._service is not None
    assert engine._service._names is not None
    return engine._service._names


def announced(store: Names, name: str) -> Descriptor | None:
    record = store._fetch(name)
    return None if record is None else decode(record, name)


def told(engine: Engine, name: str) -> int | None:
    """What the store has told an engine about a name."""
    assert engine._service is not None
    return engine._service._latest.get(name)


# ------------------------------------------------------------------------------ by name, through a store
@pytest.mark.parametrize("provider", ["tcp", "auto"])
def test_engines_of_two_processes_call_each_other_by_name(targets, here, provider):
    target = targets(fresh("decode"), provider)
    sender = here(fresh("prefill"), provider=provider)
    sender.write(target)
    sender.memory[:] = 0
    target.far(there.fill, 7)
    target.far(write_back, sender.engine.name, sender.region.address)
    assert (sender.memory == 7).all()
    described = sender.engine.describe()
    wire = described["peers"].pop(target.name)
    assert wire == "tcp" if provider == "tcp" else wire.startswith("shm")
    assert described == {
        "name": sender.engine.name,
        "generation": sender.engine.generation,
        "address": sender.engine.address,
        "provider": sender.engine.provider.name,
        "regions": [{"address": sender.region.address, "length": NBYTES, "access": "both"}],
        "peers": {},
    }


def test_the_record_says_where_and_what_but_holds_no_keys(here, store):
    engine = here(fresh("keyless")).engine
    until(lambda: announced(store, engine.name).regions, "the region in the record")
    record, own = store._fetch(engine.name), engine.descriptor()
    keyless = tuple(region._replace(rkeys=()) for region in own.regions)
    assert decode(record, "it") == replace(own, regions=keyless)
    assert not any(str(region.rkeys[0]).encode() in record for region in own.regions)


def test_regions_that_come_and_go_later_show_in_the_record_many_at_once(here, store):
    sender = here(fresh("grows"))
    engine, names = sender.engine, names_of(sender.engine)
    published = []
    publish = names._publish
    names._publish = lambda *a, **o: (published.append(1), publish(*a, **o))[1]  # type: ignore[method-assign]
    memory = np.zeros(100 * 64, np.uint8)
    with names._writing:  # the keeper has to wait
        regions = [engine.register(memory[64 * i : 64 * (i + 1)]) for i in range(100)]
    until(lambda: len(announced(store, engine.name).regions) == 101, "all regions")
    assert len(published) <= 3  # the sender's own, what was being written meanwhile, and all the rest
    for region in regions:
        region.unregister()
    until(lambda: [r.address for r in announced(store, engine.name).regions] == [sender.region.address], "one region")


def test_a_closed_engine_leaves_the_store_and_may_come_back(here, store):
    name = fresh("comes-back")
    for _ in range(2):
        engine = here(name).engine
        assert announced(store, name).generation == engine.generation
        engine.close()
        assert announced(store, name) is None


def test_a_forgotten_engine_is_collected_though_it_watches_names(targets, server, store):
    other, name = targets(fresh("watched")), fresh("forgotten")
    engine = Engine(name, provider="tcp", discovery=server.url, **SMALL)
    engine.connect(other.name)
    until(lambda: told(engine, other.name), "the watch at work")
    reference, engine = weakref.ref(engine), None
    until(lambda: gc.collect() is not None and reference() is None, "the engine collected")
    until(lambda: announced(store, name) is None, "its record gone")


def test_a_killed_process_is_forgotten_when_its_lease_ends(targets, here, store):
    target = targets(fresh("killed"), lease=SHORT)
    assert announced(store, target.name).generation == target.generation
    target.far.kill()
    until(lambda: announced(store, target.name) is None, "the end of the lease")
    with pytest.raises(DiscoveryError, match=f"no engine named '{target.name}' at"):
        here().engine.connect(target.name)


def test_a_process_restarted_under_its_name_elsewhere_is_reached_by_who_was_connected(targets, here):
    before = targets(fresh("restarts"))
    sender = here()
    sender.write(before)
    before.far.stop()
    running = sender.begin(before)
    before.far.kill()
    with pytest.raises(TransferFailed, match=before.name) as failed:
        running.wait(LIMIT)
    assert {failure.status for failure in failed.value.failures} == {Status.PEER_GONE}
    after = targets(before.name)  # long before the lease of the first one ends
    assert (after.place.address, after.generation) != (before.place.address, before.generation)
    sender.write(after)
    assert sender.engine.connect(after.name).generation == after.generation


def test_a_restart_that_nobody_noticed_costs_one_batch_at_most(targets, here):
    sender, before = here(), targets(fresh("restarts"))
    sender.write(before)
    before.far.kill()
    after = targets(before.name)
    statuses = set()
    try:
        sender.write(after)
    except TransferFailed as failed:
        statuses = {failure.status for failure in failed.failures}
        sender.write(after)
    assert statuses <= {Status.PEER_GONE}


def test_the_last_of_two_engines_with_one_name_has_it_and_the_one_before_says_so(targets, here):
    first = targets(fresh("twice"), lease=SHORT)
    second = targets(first.name)
    here().write(second)
    until(lambda: first.far(there.logged, "taken over"), "the warning")
    assert not second.far(there.logged, "taken over")
    first.far(there.close)  # which takes nothing away from the second
    here().write(second)


def test_a_name_that_is_not_there_is_refused_with_similar_ones(here):
    there_is = here(fresh("decode-mind"))
    missing = there_is.engine.name.replace("mind", "mint")
    with pytest.raises(DiscoveryError, match=rf"no engine named '{missing}' at \w+://.*{there_is.engine.name}"):
        here().engine.connect(missing)


def test_a_record_whose_address_is_another_engines_by_now_is_refused(here, store):
    now_there, asks = here(fresh("newcomer")).engine, here().engine
    stale = replace(now_there.descriptor(), name=fresh("ended"))
    store._publish(stale.name, stale.generation, encode(stale, keys=False), take=True)
    with pytest.raises(DiscoveryError, match=f"{now_there.address} .*'{stale.name}'.* '{now_there.name}' answers"):
        asks.connect(stale.name)
    store._remove(stale.name, stale.generation)


# ------------------------------------------------------------------------------ names that change hands
@pytest.mark.parametrize("former", ["ends", "stays"])
@pytest.mark.parametrize("provider", ["tcp", "auto"])
def test_a_name_taken_over_is_noticed_without_traffic_and_what_is_under_way_goes_on(targets, here, former, provider):
    first = targets(fresh("moves"), provider)
    sender = here(provider=provider)
    sender.write(first)
    peer = sender.engine.connect(first.name)
    first.far.stop()
    running = sender.begin(first)
    second = targets(first.name, provider)
    until(lambda: peer.gone, "the news")
    first.far.go_on()
    running.wait(LIMIT).close()
    assert first.holds(sender.memory)
    if former == "ends":
        first.far.kill()
    sender.write(second)
    assert peer.generation == second.generation
    assert not peer.gone
    sender.write(second)


def test_a_former_owner_of_a_name_that_moves_nothing_more_is_left_behind(targets, here, monkeypatch):
    monkeypatch.setattr(waiting, "SETTLE_S", 0.2)
    first, sender = targets(fresh("hangs")), here()
    sender.write(first)
    peer = sender.engine.connect(first.name)
    first.far.stop()
    running = sender.begin(first)
    second = targets(first.name)
    until(lambda: peer.gone, "the news")
    sender.write(second)
    with pytest.raises(TransferFailed, match=first.name) as failed:
        running.wait(LIMIT)
    assert {failure.status for failure in failed.value.failures} == {Status.PEER_GONE}


def test_a_broken_connection_whose_row_another_has_taken_is_made_anew(engines):
    here, name = engines(provider="tcp"), fresh("returns")
    before = engines(name, provider="tcp")
    transfers(here, before, name)
    peer = here.connect(name)
    before.close()
    until(lambda: peer.gone and all(lane.free for port in here.provider.ports for lane in port.lanes), "its end")
    other = engines(provider="tcp")
    transfers(other, here, here.address)  # over a row of `here` that is free again
    after = engines(name, provider="tcp")
    transfers(here, after, name)
    transfers(other, here, here.address)


def test_a_name_that_goes_away_leaves_its_connections_alone(targets, here):
    target = targets(fresh("withdraws"))
    sender = here()
    sender.write(target)
    until(lambda: told(sender.engine, target.name) == target.generation, "the name")
    target.far(withdraw)
    until(lambda: told(sender.engine, target.name) is None, "its end")
    assert not sender.engine.connect(target.name).gone
    sender.write(target)


def test_a_name_taken_over_while_it_is_being_connected_to_is_connected_to_again(here, monkeypatch):
    there_is, sender = here(fresh("slips")).engine, here()
    serving = sender.engine._service
    dial = serving.dial

    def late(*arguments: Any, **options: Any) -> Any:
        serving._told(there_is.name, there_is.generation + 1)
        return dial(*arguments, **options)

    monkeypatch.setattr(serving, "dial", late)
    peer = sender.engine.connect(there_is.name)
    assert peer.gone  # the next submit looks again
    monkeypatch.setattr(serving, "dial", dial)
    sender.engine.connect(there_is.name)
    assert not peer.gone


def test_two_names_of_one_engine_may_be_of_two_engines_after_a_restart(targets, here):
    before, sender = targets(fresh("moves-on")), here()
    address = before.place.address
    sender.write(before, called=address)
    sender.write(before)
    assert sender.engine.connect(before.name) is sender.engine.connect(address)
    before.far.kill()
    after = targets(before.name)
    assert after.place.address != address
    with contextlib.suppress(TransferFailed, TransportError, UsageError):
        sender.begin(after).wait(LIMIT)  # the first may find the old one gone
    sender.write(after)
    with pytest.raises(TransportError, match=f"{address} refused"):
        sender.engine.write(address, sender.region.address, after.place.base, NBYTES)


# ------------------------------------------------------------------------------ stores that are down
@pytest.mark.parametrize("scheme", ["redis", "etcd"])
def test_a_store_that_is_down_at_the_start_is_named_and_nothing_is_left_behind(scheme):
    url = f"{scheme}://127.0.0.1:{free_ports(1)[0]}"

    def open_one() -> None:
        with pytest.raises(DiscoveryError, match=rf"{url} cannot be asked .*is it up, and this its address"):
            Engine("too-early", provider="tcp", discovery=url, **SMALL)

    leaves_nothing_behind(open_one)


def test_while_the_store_is_down_known_peers_are_reached_and_unknown_names_refused(targets, here, server, store, short):
    sender = here(fresh("outlasts"))
    known = targets(fresh("known"), lease=SHORT)
    sender.write(known)
    known.far.stop()
    running = sender.begin(known)
    server.kill()
    try:
        with pytest.raises(DiscoveryError, match=rf"{server.url} cannot be asked"):
            sender.engine.connect("somebody-else")
        assert not running.done
        known.far.go_on()
        running.wait(LIMIT).close()
        assert known.holds(sender.memory)
        sender.write(known)
        known.far(there.hold, NBYTES, name="later")
        known.place = known.far(there.register, "later")  # so it has to be looked at again
        sender.memory[:] = random_bytes(NBYTES, next(_numbers))
        sender.engine.write(known.name, sender.region.address, known.place.base, NBYTES).wait(LIMIT).close()
        assert known.far(there.read, "later") == sender.memory.tobytes()
    finally:
        server.start()
    until(lambda: announced(store, sender.engine.name), "the record published again")
    assert announced(store, sender.engine.name).generation == sender.engine.generation
    until(lambda: announced(store, known.name), "the other's")
    here().engine.connect(known.name)


# ------------------------------------------------------------------------------ without a store
def leaves_nothing_behind(attempt: Callable[[], None]) -> None:
    """Threads, descriptors and the name are given back by an engine that could not be opened."""
    attempt()  # what is loaded at the first use may stay
    gc.collect()
    names = {engine.name for engine in directory.engines()}
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    attempt()
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    assert {engine.name for engine in directory.engines()} == names


def pages(engine: Engine, value: int = 0) -> tuple[np.ndarray, int]:
    """Registered memory, and its address."""
    memory = np.full(4096, value, np.uint8)
    return memory, engine.register(memory).address


def transfers(source: Engine, target: Engine, called: str) -> None:
    """Bytes from one engine to another arrive."""
    value = next(_numbers) % 255 + 1
    _, local = pages(source, value)
    memory, remote = pages(target)
    source.write(called, local, remote, 4096).wait(LIMIT).close()
    assert (memory == value).all()


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"discovery": "carrier://pigeon"}, UsageError, "expected the URL of a store of names"),
        ({"listen": "nonsense"}, UsageError, "expected an address such as"),
        ({"listen": "0.0.0.0:0"}, UsageError, "without a secret anybody"),
        ({"listen": "0.0.0.0:0", "discovery": "etcd://127.0.0.1:1"}, UsageError, "without a secret anybody"),
        ({"listen": "no-such-host.invalid:0"}, TransportError, "unknown host"),
        ({"secret": ""}, UsageError, "expected a secret of at least 6 bytes, got 0"),
        ({"secret": 5}, UsageError, "expected the secret to be None, text or bytes, got int"),
        ({"name": "host:port"}, UsageError, "printable characters without ':'"),
        ({"name": ""}, UsageError, "1 to 255 printable characters"),
    ],
)
def test_what_cannot_be_opened_is_refused_and_leaves_nothing_behind(options, kind, says):
    def open_one() -> None:
        with pytest.raises(kind, match=says):
            Engine(**{"name": "refused", "provider": "tcp", **SMALL, **options})

    leaves_nothing_behind(open_one)


def test_a_port_in_use_is_refused_and_leaves_nothing_behind(engines):
    taken = engines(provider="tcp").address

    def open_one() -> None:
        with pytest.raises(TransportError, match=f"cannot listen at {taken}: Address already in use; another port"):
            Engine("too-late", provider="tcp", listen=taken, **SMALL)

    leaves_nothing_behind(open_one)


def test_a_name_without_a_store_is_refused_saying_what_to_do(engines):
    with pytest.raises(DiscoveryError, match="host:port, or give both engines the same discovery='redis://"):
        engines(provider="tcp").connect("decode-0")


def test_a_name_of_this_process_that_no_network_reaches_is_refused(engines):
    engines("only-here", provider="loopback")
    with pytest.raises(TransportError, match="'only-here' uses a provider that reaches engines of this process only"):
        engines(provider="tcp").connect("only-here")


@pytest.mark.parametrize("by_name_first", [True, False])
def test_an_engine_is_one_peer_by_name_and_by_address(engines, by_name_first):
    a, b = engines("a", provider="tcp"), engines("b", provider="tcp")
    called = ["b", b.address] if by_name_first else [b.address, "b"]
    peers = [a.connect(name) for name in called]
    assert peers[0] is peers[1]
    assert a.describe()["peers"] == {called[0]: "tcp"}
    for name in called:
        transfers(a, b, name)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_ipv6_addresses_are_written_in_brackets(engines):
    a, b = engines(provider="tcp", listen="[::1]:0"), engines(provider="auto", listen="[::1]:0")
    assert b.address.startswith("[::1]:")
    transfers(a, b, b.address)
    transfers(b, a, a.name)


def test_a_secret_is_the_same_as_text_and_as_bytes(engines):
    a, b = engines(provider="tcp", secret="pässword"), engines(provider="tcp", secret="pässword".encode())
    transfers(a, b, b.address)
    transfers(b, a, a.address)


@pytest.mark.parametrize(
    ("secret", "says"), [(b"another", "did not prove|do not know|differ"), (None, "has a secret and")]
)  # fmt: skip
def test_another_secret_or_none_is_refused_and_nothing_is_connected(engines, secret, says):
    a, b = engines(provider="tcp", secret=secret), engines(provider="tcp", secret="the right one")
    with pytest.raises(DiscoveryError, match=says):
        a.connect(b.address)
    assert a.describe()["peers"] == {}


def test_an_engine_bound_to_all_addresses_says_the_one_it_was_told_to(engines):
    a = engines(provider="tcp", listen="0.0.0.0:0", secret="long enough", advertise="127.0.0.1")
    b = engines(provider="tcp", listen="0.0.0.0:0", secret="long enough", advertise="localhost")
    assert a.address.startswith("127.0.0.1:")
    assert b.address.startswith("localhost:")
    transfers(a, b, b.address)
    transfers(b, a, a.name)
    assert engines(provider="tcp", listen="0.0.0.0:0", insecure=True).address  # it is what was asked for


@pytest.mark.parametrize("provider", ["tcp", "shm", "auto"])
def test_an_address_that_answered_is_not_replaced_by_the_one_advertised(engines, provider):
    a = engines(provider=provider)
    b = engines(provider=provider, advertise="127.0.0.1:1")  # as behind a mapping of ports that leads in from outside
    assert b.address == "127.0.0.1:1"
    transfers(a, b, b.near)
    transfers(a, b, b.name)


@pytest.mark.parametrize("provider", ["tcp", "shm"])
def test_engines_that_connect_to_each_other_at_the_same_time_both_succeed(engines, monkeypatch, provider):
    a, b = engines("a", provider=provider), engines("b", provider=provider)
    meeting = threading.Barrier(2)

    def meet(dial: Callable[..., Any]) -> Callable[..., Any]:
        def call(address: str, purpose: str, *arguments: Any, **options: Any) -> Any:
            if purpose == "lane":  # both are within `connect` before either is answered
                meeting.wait(LIMIT)
            return dial(address, purpose, *arguments, **options)

        return call

    for engine in (a, b):
        monkeypatch.setattr(engine._service, "dial", meet(engine._service.dial))
    in_threads(lambda: transfers(a, b, "b"), lambda: transfers(b, a, "a"))


@pytest.mark.usefixtures("descriptors")
def test_thirty_engines_of_one_process_all_reach_each_other(engines):
    n, options = 30, {"provider": "tcp", "slices": 16384, "peers": 30}
    all_of_them = [engines(f"one-of-many-{i}", **options) for i in range(n)]
    sources = [pages(engine, i + 1) for i, engine in enumerate(all_of_them)]
    targets = [pages(engine) for engine in all_of_them]
    batches = [
        source.write(target.name, sources[i][1], targets[k][1] + 64 * i, 64)
        for i, source in enumerate(all_of_them)
        for k, target in enumerate(all_of_them)
    ]
    for batch in batches:
        batch.wait(LIMIT).close()
    expected = np.repeat(np.arange(1, n + 1, dtype=np.uint8), 64)
    for memory, _ in targets:
        np.testing.assert_array_equal(memory[: 64 * n], expected)
