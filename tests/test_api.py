"""Engine, Region and Batch as a caller sees them."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import mmap
import os
import sys
import threading
import weakref

import numpy as np
import pytest

from mooncache import (
    Batch,
    CapacityError,
    Engine,
    EngineClosed,
    MooncacheError,
    Status,
    TransferFailed,
    TransportError,
    UsageError,
)
from mooncache.kernels import calls, layout
from mooncache.providers.emulated import Emulated
from mooncache.providers.loopback import Loopback
from tests.helpers import SMALL, Pair, Task, assert_balanced, in_threads, run_python, until
from tests.kernels.entries import Gated


@pytest.fixture
def engines():
    """Makes small engines and closes them all."""
    made: list[Engine] = []

    def make(name: str | None = None, **options) -> Engine:
        made.append(Engine(name, **{**SMALL, **options}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def unchanged(pair: Pair):
    """What a refused call must leave as it was."""
    stats = pair.here.stats()
    timing = {kind.name.lower() for kind in layout.TIMING_KINDS}
    counts = {kind: n for kind, n in stats.counts.items() if kind not in timing}
    return counts, stats.free_slices, stats.open_batches, pair.state.regions.ranges(), pair.target.tobytes()


# ------------------------------------------------------------------------------ register
class OnlyDlpack:
    """Memory that is offered by DLPack and in no other way."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __dlpack__(self, **options):
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._values.__dlpack_device__()


def anonymous_map() -> mmap.mmap:
    return mmap.mmap(-1, 4096)


BUFFERS = {
    "numpy": lambda: np.zeros(1024, np.float32),
    "numpy 2-d": lambda: np.zeros((16, 64), np.float32),
    "numpy part": lambda: np.zeros(8192, np.uint8)[4096:],
    "bytearray": lambda: bytearray(4096),
    "memoryview": lambda: memoryview(bytearray(4096)),
    "array.array": lambda: array.array("d", bytes(4096)),
    "mmap": anonymous_map,
    "DLPack only": lambda: OnlyDlpack(np.zeros(1024, np.float32)),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_a_buffer_of_any_kind_can_be_registered_and_written_to(pair, kind):
    buffer = BUFFERS[kind]()
    region = pair.there.register(buffer)
    assert region.length == len(region) == 4096
    pair.here.write(pair.peer, pair.local.address, region.address, 4096).wait(20).close()
    view = buffer._values if isinstance(buffer, OnlyDlpack) else buffer
    seen = np.frombuffer(view, np.uint8) if not isinstance(view, np.ndarray) else view.reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(seen, pair.source[:4096])
    region.unregister()


def test_an_address_and_a_length_can_be_registered(pair):
    memory = np.zeros(4096, np.uint8)
    region = pair.there.register((memory.ctypes.data, np.int64(4096)))
    pair.here.write(pair.peer, pair.local.address, region.address, 4096).wait(20).close()
    np.testing.assert_array_equal(memory, pair.source[:4096])


def test_a_torch_tensor_can_be_registered(pair):
    torch = pytest.importorskip("torch", reason="torch is not installed in this environment")
    tensor = torch.zeros(1024, dtype=torch.float32)
    region = pair.there.register(tensor)
    assert region.length == 4096
    pair.here.write(pair.peer, pair.local.address, region.address, 4096).wait(20).close()
    np.testing.assert_array_equal(tensor.numpy().view(np.uint8), pair.source[:4096])
    with pytest.raises(UsageError, match="contiguous"):
        pair.there.register(torch.zeros(64, 64).t())


@pytest.mark.parametrize("buffer", [b"x" * 4096, memoryview(bytes(range(256)) * 16)], ids=["bytes", "memoryview"])
def test_read_only_memory_is_registered_for_reading_only(pair, buffer):
    with pytest.raises(UsageError, match="is read-only; register it with access='read'"):
        pair.there.register(buffer)
    region = pair.there.register(buffer, access="read")
    pair.here.read(pair.peer, region.address, pair.local.address, 4096).wait(20).close()
    assert pair.source[:4096].tobytes() == bytes(buffer)
    with pytest.raises(UsageError, match="does not permit writing"):
        pair.here.write(pair.peer, pair.local.address, region.address, 4096)


def test_nothing_is_read_into_read_only_memory_of_ones_own(pair):
    precious = b"x" * 64
    mine = pair.here.register(precious, access="read")
    pair.here.write(pair.peer, mine.address, pair.remote.address, 64).wait(20).close()
    assert pair.target[:64].tobytes() == precious
    with pytest.raises(UsageError, match="read-only"):
        pair.here.read(pair.peer, pair.remote.address + 64, mine.address, 64)
    assert precious == b"x" * 64


def test_a_region_keeps_its_buffer_alive_until_it_is_unregistered(pair):
    buffer = np.zeros(4096, np.uint8)
    alive = weakref.ref(buffer)
    region = pair.here.register(buffer)
    del buffer
    gc.collect()
    assert alive() is not None
    region.unregister()
    del region
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (np.zeros((8, 8))[:, ::2], "C-contiguous"),
        (np.zeros((8, 8)).T, "C-contiguous"),
        (memoryview(bytearray(64))[::2], "contiguous buffer"),
        (np.zeros(0), "at least one byte"),
        (bytearray(), "contiguous buffer|at least one byte"),
        ((4096, 0), "at least one byte"),
        ((0, 4096), "at least one byte"),
        ((4096, -1), "at least one byte"),
        ((1 << 62, 1 << 62), "at least one byte of user memory"),
        ((4096,), r"expected \(address, length\)"),
        ((4096, 1.5), r"expected \(address, length\)"),
        ((True, 4096), r"expected \(address, length\)"),
        ("text", "got str"),
        (None, "got NoneType"),
        (17, "got int"),
        ([1, 2, 3], "got list"),
    ],
)
def test_what_cannot_be_registered_is_refused_and_nothing_changes(pair, buffer, message):
    before = unchanged(pair)
    with pytest.raises(UsageError, match=message):
        pair.here.register(buffer)
    assert unchanged(pair) == before


def test_an_unknown_access_is_refused(pair):
    with pytest.raises(UsageError, match="access must be one of 'read', 'write', 'both', got 'all'"):
        pair.here.register(bytearray(8), access="all")


@pytest.mark.parametrize(("start", "end"), [(0, 1), (-5, 1), (50, 60), (99, 200), (-1, 101)])
def test_overlapping_regions_are_refused_and_nothing_changes(engines, start, end):
    engine, memory = engines(), np.zeros(4096, np.uint8)
    base = memory.ctypes.data + 1000
    engine.register((base, 100))
    before = engine._state.regions.ranges()
    with pytest.raises(UsageError, match="overlaps the registered region"):
        engine.register((base + start, end - start))
    assert engine._state.regions.ranges() == before
    engine.register((base + 100, 5))
    engine.register((base - 5, 5))


def test_a_region_is_a_context_and_says_what_it_is(pair):
    with pair.here.register(bytearray(100), access="read") as region:
        assert region.registered
        assert repr(region) == f"<Region 100 bytes at {region.address:#x}, read>"
    assert not region.registered
    assert repr(region).endswith("read, unregistered>")
    with pytest.raises(UsageError, match="is not registered with engine"):
        region.unregister()


def test_a_range_can_be_registered_again_after_it_was_unregistered(pair):
    memory = np.zeros(64, np.uint8)
    pair.here.register(memory).unregister()
    region = pair.here.register(memory)
    pair.here.read(pair.peer, pair.remote.address, region.address, 64).wait(20).close()


def test_a_region_in_use_cannot_be_unregistered_and_goes_on_working(gated):
    batch = gated.scattered(10)
    until(lambda: gated.here.provider.queues[0][0].outstanding == 10, "the slices, posted")
    with pytest.raises(UsageError, match="is in use by 10 slices; wait for their batches"):
        gated.local.unregister()
    assert gated.local.registered
    other = gated.here.register(np.zeros(64, np.uint8))
    other.unregister()  # nobody uses that one
    gated.here.provider.open_gate()
    batch.wait(20)
    gated.local.unregister()  # finished is enough
    batch.close()


def test_a_region_of_a_detached_batch_stays_in_use_until_the_nic_has_answered(gated):
    batch = gated.scattered(10)
    until(lambda: gated.here.provider.queues[0][0].outstanding == 10, "the slices, posted")
    batch.close()
    assert not batch.quiesced
    with pytest.raises(UsageError, match="is in use by 10 slices"):
        gated.local.unregister()
    gated.here.provider.open_gate()
    until(lambda: batch.quiesced, "the end of the detached batch")
    gated.local.unregister()


def test_a_region_unregistered_at_the_target_is_a_typed_failure(pair):
    pair.write(0, length=8).wait(20).close()  # the peer's regions are known here
    pair.remote.unregister()
    before = pair.target.copy()
    batch = pair.scattered(5)
    with pytest.raises(TransferFailed, match="REMOTE_ACCESS") as failed:
        batch.wait(20)
    assert failed.value.peer == pair.peer
    assert [f.request for f in failed.value.failures] == list(range(5))
    assert {f.status for f in failed.value.failures} == {Status.REMOTE_ACCESS}
    assert "was the region unregistered there?" in failed.value.failures[0].reason
    np.testing.assert_array_equal(pair.target, before)


def test_a_region_registered_at_the_target_after_connecting_is_found(pair):
    pair.write(0, length=8).wait(20).close()
    later = pair.there.register(late := np.zeros(64, np.uint8))
    pair.here.write(pair.peer, pair.local.address, later.address, 64).wait(20).close()
    np.testing.assert_array_equal(late, pair.source[:64])


def test_a_region_registered_anew_at_the_target_is_reached_after_one_failure(pair):
    pair.write(0, length=8).wait(20).close()
    pair.remote.unregister()
    pair.remote = pair.there.register(pair.target)  # the same range under another key
    with contextlib.suppress(TransferFailed):
        pair.scattered(5).wait(20)
    pair.scattered(5).wait(20).close()
    np.testing.assert_array_equal(pair.target[:64], pair.source[:64])


# ------------------------------------------------------------------------------ operands
def test_scalars_and_arrays_mix(pair):
    pair.here.write(pair.peer, pair.local.address, pair.remote.address + np.arange(4, dtype=np.int64) * 100, 9).wait(20)
    for i in range(4):
        np.testing.assert_array_equal(pair.target[i * 100 : i * 100 + 9], pair.source[:9])


@pytest.mark.parametrize("make", [int, np.int64, np.uint64, np.intp], ids=lambda m: m.__name__)
def test_integers_of_numpy_are_integers(pair, make):
    batch = pair.here.write(pair.peer, make(pair.local.address), make(pair.remote.address), make(33)).wait(20)
    assert (batch.requests, batch.slices) == (1, 1)
    np.testing.assert_array_equal(pair.target[:33], pair.source[:33])


def test_unsigned_arrays_are_taken_as_they_are(pair):
    offsets = np.arange(3, dtype=np.uint64) * 50
    source, target = np.uint64(pair.local.address) + offsets, np.uint64(pair.remote.address) + offsets
    pair.here.write(pair.peer, source, target, np.full(3, 20, np.uint64)).wait(20)
    np.testing.assert_array_equal(pair.target[100:120], pair.source[100:120])


def test_the_arrays_may_be_changed_as_soon_as_the_call_is_back(gated):
    offsets = np.arange(5, dtype=np.int64) * 100
    source, target = gated.local.address + offsets, gated.remote.address + offsets
    batch = gated.here.write(gated.peer, source, target, 50)
    source[:] = target[:] = 0
    gated.here.provider.open_gate()
    batch.wait(20)
    np.testing.assert_array_equal(gated.target[400:450], gated.source[400:450])


def test_empty_arrays_give_a_finished_batch(pair):
    empty = np.zeros(0, np.int64)
    for operands in [(empty, empty, empty), (empty, 5, 7), (5, 5, empty)]:
        batch = pair.here.write(pair.peer, *operands)
        assert batch.done
        assert batch.quiesced
        assert (batch.requests, batch.slices, batch.failures) == (0, 0, ())
        assert batch.wait() is batch
        batch.close()
    pair.close()
    assert_balanced(pair.here)


INT64 = "expected an int64 array of one contiguous dimension"
BAD_OPERANDS = {
    "unequal sizes": (lambda p: (arange(p.local, 3), arange(p.remote, 4), 8), r"arrays of equal length, got \(3,\)"),
    "one against many": (lambda p: (arange(p.local, 3), arange(p.remote, 3), np.full(1, 8)), "arrays of equal length"),
    "int32": (lambda p: (arange(p.local, 3), arange(p.remote, 3), np.full(3, 8, np.int32)), f"{INT64}, got int32"),
    "float64": (lambda p: (arange(p.local, 3).astype(float), arange(p.remote, 3), 8), f"{INT64}, got float64"),
    "two dimensions": (lambda p: (arange(p.local, 4).reshape(2, 2), arange(p.remote, 4), 8), rf"{INT64}.*\(2, 2\)"),
    "no dimension": (lambda p: (np.array(p.local.address), p.remote.address, 8), INT64),
    "strided": (lambda p: (arange(p.local, 6)[::2], arange(p.remote, 3), 8), f"{INT64}.*ascontiguousarray"),
    "a list": (lambda p: ([p.local.address], p.remote.address, 8), "expected an int64 array or an integer, got list"),
    "a float": (lambda p: (p.local.address, p.remote.address, 8.0), "got float"),
    "a bool": (lambda p: (p.local.address, p.remote.address, True), "got bool"),
    "None": (lambda p: (p.local.address, None, 8), "got NoneType"),
    "too big": (lambda p: (1 << 63, p.remote.address, 8), r"below 2\*\*63, got 9223372036854775808"),
    "too big unsigned": (lambda p: (np.uint64(1 << 63), p.remote.address, 8), r"below 2\*\*63"),
    "too small": (lambda p: (p.local.address, -(1 << 63) - 1, 8), r"below 2\*\*63"),
    "zero length": (lambda p: (p.local.address, p.remote.address, 0), "request 0: expected a length from 1 to .*got 0"),
    "negative length": (
        lambda p: (arange(p.local, 3), arange(p.remote, 3), np.array([8, 8, -7])),
        "request 2: expected a length from 1 to .*got -7",
    ),
    "length scalar for all": (lambda p: (arange(p.local, 3), arange(p.remote, 3), -1), "request 0: .*got -1"),
    "source not registered": (
        lambda p: (p.source.ctypes.data + p.source.nbytes, p.remote.address, 8),
        r"request 0: the source range \[0x[0-9a-f]+, \+8\) is not inside this engine's registered regions: nearest",
    ),
    "source runs out": (lambda p: (p.local.address + p.local.length - 7, p.remote.address, 8), "request 0: the source"),
    "source 0": (lambda p: (0, p.remote.address, 8), "the source range"),
    "negative source": (lambda p: (-1, p.remote.address, 8), "the source range"),
    "unsigned wrap": (lambda p: (np.full(1, (1 << 64) - 9, np.uint64), p.remote.address, 8), "the source range"),
    "target not registered": (
        lambda p: (p.local.address, p.local.address, 8),
        r"request 0: the target range .*peer 'there-\d+' has not registered all of it: nearest of 1",
    ),
    "target of one of many": (
        lambda p: (arange(p.local, 3), p.remote.address + np.array([0, p.remote.length - 4, 30]), 8),
        "request 1: the target range",
    ),
    "length beyond all": (lambda p: (p.local.address, p.remote.address, 1 << 41), r"request 0: expected a length"),
}


def arange(region, n):
    return region.address + np.arange(n, dtype=np.int64) * 100


@pytest.mark.parametrize("name", BAD_OPERANDS)
def test_a_bad_call_says_what_was_expected_and_what_came_and_changes_nothing(pair, name):
    operands, message = BAD_OPERANDS[name]
    pair.write(0, length=8).wait(20).close()
    before = unchanged(pair)
    with pytest.raises(UsageError, match=message):
        pair.here.write(pair.peer, *operands(pair))
    assert unchanged(pair) == before
    pair.write(100, length=8).wait(20).close()
    np.testing.assert_array_equal(pair.target[100:108], pair.source[100:108])


def test_a_bad_read_names_its_ends_the_right_way_round(pair):
    with pytest.raises(UsageError, match=r"the target range .* is not inside this engine's registered regions"):
        pair.here.read(pair.peer, pair.remote.address, 17, 8)
    with pytest.raises(UsageError, match=r"the source range .*: peer .* has not registered all of it"):
        pair.here.read(pair.peer, 17, pair.local.address, 8)
    only = pair.there.register(np.zeros(64, np.uint8), access="write")
    with pytest.raises(UsageError, match="does not permit reading"):
        pair.here.read(pair.peer, only.address, pair.local.address, 8)


# ------------------------------------------------------------------------------ peers
def test_an_unknown_peer_is_a_transport_error_that_lists_the_known_ones(pair):
    with pytest.raises(TransportError, match=f"no engine named 'nobody' in this process; there are: .*{pair.peer}"):
        pair.here.write("nobody", pair.local.address, pair.remote.address, 8)


def test_a_peer_over_another_wire_is_a_transport_error(engines):
    engines("over-loopback"), engines("over-emulated", provider="emulated")
    with pytest.raises(
        TransportError, match="uses provider 'emulated', this engine 'loopback'; both ends need the same"
    ):
        engines("here").connect("over-emulated")


def test_more_peers_than_an_engine_may_have_are_refused(engines):
    here = engines("here", peers=2)
    for i in range(3):
        engines(f"there-{i}")
    first = here.connect("there-0")
    here.connect("there-1")
    with pytest.raises(CapacityError, match="has 2 peers, as many as it may"):
        here.connect("there-2")
    assert here.connect("there-0") is first


def test_a_peer_of_another_engine_is_refused(pair, engines):
    stranger = engines("stranger")
    theirs = stranger.connect(pair.peer)
    region = stranger.register(np.zeros(64, np.uint8))
    assert repr(theirs) == f"<Peer {pair.peer!r}, 1 regions>"
    third = engines("third")  # it has no peer at all, so the other's number would lead nowhere
    mine = third.register(np.ones(64, np.uint8))
    with pytest.raises(UsageError, match="belongs to another engine"):
        third.write(theirs, mine.address, pair.remote.address, 8)
    with pytest.raises(UsageError, match="belongs to another engine"):
        pair.here.write(theirs, pair.local.address, pair.remote.address, 8)
    stranger.write(theirs, region.address, pair.remote.address, 8).wait(20).close()


def test_an_engine_can_be_its_own_peer(engines):
    engine, memory = engines("self"), np.arange(128, dtype=np.uint8)
    region = engine.register(memory)
    engine.write("self", region.address, region.address + 64, 64).wait(20).close()
    np.testing.assert_array_equal(memory[64:], memory[:64])


def test_writing_to_a_closed_peer_is_a_typed_failure(pair):
    pair.write(0, length=8).wait(20).close()
    pair.there.close()
    with pytest.raises((TransferFailed, TransportError)):
        pair.scattered(3).wait(20)
    pair.here.connect(pair.peer)  # known already
    with pytest.raises(TransportError, match="no engine named"):
        pair.here.write(pair.peer, pair.local.address, 17, 8)


def test_a_peer_that_was_closed_and_opened_again_under_its_name_is_reached(engines):
    here, there = engines("here"), engines("there")
    source, target = np.full(64, 7, np.uint8), np.zeros(64, np.uint8)
    local = here.register(source)
    remote = there.register(target)
    here.write("there", local.address, remote.address, 64).wait(20).close()
    there.close()
    there = engines("there")
    target[:] = 0
    remote = there.register(target)
    with contextlib.suppress(MooncacheError):
        here.write("there", local.address, remote.address, 64).wait(20)  # the first may find the old one gone
    here.write("there", local.address, remote.address, 64).wait(20)
    assert (target == 7).all()


def test_engines_that_connect_to_each_other_at_the_same_time_both_succeed(engines):
    """Neither may hold its own lock while it asks the other: both are within `connect` before either goes on."""
    meeting = threading.Barrier(2)

    class Name(str):
        """A name that is looked up for the first time only when the other's is as well."""

        met = False

        def __hash__(self) -> int:
            if not self.met:
                self.met = True
                meeting.wait(20)
            return super().__hash__()

    a, b = engines("a"), engines("b")
    to_b, to_a = in_threads(lambda: a.connect(Name("b")), lambda: b.connect(Name("a")))
    assert a.connect("b") is to_b
    assert b.connect("a") is to_a


def test_regions_come_and_go_while_another_thread_transfers(pair):
    """A table that is being changed is never seen half changed: the transfer's own regions are always found."""
    memory = np.zeros(64 * 100, np.uint8)
    addresses = [memory.ctypes.data + 100 * i for i in range(64)]
    ended = threading.Event()

    def transfer() -> int:
        n = 0
        while not ended.is_set() or n < 200:
            pair.scattered(3).wait(20).close()
            n += 1
        return n

    def change() -> None:
        try:
            for _ in range(30):
                regions = [pair.here.register((a, 50)) for a in addresses]
                for region in regions[::2] + regions[1::2]:
                    region.unregister()
        finally:
            ended.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(transfer, change)
    finally:
        sys.setswitchinterval(interval)


# ------------------------------------------------------------------------------ a batch's life
def test_a_batch_runs_is_done_and_is_closed(gated):
    batch = gated.scattered(10)
    assert not batch.done
    assert not batch.quiesced
    assert (batch.requests, batch.slices, batch.peer) == (10, 10, gated.peer)
    assert repr(batch) == f"<Batch of 10 requests to {gated.peer!r}, running>"
    with pytest.raises(UsageError, match="not finished; wait for it"):
        _ = batch.failures
    with pytest.raises(TimeoutError, match=r"running> was not done within 0.001 s"):
        batch.wait(0.001)
    with pytest.raises(TimeoutError):
        batch.wait(0)
    with pytest.raises(TimeoutError):
        batch.wait(-1)
    gated.here.provider.open_gate()
    assert batch.wait(20) is batch
    assert batch.wait() is batch
    assert batch.done
    assert batch.quiesced
    assert batch.failures == ()
    assert repr(batch).endswith("done>")
    batch.close()
    assert batch.done
    assert batch.quiesced
    assert batch.slices == 0
    assert batch.failures == ()
    assert repr(batch).endswith("closed>")
    with pytest.raises(UsageError, match="closed already"):
        batch.close()
    with pytest.raises(UsageError, match="closed"):
        batch.wait()
    with pytest.raises(UsageError, match="closed"):
        batch.cancel()


def test_failures_can_be_asked_for_after_the_batch_was_closed(pair):
    pair.write(0, length=8).wait(20).close()
    pair.remote.unregister()
    batch = pair.scattered(2)
    until(lambda: batch.done, "the end")
    batch.close()  # closed without a look at them
    assert [f.request for f in batch.failures] == [0, 1]


def test_failures_of_a_batch_closed_while_it_ran_were_not_kept(gated):
    batch = gated.scattered(2)
    batch.close()
    with pytest.raises(UsageError, match="closed before it finished; its failures were not kept"):
        _ = batch.failures


def test_a_batch_is_a_context(gated):
    with gated.scattered(3) as batch:
        assert not batch.done
        until(lambda: gated.here.provider.queues[0][0].outstanding == 3, "the slices, posted")
    assert batch.done  # closed
    assert not batch.quiesced  # but the NIC still has it
    gated.here.provider.open_gate()
    until(lambda: batch.quiesced, "the end of the detached batch")
    with gated.scattered(3) as batch:
        batch.wait(20)
        batch.close()  # already, and the context does not mind


def test_a_batch_that_is_forgotten_closes_itself(gated):
    gated.here.provider.open_gate()
    gated.scattered(300).wait(20)
    gc.collect()
    stats = gated.here.stats()
    assert stats.open_batches == 0
    assert stats.free_slices == stats.capacity_slices
    gated.here.provider.shut_gate()
    running = gated.scattered(300)
    del running
    gc.collect()
    gated.here.provider.open_gate()
    until(lambda: gated.here.stats().open_batches == 0, "the end of the forgotten batch")


def test_a_cancelled_batch_ends_with_what_was_posted(pairs):
    pair = pairs(Gated(), Gated(), queue_depth=8)
    batch = pair.scattered(50)
    until(lambda: pair.here.provider.queues[0][0].outstanding == 8, "eight slices, posted")
    batch.cancel()
    batch.cancel()  # once more changes nothing
    with pytest.raises(TimeoutError):
        batch.wait(0.001)  # the NIC still has eight
    pair.here.provider.open_gate()
    with pytest.raises(TransferFailed, match=r"42 of 50 requests .* the first is request 8: CANCELLED"):
        batch.wait(20)
    assert [f.request for f in batch.failures] == list(range(8, 50))
    batch.cancel()  # done: no effect
    batch.close()
    np.testing.assert_array_equal(
        pair.target[: 8 * 65].reshape(8, 65)[:, :64], pair.source[: 8 * 65].reshape(8, 65)[:, :64]
    )
    assert not pair.target[8 * 65 :].any()
    pair.close()
    assert_balanced(pair.here)


def test_a_batch_behind_a_cancelled_one_is_posted(pairs):
    pair = pairs(Gated(), Gated(), queue_depth=8)
    first, second, third = pair.scattered(50), pair.scattered(50), pair.scattered(50)
    until(lambda: pair.here.provider.queues[0][0].outstanding == 8, "eight slices, posted")
    second.cancel()
    second.close()
    pair.here.provider.open_gate()
    first.wait(20)
    third.wait(20)
    first.close()
    third.close()
    pair.close()
    counts = assert_balanced(pair.here).counts
    assert (counts["completed"], counts["failed"]) == (100, 50)


def test_a_batch_past_its_deadline_fails_what_was_not_posted(pairs):
    pair = pairs(Gated(), Gated(), queue_depth=8)
    blocking = pair.scattered(8)
    until(lambda: pair.here.provider.queues[0][0].outstanding == 8, "the queue, full")
    late = pair.scattered(5, timeout=0.01)
    with pytest.raises(TransferFailed, match="TIMED_OUT"):
        late.wait(20)
    assert [f.request for f in late.failures] == list(range(5))
    assert "deadline passed" in late.failures[0].reason
    late.close()
    pair.here.provider.open_gate()
    blocking.wait(20).close()


def test_two_threads_may_wait_for_one_batch_and_one_may_close_it(gated):
    batch = gated.scattered(3)
    waiting = [Task(batch.wait) for _ in range(2)]
    gated.here.provider.open_gate()
    assert [task.result() for task in waiting] == [batch, batch]
    gated.here.provider.shut_gate()
    other = gated.scattered(3)
    waiter = Task(other.wait)
    until(lambda: calls.read_word(gated.here.ctl, other._handle, layout.BATCH_WAITERS) == 1, "the waiter, asleep")
    other.close()
    with pytest.raises(UsageError, match="closed"):
        waiter.result()


def test_a_wait_does_not_hold_the_gil(gated):
    """Were it held, nothing here could open the gate, and the kernel would come back unfinished after its 60 s."""
    batch = gated.scattered(3)
    waiter = Task(calls.wait, gated.here.ctl, batch._handle, 60_000_000_000)
    count = 0
    until(lambda: calls.read_word(gated.here.ctl, batch._handle, layout.BATCH_WAITERS) == 1, "the waiter, asleep")
    while count < 100_000:
        count += 1
    assert waiter.running
    gated.here.provider.open_gate()
    assert waiter.result() == Status.OK
    assert count == 100_000


INTERRUPT = """
import os, signal, threading
import numpy as np
import mooncache, mooncache.engine
from mooncache.providers.emulated import Emulated, Nic
from mooncache.kernels import calls, layout

mooncache.engine.JOIN_SECONDS = 0.05
far = Nic(latency_ns=3600e9)
here = mooncache.Engine("here", provider=Emulated(far), slices=256, batches=4, peers=2)
there = mooncache.Engine("there", provider=Emulated(far), slices=256, batches=4, peers=2)
a, b = here.register(np.zeros(64, np.uint8)), there.register(np.zeros(64, np.uint8))
batch = here.write("there", a.address, b.address, 64)
ctl = here.ctl

def interrupt():
    while calls.read_word(ctl, batch._handle, layout.BATCH_WAITERS) == 0 or not here.provider.queues[0][0].outstanding:
        pass
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    {wait}
except KeyboardInterrupt:
    print("interrupted")
assert not batch.done
assert len(batch.failures if batch.done else ()) == 0
batch.close()
assert not batch.quiesced
try:
    here.close()
except mooncache.TransportError as error:
    print(error)
while any(thread.name.startswith("here") for thread in threading.enumerate()):
    pass
print("its thread has left")
here.close()  # a second one does nothing
del here, there, batch
import gc
gc.collect()
print("still alive")
"""


@pytest.mark.parametrize("wait", ["batch.wait()", "batch.wait(timeout=3000)"])
def test_ctrl_c_ends_a_wait_and_a_nic_that_never_answers_does_not_hang_the_end(wait):
    done = run_python(INTERRUPT.replace("{wait}", wait))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "interrupted",
        "here-worker-0 still wait for the NIC; buffers in flight are not quiesced",
        "its thread has left",
        "still alive",
    ]


# ------------------------------------------------------------------------------ asyncio
async def finish_while_awaited(pair: Pair, batch: Batch) -> None:
    """Open the gate only when the batch is awaited, so that the eventfd has to tell."""
    waiting = asyncio.ensure_future(_await(batch))
    await asyncio.sleep(0)
    assert pair.here.awaiting._waiters
    pair.here.provider.open_gate()
    await asyncio.wait_for(waiting, 20)


def test_a_batch_can_be_awaited(gated):
    async def main() -> Batch:
        batch = gated.scattered(3)
        await finish_while_awaited(gated, batch)
        return await batch

    assert asyncio.run(main()).done


def test_many_batches_are_awaited_together(gated):
    async def main() -> None:
        batches = [gated.scattered(n) for n in (1, 2, 3, 300)]
        pending = asyncio.gather(*batches)
        await asyncio.sleep(0)
        assert not pending.done()
        gated.here.provider.open_gate()
        assert await pending == batches
        for batch in batches:
            assert await batch is batch  # a finished one as well
            batch.close()

    asyncio.run(main())


def test_several_event_loops_await_batches_of_one_engine(gated):
    ready = threading.Barrier(4)

    async def one() -> int:
        n = 0
        for _ in range(30):
            batch = await gated.scattered(5)
            n += len(batch.failures) == 0
            batch.close()
        return n

    async def first_together() -> int:
        batch = gated.scattered(5)
        waiting = asyncio.ensure_future(wait_for(batch))
        await asyncio.sleep(0)
        ready.wait(20)
        await waiting
        return await one()

    async def wait_for(batch: Batch) -> None:
        await batch
        batch.close()

    loops = [Task(asyncio.run, first_together()) for _ in range(3)]
    ready.wait(20)  # all three wait
    gated.here.provider.open_gate()
    assert [loop.result() for loop in loops] == [30] * 3


def test_awaiting_raises_what_waiting_does(pair):
    pair.write(0, length=8).wait(20).close()
    pair.remote.unregister()

    async def main() -> None:
        batch = pair.scattered(3)
        with pytest.raises(TransferFailed, match="3 of 3 requests"):
            await batch
        batch.close()
        with pytest.raises(UsageError, match="closed"):
            await batch

    asyncio.run(main())


def test_an_await_can_be_given_up_and_taken_up_again(gated):
    async def main() -> None:
        batch = gated.scattered(3)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(batch, 0.001)
        assert not batch.done
        gated.here.provider.open_gate()
        await asyncio.wait_for(batch, 20)

    asyncio.run(main())
    assert gated.here.awaiting._waiters == {}


def test_a_loop_that_was_closed_while_it_awaited_harms_no_other(gated):
    loop = asyncio.new_event_loop()
    left = gated.scattered(3)
    task = loop.create_task(_await(left))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()

    async def main() -> None:
        await finish_while_awaited(gated, gated.scattered(3))

    asyncio.run(main())
    left.wait(20)
    gated.here.close()
    with contextlib.suppress(RuntimeError):
        task.get_coro().close()
    task._log_destroy_pending = False


async def _await(batch: Batch) -> None:
    await batch


def test_engines_that_follow_each_other_in_one_event_loop_can_all_be_awaited():
    """The next engine's eventfd has the number of the one before; the loop must not take it for that."""

    async def main() -> None:
        for _ in range(3):
            pair = Pair(Gated(), Gated())
            try:
                await finish_while_awaited(pair, pair.scattered(3))
            finally:
                pair.close()

    asyncio.run(main())


# ------------------------------------------------------------------------------ capacity
def test_a_submit_waits_for_slots_until_another_batch_is_closed(pairs):
    pair = pairs(slices=512)
    first = pair.scattered(512).wait(20)
    second = Task(pair.scattered, 512)
    until(lambda: pair.state.shared[layout.SHARED_WAITERS] == 1, "the submitter, asleep")
    assert second.running
    first.close()
    second.result().wait(20).close()


def test_a_submit_waits_for_a_batch_row_until_another_batch_is_closed(pairs):
    pair = pairs(batches=2)
    first, other = pair.scattered(1).wait(20), pair.scattered(1).wait(20)
    third = Task(pair.scattered, 1)
    until(lambda: pair.state.shared[layout.SHARED_WAITERS] == 1, "the submitter, asleep")
    first.close()
    third.result().wait(20).close()
    other.close()


def test_many_submitters_share_a_pool_that_holds_one_batch(pairs):
    pair = pairs(slices=256)

    def run() -> int:
        for _ in range(50):
            pair.scattered(200).wait(20).close()
        return 50

    assert in_threads(run, run, run) == [50] * 3
    pair.close()
    assert assert_balanced(pair.here).counts["completed"] == 150 * 200


def test_a_submit_that_waits_for_slots_fails_at_its_deadline(pairs):
    pair = pairs(slices=512)
    with pair.scattered(300).wait(20):
        before = unchanged(pair)
        for timeout in (0, 0.01):
            with pytest.raises(CapacityError, match=r"too few free slots: .* none came back before the timeout"):
                pair.scattered(300, timeout=timeout)
        assert unchanged(pair) == before
    pair.scattered(512, timeout=20).wait(20).close()


def test_no_batch_row_before_the_deadline_is_a_capacity_error(pairs):
    pair = pairs(batches=1)
    with pair.scattered(1).wait(20), pytest.raises(CapacityError, match="too few free batch rows"):
        pair.scattered(1, timeout=0.01)


def test_a_batch_that_can_never_fit_is_refused_at_once(pairs):
    pair = pairs(slices=512)
    before = unchanged(pair)
    with pytest.raises(CapacityError, match=r"more slices than the pool has slots \(512\)"):
        pair.scattered(513)
    assert unchanged(pair) == before


def test_without_memory_for_slice_objects_a_submit_is_refused_and_gives_all_back(pairs):
    import ctypes

    pair = pairs(store="heap", slices=2048)
    pair.scattered(10).wait(20).close()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    left, made = [700], []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
    def stingy(size):
        left[0] -= 1
        if left[0] < 0:
            return None
        made.append(libc.malloc(size))
        return made[-1]

    words = pair.here._blocks[threading.get_ident()].words
    honest, words[layout.MALLOC] = int(words[layout.MALLOC]), ctypes.cast(stingy, ctypes.c_void_p).value
    try:
        with pytest.raises(CapacityError, match="malloc has no more memory"):
            pair.scattered(600)
    finally:
        words[layout.MALLOC] = honest
    stats = pair.here.stats()
    assert stats.free_slices == 2048
    assert stats.open_batches == 0
    assert stats.counts["slices_filled"] == 10
    pair.scattered(2048, timeout=20).wait(20).close()
    counts = pair.here.stats().counts
    assert counts["slices_filled"] == 2058
    assert counts["heap_allocated"] == counts["heap_freed"] == 2058 + 350  # two mallocs an object


# ------------------------------------------------------------------------------ settings and names
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slices": 0}, "slices must be an integer from 1 to .*, got 0"),
        ({"workers": -1}, "workers must be an integer from 1 to 16, got -1"),
        ({"workers": 17}, "workers must be an integer from 1 to 16, got 17"),
        ({"retries": -1}, "retries must be an integer from 0"),
        ({"chain": 1.5}, "chain must be an integer .*, got 1.5"),
        ({"batches": True}, "batches must be an integer .*, got True"),
        ({"slice_bytes": "64K"}, "slice_bytes must be an integer .*, got '64K'"),
        ({"slizes": 5}, "unknown setting 'slizes'; there are: .*slices"),
        ({"policy": "hope"}, "a policy of .*'bulk'.*, got 'pool' and 'hope'"),
        ({"store": "disk"}, "expected a store of .*'heap'"),
        ({"provider": "pigeon"}, "expected a Provider or one of 'loopback', 'emulated', got 'pigeon'"),
        ({"provider": 5}, "expected a Provider or one of"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(options, message):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match=message):
        Engine(**options)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_name_in_use_is_refused_and_can_be_used_after_the_engine_was_closed(engines):
    first = engines("twin")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match="an engine named 'twin' is open in this process"):
        engines("twin")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    first.close()
    assert engines("twin").name == "twin"


def test_engines_without_a_name_get_one_each(engines):
    assert engines().name != engines().name


@pytest.mark.parametrize("make", [Loopback, Emulated])
def test_a_provider_serves_one_engine(engines, make):
    provider = make()
    engine = engines("first", provider=provider)
    with pytest.raises((UsageError, TransportError), match="open"):
        engines("second", provider=provider)
    region = engine.register(np.zeros(64, np.uint8))
    engine.write("first", region.address, region.address + 32, 16).wait(20).close()


# ------------------------------------------------------------------------------ several of everything
@pytest.mark.parametrize("workers", [1, 3])
def test_three_submitting_threads_and_several_workers(pairs, workers):
    pair = pairs(workers=workers, slices=32 * 1024, arena=1 << 20)
    third = (1 << 20) // 3

    def run(k: int) -> None:
        batches = []
        for i in range(20):
            offsets = k * third + (i * 200 + np.arange(200, dtype=np.int64)) * 80
            batches.append(pair.write(offsets, length=70))
        for batch in batches:
            batch.wait(20).close()

    in_threads(lambda: run(0), lambda: run(1), lambda: run(2))
    for k in range(3):
        at = k * third
        seen, sent = (a[at : at + 4000 * 80].reshape(4000, 80) for a in (pair.target, pair.source))
        np.testing.assert_array_equal(seen[:, :70], sent[:, :70])
        assert not seen[:, 70:].any()
    stats = pair.here.stats()
    assert stats.counts["batches_taken"] == 60
    assert len(stats.worker_busy_s) == len(stats.worker_freeing_s) == workers
    pair.close()
    assert_balanced(pair.here)


def test_batches_go_to_the_workers_in_turn(pairs):
    pair = pairs(workers=3)
    for _ in range(9):
        pair.scattered(2).wait(20).close()
    assert [int(b.counters[layout.Kind.BATCHES_TAKEN]) for b in pair.here._workers] == [3, 3, 3]


def test_a_thread_that_ended_leaves_its_control_block_to_the_next(pair):
    before = None
    for n in range(1, 11):
        in_threads(lambda: pair.scattered(5).wait(20).close())
        counts = pair.here.stats().counts
        assert counts["batches_submitted"] == counts["batches_closed"] == n  # nothing that ended threads did is lost
        before = before or len(pair.here._blocks)
    assert len(pair.here._blocks) <= before + 1


def test_chunks_cached_by_a_thread_that_ended_are_not_lost(pairs):
    pair = pairs(policy="thread_cache", slices=512, cache_slices=512)
    for _ in range(5):
        in_threads(lambda: pair.scattered(512, timeout=20).wait(20).close())
        assert pair.here.stats().free_slices == 512


def test_threads_at_the_same_time_have_a_control_block_each(pair):
    together = threading.Barrier(8)

    def own() -> int:
        ctl = pair.here.ctl
        together.wait(20)
        return ctl

    assert len(set(in_threads(*[own] * 8))) == 8


def test_a_thread_that_python_did_not_start_has_a_control_block_of_its_own(pair):
    import _thread

    seen, go, done = [], threading.Event(), threading.Event()

    def foreign() -> None:
        seen.append(pair.here.ctl)
        go.wait(20)
        done.set()

    _thread.start_new_thread(foreign, ())
    until(lambda: seen, "the foreign thread")
    mine = Task(lambda: pair.here.ctl).result()
    go.set()
    assert done.wait(20)
    assert mine != seen[0]


# ------------------------------------------------------------------------------ looking
def test_stats_add_up(pair):
    pair.scattered(300).wait(20)  # forgotten at once: closed
    batch = pair.scattered(300).wait(20)
    stats = pair.here.stats()
    assert stats.capacity_slices == 4096
    assert stats.free_slices == 4096 - 512
    assert stats.high_water_slices >= 512
    assert stats.open_batches == 1
    assert stats.counts["slices_filled"] == stats.counts["completed"] == 600
    assert stats.counts["requests"] == 600
    assert set(stats.counts) == {kind.name.lower() for kind in layout.Kind}
    assert stats.caller_freeing_s >= 0
    assert stats.reaper_freeing_s == 0
    batch.close()
    assert pair.here.stats().free_slices == 4096


def test_an_engine_says_what_it_is(engines):
    engine = engines("plain")
    assert repr(engine) == "<Engine 'plain' on loopback, pool + bulk, 0 regions, 0 peers, 4096 of 4096 slots free>"
    engine.close()
    assert repr(engine).endswith("closed>")


# ------------------------------------------------------------------------------ the end
def test_a_closed_engine_refuses_everything_and_can_be_closed_again(pair):
    batch = pair.scattered(3).wait(20)
    pair.here.close()
    pair.here.close()
    for call in (
        lambda: pair.scattered(3),
        lambda: pair.write(0),
        lambda: pair.read(0),
        lambda: pair.here.register(bytearray(8)),
        lambda: pair.here.connect(pair.peer),
    ):
        with pytest.raises(EngineClosed, match="is closed"):
            call()
    with pytest.raises(EngineClosed, match="was closed while"):
        batch.wait()
    with pytest.raises(EngineClosed):
        batch.cancel()
    assert batch.done
    assert batch.quiesced
    batch.close()
    assert pair.here.stats().free_slices == 4096


def test_closing_an_engine_ends_the_waits_for_its_batches(gated):
    batch = gated.scattered(3)
    waiter = Task(batch.wait)
    until(lambda: calls.read_word(gated.here.ctl, batch._handle, layout.BATCH_WAITERS) == 1, "the waiter, asleep")
    closing = Task(gated.here.close)
    until(lambda: batch.done, "the batch, closed by its engine")
    gated.here.provider.open_gate()
    closing.result()
    with pytest.raises(EngineClosed, match="was closed while"):
        waiter.result()


def test_closing_an_engine_ends_the_awaits_for_its_batches(gated):
    async def main() -> None:
        batch = gated.scattered(3)
        waiting = asyncio.ensure_future(_await(batch))
        await asyncio.sleep(0)
        gated.here.provider.open_gate()  # the worker can leave; whether it finishes the batch first is chance
        await asyncio.to_thread(gated.here.close)
        with contextlib.suppress(EngineClosed):
            await asyncio.wait_for(waiting, 20)
        with pytest.raises(EngineClosed):
            await batch

    asyncio.run(main())


def test_closing_an_engine_ends_the_waits_for_capacity(pairs):
    for _ in range(20):
        pair = pairs(slices=256)
        held = pair.scattered(256).wait(20)
        waiter = Task(pair.scattered, 256)
        until(lambda pair=pair: pair.state.shared[layout.SHARED_WAITERS] == 1, "the submitter, asleep")
        pair.here.close()
        with pytest.raises(EngineClosed):
            waiter.result()
        assert held.done
        assert_balanced(pair.here)


def test_closing_an_engine_while_threads_submit_leaves_nobody_waiting(pairs):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            pair = pairs()
            started = threading.Barrier(3)

            def submit(pair: Pair = pair, started: threading.Barrier = started) -> bool:
                started.wait(20)
                with contextlib.suppress(EngineClosed):
                    while True:
                        pair.scattered(3).wait(20).close()
                return True

            tasks = [Task(submit), Task(submit)]
            started.wait(20)
            pair.here.close()
            assert all(task.result() for task in tasks)
    finally:
        sys.setswitchinterval(interval)


def test_an_engine_is_a_context(engines):
    with engines("inside") as engine:
        assert not engine.closed
    assert engine.closed


def test_an_engine_that_is_forgotten_closes_itself():
    engine = Engine("forgotten", **SMALL)
    threads = engine._threads
    del engine
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)
    Engine("forgotten", **SMALL).close()


def test_an_interpreter_with_running_batches_and_open_engines_ends_by_itself():
    script = """
import numpy as np, mooncache
engines = [mooncache.Engine(policy=p, slices=256, batches=4, peers=2) for p in ("bulk", "deferred", "epoch")]
for engine in engines:
    region = engine.register(np.zeros(4096, np.uint8))
    batch = engine.write(engine.name, region.address, region.address + 100, 64)
print("end")
"""
    done = run_python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), "1", True])
def test_a_timeout_that_is_no_number_of_seconds_is_refused_and_nothing_submitted(engines, timeout):
    here, there = engines("here"), engines("there")
    local, remote = here.register(np.zeros(8, np.uint8)), there.register(np.zeros(8, np.uint8))
    with pytest.raises(UsageError, match="timeout in seconds"):
        here.write("there", local.address, remote.address, 8, timeout=timeout)
    assert here.stats().counts["batches_submitted"] == 0
    with here.write("there", local.address, remote.address, 8) as batch:
        with pytest.raises(UsageError, match="timeout in seconds"):
            batch.wait(timeout)
        batch.wait(20)


def test_a_forgotten_engine_closes_itself(engines):
    """Nothing in it refers back to it, so it goes with its last reference."""
    engine = Engine("forgotten")
    threads = list(engine._threads)
    del engine
    assert not any(thread.is_alive() for thread in threads)
    Engine("forgotten").close()
