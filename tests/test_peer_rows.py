"""Rows of peers: given to others, rebuilt for another shape; slots of regions at a peer; what a closed engine keeps."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import numpy as np
import pytest

from mooncache import CapacityError, Engine, EngineClosed, Status, TransportError, UsageError, limits
from mooncache.deadline import Deadline
from mooncache.descriptor import Descriptor, RemoteRegion
from mooncache.kernels import calls
from mooncache.kernels.enums import Opcode, QueueState
from mooncache.kernels.queue import INDEX_SHIFT
from mooncache.kernels.settings import Settings
from mooncache.kernels.state import CompletionQueue, QueuePair, State
from mooncache.kernels.submit import submit_one
from mooncache.kernels.tables import RegionTable
from mooncache.peer import Peer
from mooncache.providers.inprocess.emulated import Emulated, Nic
from tests.helpers import SMALL, Task, until
from tests.kernels.entries import Gated

KiB, MiB = 1 << 10, 1 << 20


# ------------------------------------------------------------------------------ rows
@pytest.fixture
def state() -> State:
    made = State(Settings(slices=256, batches=4, peers=3))
    made.poll_from(0, [CompletionQueue(64)])
    return made


def pairs(n: int, **options) -> list[list[QueuePair]]:
    return [[QueuePair(4096 * (i + 1), 8, **options) for i in range(n)]]


OTHERS = {
    "more": pairs(3),
    "fewer": pairs(1),
    "depth": [[pair._replace(depth=16) for pair in pairs(2)[0]]],
    "gathers": [[pair._replace(gathers=4) for pair in pairs(2)[0]]],
    "inline": [[pair._replace(inline=64) for pair in pairs(2)[0]]],
    "weight": [[pair._replace(weight=7) for pair in pairs(2)[0]]],
    "remote keys": [[pair._replace(rkeys=1) for pair in pairs(2)[0]]],
    "completion queue": [[pair._replace(cq=1) for pair in pairs(2)[0]]],
}


@pytest.mark.parametrize("shape", OTHERS)
def test_a_peer_that_comes_back_with_another_shape_gets_other_rows(state, shape):
    table = RegionTable("a peer")
    first = state.connect(0, table, pairs(2))
    other = OTHERS[shape]
    assert state.fits(0, pairs(2))
    assert not state.fits(0, other)
    kept = state.take_rows(0)
    assert state.fits(0, other)
    rows = state.connect(0, table, other)
    assert [row.pair for row in rows] == other[0]
    for row, pair in zip(rows, other[0], strict=True):
        fields = {"qp": pair.address, "depth": pair.depth, "weight": pair.weight}
        assert {field: row.row[field] for field in fields} == fields
    tags = {int(row.row["tag"]) for row in first} & {int(row.row["tag"]) for row in rows}
    assert not tags  # what comes late for a former row names nothing
    assert kept is not None


def test_a_closed_row_is_led_to_another_queue_pair_of_the_same_shape(state):
    table = RegionTable("a peer")
    (row,) = state.connect(0, table, pairs(1, breaks=True))
    moved = [[pairs(1, breaks=True)[0][0]._replace(address=12_288)]]
    assert row.state == QueueState.CLOSED
    assert state.fits(0, moved)
    assert state.connect(0, table, moved) == [row]
    assert row.row["qp"] == 12_288
    row.row["state"] = QueueState.READY
    assert not state.fits(0, [[moved[0][0]._replace(address=4096)]])


def test_rows_that_were_taken_are_given_again_and_the_table_grows_no_further(state):
    for turn in range(100):
        rows = state.connect(turn % 3, RegionTable("a peer"), pairs(1 + turn % 2))
        indices = [int(row.row["tag"]) >> INDEX_SHIFT for row in rows]
        assert set(indices) <= {0, 1}
        for index, row in zip(indices, rows, strict=True):
            assert state.queue_tables[0][index] == row.address
        state.disconnect(turn % 3)
        assert set(state.queue_tables[0][:2]) <= {state._vacant.address, 0}
    assert state.worker_rows[0]["queue_count"] == 2


def test_too_many_queue_pairs_are_refused_and_nothing_is_changed(state):
    state.queue_tables[0] = state.queue_tables[0][:3]
    state.connect(0, RegionTable("a peer"), pairs(2))
    tables, count = state.peer_tables.copy(), int(state.worker_rows[0]["queue_count"])
    with pytest.raises(CapacityError, match="at most 3 queue pairs, and 2 are in use"):
        state.connect(1, RegionTable("another"), pairs(2))
    assert (state.peer_tables == tables).all()
    assert int(state.worker_rows[0]["queue_count"]) == count


def test_slices_longer_than_what_a_nic_takes_are_refused_and_nothing_is_changed():
    state = State(Settings(slices=256, batches=4, peers=3, slice_bytes=MiB))
    state.poll_from(0, [CompletionQueue(64)])
    table, tables = RegionTable("a peer"), state.peer_tables.copy()
    with pytest.raises(UsageError, match=r"slice_bytes is 1048576, .* at most 1048576 bytes .* slice_bytes=524288 or"):
        state.connect(0, table, pairs(2, message_bytes=MiB))
    assert (state.peer_tables == tables).all()
    assert not state.queues
    rows = state.connect(0, table, pairs(2, message_bytes=8 * MiB, gathers=16))
    assert [row.row["gathers"] for row in rows] == [4, 4]


def test_a_handle_of_a_former_peer_is_refused_though_its_row_is_anothers(pair, engines):
    former = pair.here.connect(pair.peer)
    pair.here.forget(former)
    other = engines()
    assert pair.here.connect(other.name).index == former.index
    status = submit_one(pair.here.ctl, former.handle, Opcode.WRITE, 0, pair.local.address, pair.remote.address, 8)
    assert status == -Status.STALE_PEER
    assert pair.here.stats().open_batches == 0


def test_emulated_peers_may_come_back_with_another_number_of_rails(engines):
    nics = Nic(latency_ns=0), Nic(latency_ns=0)
    here = engines("here", provider=Emulated(*nics))
    data = np.full(KiB, 9, np.uint8)
    local = here.register(data)
    for rails, keys in ((1, [0, 0]), (2, [0, 1]), (1, [0, 0])):
        with Engine("there", provider=Emulated(*nics[:rails]), **SMALL) as there:
            target = np.zeros(KiB, np.uint8)
            place = there.register(target)
            for k in range(4):
                here.write("there", local.address, place.address + 256 * k, 256).wait(20).close()
            assert (target == 9).all()
            assert [row.pair.rkeys for row in here._state.queues[0, 0]] == keys


# ------------------------------------------------------------------------------ regions at a peer
def described(*regions: RemoteRegion) -> Descriptor:
    return Descriptor("peer", 1, "", "loopback", regions, None)


def region(k: int, key: int = 1) -> RemoteRegion:
    return RemoteRegion((k + 1) << 20, 1 << 20, (key,), 3)


def test_a_region_gets_the_slot_of_a_former_one_only_when_no_older_batch_is_under_way():
    peer = Peer(0, "peer")
    peer.refresh(described(region(0)), calls.NEVER)
    slot = peer._known[region(0)]
    before = peer.table.keys[0, slot]
    for k in range(1, 50):
        peer.refresh(described(region(k)), 1)  # a batch of long ago is under way
        assert peer._known[region(k)] != slot
        assert peer.table.keys[0, slot] == before
    peer.refresh(described(), calls.NEVER)
    peer.refresh(described(), calls.NEVER)
    assert peer.table.room == limits.REGIONS


@pytest.mark.parametrize(
    ("regions", "error", "says"),
    [
        ([region(k) for k in range(limits.REGIONS)], CapacityError, "wait for those, register fewer, or"),
        ([region(0, 2), region(0, 3)], TransportError, "twice"),
    ],
)
def test_regions_that_cannot_be_known_change_nothing(regions, error, says):
    peer = Peer(0, "peer")
    peer.refresh(described(region(0), region(1)), calls.NEVER)
    peer.refresh(described(region(1)), calls.NEVER)  # the slot of the other is retired
    known, room = dict(peer._known), peer.table.room
    with pytest.raises(error, match=says):
        peer.refresh(described(*regions), 1)
    assert peer._known == known
    assert peer.table.room == room


def test_slices_that_wait_to_be_posted_are_never_posted_under_the_key_of_another_region(pairs):
    """The peer registers its memory anew, many times, while a batch has slices that name the former region."""
    pair = pairs(Gated(), Gated(), queue_depth=4)
    batch = pair.scattered(64)
    former = pair.remote
    for _ in range(5):
        former.unregister()
        former = pair.there.register(pair.target)
        pair.here._peers.ask(pair.peer, news=True).result(Deadline())
    pair.here.provider.open_gate()
    until(lambda: batch.done, "the batch, done")
    assert {failure.status for failure in batch.failures} <= {Status.REMOTE_ACCESS}
    peer = pair.here.connect(pair.peer)
    assert not peer.table.refused[list(peer._known.values())].any()  # no key of what is there now was tried
    batch.close()


# ------------------------------------------------------------------------------ closed engines
@pytest.mark.parametrize("provider", ["tcp", "shm", "auto", "loopback", "emulated"])
def test_a_closed_engine_is_freed_at_once_without_the_cycle_collector(engines, provider):
    target = engines(provider=provider)
    pages = target.allocate(MiB)
    place = target.register(pages)

    def once() -> list[weakref.ref]:
        with Engine(provider=provider, **SMALL) as engine:
            source = np.ones(MiB, np.uint8)
            local = engine.register(source)
            peer = target.address or target.name
            with engine.write(peer, local.address, place.address, 4096) as batch:
                batch.wait(20)
        return [weakref.ref(engine), weakref.ref(engine.provider), weakref.ref(engine._state), weakref.ref(local)]

    gc.collect()
    gc.disable()
    try:
        once()
        refs = once()
        until(lambda: all(ref() is None for ref in refs), "the engine, freed")
    finally:
        gc.enable()


@pytest.mark.parametrize("provider", ["tcp", "shm", "auto", "loopback", "emulated"])
def test_a_closed_engine_that_is_held_keeps_little_and_its_batches_answer(engines, provider):
    target = engines(provider=provider)
    place = target.register(np.zeros(MiB, np.uint8))
    engine = engines(provider=provider, slices=1 << 20)
    local = engine.register(np.ones(MiB, np.uint8))
    peer = target.address or target.name
    good = engine.write(peer, local.address, place.address, KiB).wait(20)
    open_ = engine.write(peer, local.address, place.address, KiB)
    columns = [weakref.ref(array) for array in engine._state.arrays if array.nbytes >= MiB]
    assert columns
    engine.close()
    assert not any(ref() is not None for ref in columns)
    for batch in (good, open_):
        assert batch.done
        assert batch.quiesced
        assert batch.slices == 0
        batch.close()
    assert not local.registered
    assert engine.stats().free_slices == engine.stats().capacity_slices
    assert engine.stats().open_batches == 0
    assert "closed" in repr(engine)
    with pytest.raises(EngineClosed):
        engine.write(peer, local.address, place.address, KiB)
    with pytest.raises(UsageError):
        local.unregister()


def test_threads_that_wait_while_the_engine_closes_come_back(pairs):
    for _ in range(10):
        pair = pairs("tcp")
        batches = [pair.scattered(256) for _ in range(8)]
        waiting = [Task(_ended, batch) for batch in batches]
        pair.here.close()
        assert all(task.result() for task in waiting)


def _ended(batch) -> bool:
    with suppress(EngineClosed):
        batch.wait(20)
    return True
