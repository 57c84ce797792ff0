"""What can be registered, and what a region is."""

from __future__ import annotations

import array
import gc
import itertools
import mmap
import weakref
from functools import partial

import numpy as np
import pytest

from mooncache import (
    Status,
    TransferFailed,
    UsageError,
)
from mooncache.kernels import calls
from mooncache.memory import range_of
from mooncache.providers.inprocess.emulated import Emulated, Nic
from tests.helpers import POLICIES, STORES, batch_field, unchanged, until
from tests.kernels.entries import Gated


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
    with pytest.raises(UsageError, match="is not registered with this engine"):
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


@pytest.mark.parametrize(("store", "policy"), list(itertools.product(STORES, POLICIES)))
def test_a_region_is_in_use_by_as_many_slices_as_have_no_answer(pairs, store, policy):
    """Whatever the policy has taken out of the batch's chain by then, and whoever else has chunks meanwhile."""
    pair = pairs(Gated(), Gated(), store=store, policy=policy, slices=16 * 1024, queue_depth=2048)
    slots = np.array([pair.local._parts[0].slot])
    provider, n = pair.here.provider, 1500
    provider.open_gate()
    pair.scattered(700).wait(20).close()  # so that the free list is not in its first order
    provider.shut_gate()
    batch = pair.scattered(n)
    until(lambda: provider.queues[0][0].outstanding == n, "the slices, posted")
    remaining = partial(batch_field, pair.here, batch, "remaining")
    left = n
    for now in (1, 254, 1, 1, 443, 324, n - 1025):
        left -= now
        provider.let(now)
        until(lambda left=left: remaining() == left, "the answers")
        assert calls.withdraw(pair.here.ctl, slots) == left
    batch.close()
    assert calls.withdraw(pair.here.ctl, slots) == 1
    provider.open_gate()
    until(lambda: batch.quiesced, "the end of the detached batch")
    pair.local.unregister()


@pytest.mark.parametrize(("store", "policy"), list(itertools.product(STORES, POLICIES)))
def test_no_region_is_let_go_beside_a_worker_that_still_uses_it(pairs, store, policy):
    nic = Nic(move_bytes=False, latency_ns=0, messages_per_s=3_000_000)
    pair = pairs(Emulated(nic), Emulated(nic), store=store, policy=policy, slices=256 * 1024, arena=1 << 21)
    at = np.arange(20_000, dtype=np.int64) * 100
    for _ in range(3):
        batch = pair.write(at, length=64)
        while True:
            try:
                pair.local.unregister()
            except UsageError:
                continue
            assert batch_field(pair.here, batch, "remaining") == 0
            break
        batch.wait(20).close()
        pair.local = pair.here.register(pair.source)


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


def test_a_pair_that_names_memory_which_is_not_there_is_refused():
    with mmap.mmap(-1, 1 << 20) as hole:
        array = np.frombuffer(hole, np.uint8)
        address = array.ctypes.data
        assert range_of((address, 1 << 20)).writable
        del array
    with pytest.raises(UsageError, match="not mapped, or protected"):
        range_of((1 << 12, 1 << 12))
