"""Who may touch which memory, and until when: permissions, `unregister`, memory that comes and goes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading

import numpy as np
import pytest

from mooncache import CapacityError, Engine, TransferFailed, TransportError, UsageError
from mooncache.kernels import restartable
from mooncache.kernels.verbs import WcStatus
from mooncache.limits import REGIONS
from mooncache.providers.inprocess.emulated import Emulated, Nic
from mooncache.providers.inprocess.loopback import Loopback
from mooncache.providers.records import KEY
from mooncache.providers.shm.mappings import RESTARTS
from mooncache.providers.shm.provider import Shm
from mooncache.providers.stream import provider as stream
from mooncache.providers.stream.frames import Frame
from mooncache.providers.stream.tcp import Tcp
from mooncache.segments import allocate
from tests.helpers import Task, assert_balanced, random_bytes, until
from tests.wires import there
from tests.wires.conftest import OVER_SOCKETS, WIRES, over
from tests.wires.processes import Far
from tests.wires.raw import frame, lane_to, receive, receive_head

KiB, MiB = 1 << 10, 1 << 20


# ------------------------------------------------------------------------------ permissions
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_region_permits_peers_what_it_says_and_nothing_else(join, wire, access):
    pair = join(wire, 64 * KiB, there={"access": access})
    if access == "read":
        permitted, denied, doing = pair.read, pair.write, "writing"
    else:
        permitted, denied, doing = pair.write, pair.read, "reading"
    permitted(0, 0, 64 * KiB).wait(20).close()
    before = pair.data.copy()
    with pytest.raises(UsageError, match=f"does not permit {doing}"):
        denied(0, 0, 64)
    # One that believes to be permitted is refused by the target: over frames, and by the keys that are mapped here.
    pair.here._peers.known[pair.peer].table.access[:] = 7
    with denied(0, 0, 64) as batch, pytest.raises(TransferFailed, match="REMOTE_ACCESS"):
        batch.wait(20)
    assert (pair.data == before).all()
    expected = pair.there_at_first if access == "read" else before
    assert (pair.there() == expected).all()


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_region_permits_peers_of_the_other_side_the_same(join, wire, access):
    """The other process is the one that transfers."""
    pair = join(wire, 64 * KiB)
    ours = pair.here.allocate(4 * KiB) if wire.mapped else np.zeros(4 * KiB, np.uint8)
    ours[:] = 7
    region = pair.here.register(ours, access=access)
    denied = "write" if access == "read" else "read"
    with pytest.raises(UsageError, match="does not permit"):
        pair.far(there.send, pair.here.address, region.address, 4 * KiB, op=denied)
    assert (ours == 7).all()
    pair.far(there.send, pair.here.address, region.address, 4 * KiB, op="read" if access == "read" else "write")
    if access == "read":
        assert set(pair.far(there.read, last=4 * KiB)) == {7}
    else:
        assert (ours == pair.there()[: 4 * KiB]).all()


@pytest.mark.parametrize(("access", "kind"), [("read", Frame.WRITE), ("write", Frame.READ)])
def test_a_stranger_with_the_right_key_may_do_only_what_it_permits(far, access, kind):
    place = far(there.target, KiB, provider="tcp", access=access)
    key = far(there.key)
    with lane_to(place.address) as sock:
        sock.sendall(frame(kind, 0, [(place.base, 64, key)], bytes([1]) * 64 if kind == Frame.WRITE else b""))
        assert receive_head(sock).entries == [(0, WcStatus.REM_ACCESS_ERR, 0)]
        other = Frame.READ if kind == Frame.WRITE else Frame.WRITE
        if kind == Frame.READ:
            receive(sock, 8)
        sock.sendall(frame(other, 1, [(place.base, 64, key)], bytes([1]) * 64 if other == Frame.WRITE else b""))
        assert receive_head(sock).entries == []
    assert set(far(there.read)) == ({0} if access == "read" else {0, 1})


def test_reading_into_read_only_memory_is_refused(join, wire):
    pair = join(wire, 4 * KiB)
    memory = bytes(4 * KiB)
    region = pair.here.register(memory, access="read")
    with pytest.raises(UsageError, match="is read-only memory; read into a writable buffer"):
        pair.here.read(pair.peer, pair.place.base, region.address, 64)
    assert not any(memory)
    pair.here.write(pair.peer, region.address, pair.place.base, 64).wait(20).close()


# ------------------------------------------------------------------------------ unregister while in use
def test_after_unregister_no_byte_of_the_range_changes(join, wire):
    """Peers write into it from several threads and workers all the while."""
    pair = join(wire, MiB, there={"workers": 2})
    kept = pair.here.allocate(MiB) if wire.mapped else np.zeros(MiB, np.uint8)
    for block in (65_537, 4095, 1000):
        region = pair.here.register(kept)
        for _ in range(2):
            pair.far(there.hammer, pair.here.address, region.address, block=block, by_lanes=wire.by_lanes)
        until(lambda: min(pair.far(there.hammered)) > 2, "writes")
        Task(region.unregister).result()
        kept[:] = 170
        until(lambda: all(pair.far(there.failed)), "the end of the writes")
        for _, error, statuses, _ in pair.far(there.end_hammers):
            assert statuses == ["REMOTE_ACCESS"] or "has not registered all of it" in error, error
        pair.far(there.send, pair.here.address, pair.local.address, MiB)  # whatever was under way has come by now
        assert (kept == 170).all()


def test_what_peers_read_while_a_region_is_withdrawn_is_true_or_refused(join, wire):
    """Not one byte that was written after `unregister` is ever said to be what was read."""
    pair = join(wire, MiB, there={"workers": 2})
    pair.far(there.hold, MiB, name="copy", mapped=wire.mapped)
    pair.far(there.register, "copy")
    kept = pair.here.allocate(MiB) if wire.mapped else np.zeros(MiB, np.uint8)
    for block in (65_537, 4095):
        kept[:] = 85
        region = pair.here.register(kept)
        options = {"name": "copy", "block": block, "by_lanes": wire.by_lanes, "expected": 85}
        pair.far(there.hammer, pair.here.address, region.address, "read", **options)
        until(lambda: min(pair.far(there.hammered)) > 2, "reads")
        Task(region.unregister).result()
        kept[:] = 170
        until(lambda: all(pair.far(there.failed)), "the end of the reads")
        ((_, error, statuses, untrue),) = pair.far(there.end_hammers)
        assert statuses == ["REMOTE_ACCESS"] or "has not registered all of it" in error, error
        assert untrue == 0


@over(*OVER_SOCKETS)
def test_a_local_region_stays_registered_while_slices_are_out(join, wire):
    pair = join(wire, MiB)
    pair.far.stop()
    batch = pair.write(0, 0, MiB)
    with pytest.raises(UsageError, match="is in use by 16 slices; wait for their batches"):
        pair.local.unregister()
    assert pair.local.registered
    pair.far.go_on()
    batch.wait(20).close()
    pair.local.unregister()
    assert (pair.there() == pair.data).all()


# ------------------------------------------------------------------------------ guards of shared memory
@over("mapped", "process")
@pytest.mark.parametrize("end", [there.unregister, there.close], ids=["unregister", "close"])
def test_memory_is_not_given_back_while_a_peer_copies(join, wire, end):
    """The guard is held by hand: as by a sender in the middle of a copy."""
    pair = join(wire, MiB)
    there.step_guard_of(pair.here, pair.peer)
    pair.far.tell(end)
    keys = pair.here.provider._shares[pair.peer].keys.address
    table = np.ctypeslib.as_array((ctypes.c_char * (REGIONS * KEY.itemsize)).from_address(keys)).view(KEY)
    until(lambda: not table["key"].any(), "all keys, gone")
    assert not pair.far.has_answered(0.2)
    there.step_guard_of(pair.here, pair.peer)
    assert pair.far.answer() is None


class Copying:
    """An engine here with mapped memory, and another process whose worker 0 stands in the middle of a copy into it."""

    def __init__(self, here: Engine, far: Far) -> None:
        self.here, self.far = here, far
        self.region = here.register(here.allocate(MiB))
        far(there.target, MiB, provider="shm")
        far(there.connect, here.address)
        far(there.step_guard, here.address)

    def forget_to_look_again(self) -> None:
        """As a peer whose system has no restartable sequences."""
        for lease in self.here.provider._leases:
            lease.guards[RESTARTS] = 0

    def withdraw(self) -> Task:
        """Begin to unregister; returns when the key is gone."""
        task = Task(self.region.unregister)
        until(lambda: not self.here.provider.keys.entries["key"].any(), "the key, gone")
        return task


@pytest.fixture
def copying(engines, far):
    return Copying(engines(provider="shm"), far)


def test_a_peer_that_dies_in_a_copy_is_not_waited_for(copying):
    """It leaves its guard odd; its end is noticed, and `unregister` goes on."""
    withdrawing = copying.withdraw()
    assert withdrawing.running
    copying.far.kill()
    withdrawing.result()


def test_while_a_peer_is_waited_for_others_are_answered(copying, fars):
    withdrawing = copying.withdraw()
    kept = copying.here.allocate(KiB)
    kept[:] = 7
    region, other = copying.here.register(kept), fars()
    other(there.target, KiB, provider="shm")
    other(there.send, copying.here.address, region.address, KiB, op="read")
    assert set(other(there.read)) == {7}
    assert withdrawing.running
    copying.far(there.step_guard, copying.here.address)
    withdrawing.result()


def test_a_peer_stopped_in_a_copy_is_not_waited_for_where_it_looks_again_before_it_goes_on(copying):
    if not restartable.restarts(restartable.row()):
        pytest.skip("this libc, system or CPU has no restartable sequences")
    withdrawing = copying.withdraw()
    assert withdrawing.running
    copying.far.stop()
    withdrawing.result()
    Task(copying.here.close).result()
    copying.far.go_on()


def test_a_peer_stopped_in_a_copy_that_cannot_look_again_is_a_typed_error(copying, monkeypatch, caplog):
    monkeypatch.setattr(stream, "STALL_S", 0.3)
    copying.forget_to_look_again()
    copying.far.stop()
    says = rf"\(process {copying.far.pid} of this host\) was stopped in the middle of a copy.*end that process"
    with pytest.raises(TransportError, match=says):
        copying.withdraw().result()
    assert not copying.region.registered
    Task(copying.here.close).result()
    assert "closing all the same" in caplog.text
    copying.far.go_on()


def test_a_peer_is_waited_for_from_the_moment_it_has_our_memory(engines, far, monkeypatch):
    """It may copy before the listener's thread gets to note that it is connected."""
    going_on, hold = threading.Event(), Shm._hold

    def late(*arguments):
        assert going_on.wait(20)
        hold(*arguments)

    monkeypatch.setattr(Shm, "_hold", late)
    copying = Copying(engines(provider="shm"), far)
    withdrawing = copying.withdraw()
    assert withdrawing.running
    far(there.step_guard, copying.here.address)
    withdrawing.result()
    going_on.set()


# ------------------------------------------------------------------------------ allocated memory
@over("mapped", "auto")
def test_memory_allocated_anew_at_the_same_address_is_mapped_anew(join, wire):
    """A peer that had the old pages mapped must not write to them."""
    pair = join(wire, MiB)
    pair.write(0, 0, MiB).wait(20).close()
    share = pair.here.provider._shares[pair.peer]
    same = 0
    for k in range(5):
        former = set(share.segments)
        pair.far(there.unregister)
        pair.far(there.free)
        base = pair.far(there.hold, MiB, mapped=True)
        same += base == pair.place.base
        pair.place = pair.far(there.register)
        pair.data[:] = k + 1
        pair.write(0, 0, MiB).wait(20).close()
        assert (pair.there() == k + 1).all()
        assert len(share.segments) == 1
        assert former.isdisjoint(share.segments)
    assert same > 0


@over("mapped")
def test_parts_of_allocated_memory_can_be_registered_apart_and_again(join, wire):
    pair = join(wire, 64 * KiB)
    base = pair.far(there.hold, MiB, name="parts", mapped=True)
    here, peer = pair.here, pair.peer
    for first, last in ((4096, 8192), (8193, 10_000), (MiB - 5, MiB)):
        place = pair.far(there.register, "parts", first=first, last=last)
        assert place[1:] == (base + first, last - first)
        here.write(peer, pair.local.address, place.base, min(4096, last - first)).wait(20).close()
        with pytest.raises(UsageError, match="has not registered all of it"):
            here.write(peer, pair.local.address, place.base - 1, 2)
        with pytest.raises(UsageError, match="has not registered all of it"):
            here.write(peer, pair.local.address, base + last - 1, 2)
        pair.far(there.unregister, "parts")
        with here.write(peer, pair.local.address, place.base, 5) as batch, pytest.raises(TransferFailed):
            batch.wait(20)
        pair.far(there.register, "parts", first=first, last=last)
        here.write(peer, pair.local.address, place.base, 5).wait(20).close()
        pair.far(there.unregister, "parts")
    expected = np.zeros(MiB, np.uint8)
    for first, last in ((4096, 8192), (8193, 10_000), (MiB - 5, MiB)):
        n = min(4096, last - first)
        expected[first : first + n] = pair.data[:n]
    assert (np.frombuffer(pair.far(there.read, "parts"), np.uint8) == expected).all()


def test_allocated_memory_lives_as_long_as_a_view_of_it_and_leaves_nothing(engines):
    engine = engines(provider="shm")
    gc.collect()
    before = there.usage()
    for n in (1, 4096, 4097, MiB):
        array = engine.allocate(n)
        assert array.size == n
        assert not array.any()
        view = array[n // 2 :]
        view[:] = 3
        del array
        gc.collect()
        assert (view == 3).all()
        engine.register(view).unregister()
        del view
    region = engine.register(engine.allocate(MiB))  # the registration keeps it, too
    assert there.usage().descriptors > before.descriptors
    region.unregister()
    del region
    after = there.usage()
    assert after.descriptors == before.descriptors
    assert after.mappings <= before.mappings


def test_allocated_memory_can_be_freed_and_used_many_times_without_growth(join):
    pair = join(WIRES["mapped"], 64 * KiB)

    def once() -> None:
        array = pair.here.allocate(256 * KiB)
        region = pair.here.register(array)
        pair.far(there.hold, 256 * KiB, name="more", mapped=True)
        place = pair.far(there.register, "more")
        with contextlib.suppress(TransferFailed):  # memory at an address where other memory was before
            pair.here.write(pair.peer, region.address, place.base, 256 * KiB).wait(20)
        pair.here.write(pair.peer, region.address, place.base, 256 * KiB).wait(20).close()
        region.unregister()
        pair.far(there.unregister, "more")
        pair.far(there.free, "more")

    for _ in range(5):
        once()
    before, before_there = there.usage(), pair.far(there.usage)
    for _ in range(40):
        once()
    until(lambda: there.usage().within(before), "what the peer withdrew last, let go")
    until(lambda: pair.far(there.usage).within(before_there), "the same, there")


def test_huge_pages_are_taken_or_the_log_says_why_not(caplog):
    """Either way the memory is there. Most machines that run this have none to give."""
    caplog.set_level("INFO", "mooncache")
    array = allocate(3 * MiB, huge=True)
    array[:] = 1
    assert array.size == 3 * MiB
    with open("/proc/self/smaps") as file:
        huge = "KernelPageSize:     2048 kB" in file.read()
    assert huge != ("no huge pages for 3145728 bytes" in caplog.text)


@pytest.mark.parametrize("nbytes", [0, -1, 1.5, "5", None, True, 1 << 62, np.float64(3)])
def test_what_is_no_number_of_bytes_is_not_allocated(engines, nbytes):
    with pytest.raises(UsageError, match="expected a number of bytes from 1 on"):
        engines(provider="shm").allocate(nbytes)


def test_more_memory_than_there_is_is_a_capacity_error(engines):
    engine = engines(provider="shm")
    before = there.usage().descriptors
    with pytest.raises(CapacityError, match="no memory for"):
        engine.allocate(1 << 61)
    assert there.usage().descriptors == before


# ------------------------------------------------------------------------------ batches of both kinds
@pytest.mark.parametrize("workers", [1, 2])
def test_slices_that_are_copied_and_slices_for_the_connection_share_a_queue(engines, far, workers):
    """Turn about, in bursts longer than the ring: no slice is done twice, none before its time."""
    address = far(there.open_engine, provider="shm")
    places = {}
    for name in ("mapped", "other"):
        far(there.hold, 32 * MiB, name=name, mapped=name == "mapped")
        places[name] = far(there.register, name)
    here = engines(provider="shm", workers=workers, slices=64 * KiB, batches=256)
    data = random_bytes(32 * MiB)
    local = here.register(data)
    here.connect(address)
    queues = here.provider.queues_of(address)
    for queue in queues:
        queue.row["pid"] = 0
    at = np.arange(470, dtype=np.int64)
    for k in range(12):
        small = [
            here.write(address, local.address + at * 129 + k, places["other"].base + at * 130, 64) for _ in range(k % 4)
        ]
        large = [
            here.write(address, local.address + at * 65_540, places["mapped"].base + at * 65_541, 65_000)
            for _ in range(2)
        ]
        for batch in small + large:
            batch.wait(20).close()
    for queue in queues:
        until(lambda queue=queue: queue.row["direct"] == queue.row["copied"], "all, counted once")
    got = np.frombuffer(far(there.read, "mapped"), np.uint8)
    for i in at.tolist():
        assert (got[i * 65_541 : i * 65_541 + 65_000] == data[i * 65_540 : i * 65_540 + 65_000]).all()
    here.close()
    assert_balanced(here)


@pytest.mark.parametrize("provider", [Loopback, lambda: Emulated(Nic(), Nic()), Tcp, Shm])
def test_how_many_regions_there_may_be_is_a_setting(engines, provider):
    n = REGIONS + 100
    memory, source = np.zeros((n + 1, 64), np.uint8), np.arange(64, dtype=np.uint8)
    target, few, many = (engines(provider=provider(), regions=limit) for limit in (n, REGIONS, n))
    regions = [target.register(row) for row in memory[:n]]
    address = target.address or target.name
    with pytest.raises(CapacityError, match=f"all {n} regions are in use; unregister some .* more `regions`"):
        target.register(memory[n])
    with pytest.raises(CapacityError, match=f"of {REGIONS} this engine can know .* this engine with more `regions`"):
        few.connect(address)
    local = many.register(source)
    for i in (0, 7, n - 1):
        many.write(address, np.full(200, local.address), np.full(200, regions[i].address), 64).wait(20).close()
        np.testing.assert_array_equal(memory[i], source)
