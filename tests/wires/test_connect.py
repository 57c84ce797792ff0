"""Finding and reaching peers, and not reaching them; what a process holds meanwhile."""

from __future__ import annotations

import contextlib
import gc
import re
import socket
import threading

import numpy as np
import pytest

from mooncache import CapacityError, DiscoveryError, Engine, MooncacheError, TransportError, UsageError
from mooncache.providers.stream import connections
from mooncache.providers.stream.lane import FRAMES_VERSION
from tests.helpers import SMALL, Task, until
from tests.wires import there
from tests.wires.conftest import over

KiB, MiB = 1 << 10, 1 << 20


# ------------------------------------------------------------------------------ secrets and addresses
@pytest.mark.parametrize("provider", ["tcp", "shm", "auto"])
def test_engines_that_share_a_secret_transfer_both_ways(engines, far, provider):
    here = engines(provider=provider, secret="open sesame")
    place = far(there.target, MiB, provider=provider, secret=b"open sesame", seed=3)
    array = np.zeros(MiB, np.uint8)
    local = here.register(array)
    here.read(place.address, place.base, local.address, MiB).wait(20).close()
    assert array.tobytes() == far(there.read)
    array[:] = 0
    far(there.send, here.address, local.address, MiB)
    assert array.tobytes() == far(there.read)


@pytest.mark.parametrize("provider", ["tcp", "shm", "auto"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("the right one", "a wrong one"), ("the right one", None), (None, "the right one")]
)
def test_another_secret_or_none_is_a_discovery_error_that_names_peer_and_cure(engines, far, provider, ours, theirs):
    here = engines(provider=provider, secret=ours)
    address = far(there.open_engine, provider=provider, secret=theirs)
    with pytest.raises(DiscoveryError, match=f"{address}.*(the same one|start both engines with the same one)"):
        here.connect(address)
    with pytest.raises(DiscoveryError, match=f"{here.address}.*the same one"):
        far(there.connect, here.address)
    far(there.close)
    address = far(there.open_engine, provider=provider, secret=ours)
    here.connect(address)  # and nothing is left of that


def test_an_open_port_needs_a_secret_or_to_be_meant(engines):
    with pytest.raises(UsageError, match=r"set a secret, bind to 127\.0\.0\.1, or say insecure=True"):
        engines(provider="tcp", listen="0.0.0.0:0")
    engines(provider="tcp", listen="0.0.0.0:0", insecure=True)
    engines(provider="tcp", listen="0.0.0.0:0", secret="long enough")


def test_a_port_in_use_is_a_transport_error_and_leaves_nothing(engines, far):
    address = far(there.open_engine, provider="tcp")
    before = there.usage().descriptors
    for _ in range(3):
        with pytest.raises(TransportError, match=f"cannot listen at {address}: .*in use; another port"):
            engines("named", provider="tcp", listen=address)
    assert there.usage().descriptors == before
    engines("named", provider="tcp")  # not even its name is taken


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("nobody", DiscoveryError, "no engine named 'nobody' in this process.*host:port"),
        ("host.invalid:7000", DiscoveryError, "host 'host.invalid' of host.invalid:7000 is unknown"),
        ("127.0.0.1:1", TransportError, "127.0.0.1:1 refused the connection; is the engine there open"),
        ("127.0.0.1:seven", UsageError, "expected an address such as"),
        ("127.0.0.1:99999", UsageError, "expected a port of at most 65535"),
    ],
)
@pytest.mark.parametrize("provider", ["tcp", "auto"])
def test_peers_that_are_not_there_are_typed_errors(engines, provider, name, error, says):
    here = engines(provider=provider)
    local = here.register(np.zeros(64, np.uint8))
    with pytest.raises(error, match=says):
        here.write(name, local.address, 4096, 64)
    assert here.describe()["peers"] == {}


def test_a_port_where_something_else_listens_is_a_discovery_error(engines):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        connecting = Task(engines(provider="tcp").connect, address)
        with server.accept()[0] as sock:
            sock.sendall(b"220 mail.example.com ESMTP ready\r\n")
            with pytest.raises(DiscoveryError, match="this is no handshake of Mooncache"):
                connecting.result()


@pytest.mark.parametrize("provider", ["tcp", "shm", "auto"])
def test_peers_that_speak_other_frames_are_refused_on_both_sides(engines, far, provider):
    far(there.speak, FRAMES_VERSION + 1)
    here, address = engines(provider=provider), far(there.open_engine, provider=provider)
    with pytest.raises(TransportError, match=f"{address}.*speaks other frames.*of one release on both ends"):
        here.connect(address)
    with pytest.raises(TransportError, match=f"{here.address}.*speaks other frames"):
        far(there.connect, here.address)


def test_an_engine_of_the_other_wire_is_reached_by_what_both_have(engines, far):
    """tcp and auto meet over TCP; shm alone says what to do."""
    address = far(there.open_engine, provider="tcp")
    far(there.hold, KiB)
    place = far(there.register)
    for provider in ("tcp", "auto"):
        here = engines(provider=provider)
        local = here.register(np.full(KiB, 9, np.uint8))
        here.write(address, local.address, place.base, KiB).wait(20).close()
        assert here.describe()["peers"] == {address: "tcp"}
    with pytest.raises(TransportError, match=f"{address} cannot be reached by shared memory.*use auto or tcp"):
        engines(provider="shm").connect(address)


# ------------------------------------------------------------------------------ refused by the system
@pytest.mark.parametrize("provider", ["shm", "auto"])
def test_memory_of_a_process_that_may_not_be_touched_goes_by_connection(engines, far, provider):
    """The other process has no privileges, so the system really refuses; allocated memory is mapped all the same."""
    secret = "of two users alike"
    here = engines(provider=provider, secret=secret)
    ordinary, mapped = np.zeros(MiB, np.uint8), here.allocate(MiB)
    regions = [here.register(ordinary), here.register(mapped)]
    far(there.open_engine, provider=provider, secret=secret)
    if not far(there.drop_privileges):
        pytest.skip("needs to be root, else all processes of a test are of one user")
    far(there.hold, MiB, seed=5)
    far(there.register)
    for region, array in zip(regions, (ordinary, mapped), strict=True):
        far(there.send, here.address, region.address, MiB)
        assert array.tobytes() == far(there.read)
    assert far(there.describe)["peers"] == {here.address: "shm, other memory by tcp (Operation not permitted)"}
    (line,) = far(there.logged, "process_vm_readv is refused")
    assert here.address in line


# ------------------------------------------------------------------------------ descriptors
NO_DESCRIPTOR = r"all \d+ file descriptors that this process may have are in use; raise the limit \(ulimit -n"


@over("tcp", "mapped")
def test_an_initiator_without_descriptors_gets_a_typed_error_and_goes_on_later(engines, far, wire):
    here = engines(provider=wire.provider)
    array = here.allocate(KiB)
    region = here.register(array)
    place = far(there.target, KiB, provider=wire.provider, seed=8)
    held = far(there.usage).descriptors
    errors = []
    for more in range(30):  # from none left to as many as it takes
        far(there.limit_descriptors, held - 1 + more)
        errors.append(far(there.try_connect, here.address))
        if errors[-1] is None:
            break
    assert errors[-1] is None
    assert errors[:-1]
    for error in errors[:-1]:
        assert re.match(f"CapacityError: .*{NO_DESCRIPTOR}", error), error
    far(there.limit_descriptors, None)
    far(there.send, here.address, region.address, KiB)
    assert array.tobytes() == far(there.read)
    assert place.length == KiB


@pytest.mark.parametrize("provider", ["tcp", "shm"])
def test_an_engine_that_finds_no_descriptors_is_a_typed_error_and_leaves_nothing(far, provider):
    far(there.open_engine, "first", provider=provider)
    far(there.close, "first")
    held = far(there.usage).descriptors
    errors = []
    for more in range(40):
        far(there.limit_descriptors, held - 1 + more)
        error = far(there.try_open, provider)
        far(there.limit_descriptors, None)
        assert far(there.usage).descriptors == held, error
        errors.append(error)
        if error is None:
            break
    assert errors[-1] is None
    assert len(errors) > 5
    assert {error.split(":")[0] for error in errors[:-1]} <= {"TransportError", "CapacityError"}, errors


@pytest.mark.parametrize("provider", ["tcp", "auto"])
def test_a_target_without_descriptors_tells_who_connects_at_once_and_serves_them_when_it_has_some(fars, provider):
    here, target = fars(), fars()
    here(there.open_engine, provider=provider)
    place = target(there.target, KiB, provider=provider)
    target(there.limit_descriptors, target(there.usage).descriptors - 1)
    error = here(there.try_connect, place.address)
    assert re.match(f"CapacityError: .*{re.escape(place.address)} answers: .*{NO_DESCRIPTOR}", error), error
    assert any(re.search(NO_DESCRIPTOR, line) for line in target(there.trouble))
    target(there.limit_descriptors, None)
    until(lambda: here(there.try_connect, place.address) is None, "a connection")
    assert target(there.trouble) == ()


# ------------------------------------------------------------------------------ no growth
@over("tcp", "mapped", "process")
def test_peers_that_come_and_go_leave_nothing(far, wire):
    place = far(there.target, 64 * KiB, provider=wire.provider, mapped=wire.mapped)

    def once() -> None:
        with Engine(provider=wire.provider, **SMALL) as here:
            array = here.allocate(64 * KiB) if wire.mapped else np.zeros(64 * KiB, np.uint8)
            region = here.register(array)
            here.write(place.address, region.address, place.base, 64 * KiB).wait(20).close()

    for _ in range(60):
        once()
    settle(far)
    ours, theirs = there.usage(), far(there.usage)
    for _ in range(140):
        once()
    settle(far)
    assert_no_growth(ours, there.usage(), 24 * MiB)  # 140 engines would be 45
    assert_no_growth(theirs, far(there.usage), 24 * MiB)


def settle(far) -> None:
    """Until the other process has noticed that nobody is connected any more."""
    until(lambda: far(there.connections) == 0, "the end of all connections")


def assert_no_growth(before: there.Usage, after: there.Usage, more: int = 8 * MiB) -> None:
    assert after.within(before)
    assert after.resident <= before.resident + more


@over("tcp", "mapped")
def test_a_peer_that_is_opened_again_and_again_leaves_nothing(engines, far, wire):
    """At the same address each time, in the same process."""
    here = engines(provider=wire.provider)
    region = here.register(here.allocate(64 * KiB) if wire.mapped else np.zeros(64 * KiB, np.uint8))
    place = far(there.target, 64 * KiB, provider=wire.provider, mapped=wire.mapped)

    def once() -> None:
        base = far(there.reopen, place.address, provider=wire.provider, mapped=wire.mapped)
        with contextlib.suppress(MooncacheError):  # it may go to the former one
            here.write(place.address, region.address, base, 64 * KiB).wait(20)
        here.write(place.address, region.address, base, 64 * KiB).wait(20).close()

    for _ in range(60):
        once()
    ours, theirs = there.usage(), far(there.usage)
    for _ in range(150):
        once()
    assert_no_growth(ours, there.usage())
    # A forked process touches by and by what it has inherited; 150 engines would be 50 MiB.
    assert_no_growth(theirs, far(there.usage), 40 * MiB)


@pytest.mark.parametrize("provider", ["tcp", "shm", "auto"])
def test_a_forgotten_engine_closes_itself_and_leaves_no_thread_or_descriptor(engines, far, provider):
    place = far(there.target, KiB, provider=provider)
    gc.collect()
    threads, held = threading.active_count(), there.usage().descriptors
    for _ in range(3):
        engine = Engine(provider=provider, slices=1024, batches=16)
        region = engine.register(np.zeros(KiB, np.uint8))
        engine.write(place.address, region.address, place.base, KiB).wait(20).close()
        del engine, region

    def left() -> tuple[int, int]:
        gc.collect()  # again and again: it does nothing while another thread, an engine's own for one, collects
        return threading.active_count(), there.usage().descriptors

    until(lambda: left() == (threads, held), "the threads and descriptors, gone")


def test_more_peers_than_an_engine_may_have_are_refused(engines, far):
    here = engines(provider="tcp", peers=2)
    first, second, third = (far(there.open_engine, f"engine {k}", provider="tcp") for k in range(3))
    here.connect(first), here.connect(second)
    with pytest.raises(CapacityError, match=r"is connected to 2 peers, as many as it may: forget\(\)"):
        here.connect(third)
    assert here.connect(first).name == first


@pytest.mark.parametrize(("fixed", "tuned", "asked"), [(425_984, 6 << 20, False), (8 << 20, 4 << 20, True)])
def test_buffers_are_asked_for_only_where_the_system_would_tune_them_to_less(monkeypatch, fixed, tuned, asked):
    monkeypatch.setattr(connections, "buffers", lambda direction: connections.Buffers(fixed, tuned))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        before = [sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_SNDBUF, socket.SO_RCVBUF)]
        connections.set_lane_options(sock, ours=True)
        after = [sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_SNDBUF, socket.SO_RCVBUF)]
    assert (before != after) == asked
