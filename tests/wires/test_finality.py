"""A batch that failed is final at both ends: pages that were called safe stay as their owner left them."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mooncache import Engine, Quiesced, Status, TransferFailed, TransportError, UsageError
from mooncache.kernels import restartable
from mooncache.providers.stream.connections import Port
from tests.helpers import LIMIT, Task, until
from tests.wires import there
from tests.wires.conftest import OVER_SOCKETS, Joined, over
from tests.wires.processes import Far

MiB = 1 << 20
CANARY, REUSED = 255, 2


def begin(pair: Joined, **options):
    """A transfer of everything, in blocks, that the peer has not answered when this returns, mostly."""
    at = np.arange(0, pair.data.size, 16384, dtype=np.int64)
    return pair.write(at, None, 16384, **options)


def statuses(batch) -> set[Status]:
    try:
        batch.wait(LIMIT)
    except TransferFailed as failed:
        return {failure.status for failure in failed.failures}
    return set()


def lay_canary(pair: Joined) -> None:
    pair.far(there.fill, CANARY)


def late(pair: Joined) -> int:
    """Bytes that landed since, once the peer has served whatever still came: a batch over new connections has."""
    spare = pair.far(there.hold, 64, name="spare", mapped=pair.wire.mapped)
    pair.far(there.register, "spare")
    pair.here.write(pair.peer, pair.local.address, spare, 64).wait(LIMIT).close()
    return int((pair.there() != CANARY).sum())


@over(*OVER_SOCKETS)
@pytest.mark.parametrize("how", ["deadline", "stall", "close"])
def test_nothing_lands_at_a_peer_that_was_stopped_when_its_batch_failed(join, wire, how):
    pair = join(wire, 8 * MiB)
    there.set_stall(pair.here, 0.5)
    pair.write(0, 0, 64).wait(LIMIT).close()
    lay_canary(pair)
    pair.far.stop()
    batch = begin(pair, timeout=0.05 if how == "deadline" else None)
    if how == "close":
        until(lambda: pair.here.stats().counts["work_requests"] > 1, "the batch, on its way")
        batch.close()
    else:
        assert statuses(batch) == {Status.TIMED_OUT if how == "deadline" else Status.PEER_GONE}
    until(lambda: batch.quiesced is not Quiesced.NO, "this end, quiesced")
    assert not batch.quiesced
    assert pair.here.stats().unsettled_slices > 0
    with pytest.raises(TimeoutError, match=r"still in use .* this engine's are free"):
        batch.wait_quiesced(0)
    pair.data[:] = REUSED
    pair.far.go_on()
    batch.wait_quiesced(LIMIT)
    assert batch.quiesced is Quiesced.BOTH
    assert pair.here.stats().unsettled_slices == 0
    lay_canary(pair)
    assert late(pair) == 0


@over(*OVER_SOCKETS)
@pytest.mark.parametrize("op", ["write", "read"])
def test_a_deadline_costs_other_batches_nothing(join, wire, op):
    """Their slices travel again, over connections made anew, once the peer has let go of the former ones."""
    pair = join(wire, 8 * MiB)
    lasting = [getattr(pair, op)(0, 0, 64), getattr(pair, op)(MiB, MiB, 4 * MiB)]
    for batch in lasting:
        batch.wait(LIMIT).close()
    pair.far.stop()
    others = [getattr(pair, op)(MiB, MiB, 3 * MiB), getattr(pair, op)(4 * MiB, 4 * MiB, MiB, notify=b"all of it")]
    assert statuses(begin(pair, timeout=0.05)) == {Status.TIMED_OUT}
    assert not any(batch.done for batch in others)
    others.append(getattr(pair, op)(5 * MiB, 5 * MiB, MiB))  # nobody has to know
    pair.far.go_on()
    for batch in others:
        assert statuses(batch) == set()
        batch.close()
    a, b = (pair.data, pair.there()) if op == "write" else (pair.data, pair.there_at_first)
    assert (a[MiB : 6 * MiB] == b[MiB : 6 * MiB]).all()


@over(*OVER_SOCKETS)
def test_what_is_posted_while_a_connection_is_renewed_is_sent(join, wire, monkeypatch):
    """The worker has the new connection, posts and completes, before the thread that made it has gone on."""
    pair, attach = join(wire, 8 * MiB), Port.attach
    pair.write(0, 0, 64).wait(LIMIT).close()
    pair.far.stop()
    other = pair.write(4 * MiB, 4 * MiB, MiB, notify=b"posted last")

    def attach_and_wait(*arguments):
        attach(*arguments)
        until(lambda: other.done, "the end of the batch")

    monkeypatch.setattr(Port, "attach", attach_and_wait)
    assert statuses(begin(pair, timeout=0.05)) == {Status.TIMED_OUT}
    pair.far.go_on()
    other.wait(LIMIT).close()


@over(*OVER_SOCKETS)
def test_what_waits_for_a_renewed_connection_fails_when_the_peer_is_dead(join, wire):
    pair = join(wire, 8 * MiB)
    pair.write(0, 0, 64).wait(LIMIT).close()
    pair.far.stop()
    other = pair.write(MiB, MiB, 3 * MiB)
    assert statuses(begin(pair, timeout=0.05)) == {Status.TIMED_OUT}
    pair.far.kill()
    assert statuses(other) == {Status.PEER_GONE}
    other.wait_quiesced(LIMIT)


@over(*OVER_SOCKETS)
def test_an_engine_that_closes_says_what_is_still_in_doubt(join, wire):
    """It asks the peer for a second; nobody asks afterwards."""
    pair = join(wire, 8 * MiB)
    pair.write(0, 0, 64).wait(LIMIT).close()
    lay_canary(pair)
    there.set_stall(pair.here, 0.5)
    pair.far.stop()
    batch = begin(pair)
    assert statuses(batch) == {Status.PEER_GONE}
    Task(pair.here.close).result()
    assert batch.quiesced is Quiesced.SOURCE
    pair.data[:] = REUSED
    pair.far.go_on()
    until(lambda: pair.far(there.logged, "ended"), "the end of the connection, there")
    assert set(pair.there()) == {CANARY}


def test_a_dead_peer_leaves_nothing_in_doubt(join, wire):
    pair = join(wire, 8 * MiB)
    batches = [begin(pair) for _ in range(4)]
    pair.far.kill()
    assert statuses(batches[-1]) <= {Status.PEER_GONE}
    for batch in batches:
        batch.wait_quiesced(LIMIT)
    assert pair.here.stats().unsettled_slices == 0


def test_a_dead_initiator_writes_over_nobody(join, fars, engines, wire):
    """We are the target. One peer dies in the middle; another, connected before, writes the same pages."""
    here = engines(provider=wire.provider)
    pages = here.allocate(4 * MiB) if wire.mapped else np.zeros(4 * MiB, np.uint8)
    region = here.register(pages)
    dying, other = fars(), fars()
    for far, seed in ((dying, 4), (other, 5)):
        far(there.target, 4 * MiB, provider=wire.provider, mapped=wire.mapped, seed=seed)
        far(there.connect, here.address)
    (name,) = dying(there.names)
    for _ in range(3):
        dying(there.begin, here.address, region.address, 16384, by_lanes=wire.by_lanes)
    dying.kill()
    here.fence(name)
    other(there.begin, here.address, region.address, 16384, by_lanes=wire.by_lanes)
    assert other(there.finish) == {"OK"}
    assert (pages == np.frombuffer(other(there.read), np.uint8)).all()


def test_nothing_that_a_peer_submitted_before_a_fence_lands_after_it(join, fars, engines, wire):
    here = engines(provider=wire.provider)
    pages = here.allocate(4 * MiB) if wire.mapped else np.zeros(4 * MiB, np.uint8)
    region = here.register(pages)
    writer = fars()
    writer(there.target, 4 * MiB, provider=wire.provider, mapped=wire.mapped, seed=4)
    (name,) = writer(there.names)
    for _ in range(10):
        writer(there.begin, here.address, region.address, 16384, by_lanes=wire.by_lanes)
        here.fence(name)
        pages[:] = CANARY
        assert writer(there.finish) <= {"PEER_GONE", "OK"}
        assert (pages == CANARY).all()

    def written() -> bool:
        writer(there.begin, here.address, region.address, 16384, by_lanes=wire.by_lanes)
        return writer(there.finish) == {"OK"}

    until(written, "a batch submitted after the peer heard of the fence, arrived")
    assert (pages == np.frombuffer(writer(there.read), np.uint8)).all()


@over(*OVER_SOCKETS)
def test_a_fence_does_not_wait_for_a_stopped_peer(fars, engines, wire):
    here = engines(provider=wire.provider)
    pages = np.zeros(8 * MiB, np.uint8)
    region = here.register(pages)
    writer = fars()
    writer(there.target, 8 * MiB, provider=wire.provider, seed=4)
    (name,) = writer(there.names)
    writer(there.begin, here.address, region.address, 16384, by_lanes=wire.by_lanes)
    assert_fenced_while_stopped(here, writer, name, pages)


def assert_fenced_while_stopped(here: Engine, writer: Far, name: str, pages: np.ndarray) -> None:
    """The peer `name` is stopped, with a batch under way, and fenced; when it goes on nothing of that lands."""
    writer.stop()
    try:
        Task(here.fence, name).result()
        pages[:] = CANARY
    finally:
        writer.go_on()
    writer(there.finish)
    assert (pages == CANARY).all()


@over("mapped", "process")
def test_a_fence_does_not_wait_for_a_peer_stopped_in_the_middle_of_a_copy(fars, engines, wire):
    """It is stopped when the copy has come so far, mostly between two instructions of it."""
    if not restartable.restarts(restartable.row()):
        pytest.skip("this libc, system or CPU has no restartable sequences")
    here, writer = engines(provider=wire.provider), fars()
    pages = here.allocate(8 * MiB) if wire.mapped else np.zeros(8 * MiB, np.uint8)
    region = here.register(pages)
    writer(there.target, 8 * MiB, provider=wire.provider, mapped=wire.mapped, seed=4)
    writer(there.fill, 1)
    (name,) = writer(there.names)

    def written() -> bool:
        writer(there.begin, here.address, region.address, 65536)
        return writer(there.finish) == {"OK"}

    for at in range(0, pages.size, pages.size // 16):
        until(written, "a batch submitted after the peer heard of the fence, arrived")
        pages[:] = CANARY
        writer(there.begin, here.address, region.address, 65536)
        end = time.monotonic() + LIMIT
        while pages[at] == CANARY:
            assert time.monotonic() < end
        assert_fenced_while_stopped(here, writer, name, pages)


@over("mapped")
def test_a_fence_says_so_when_a_peer_was_stopped_in_the_middle_of_a_copy(fars, engines, wire):
    here = engines(provider=wire.provider)
    pages = here.allocate(MiB)
    region = here.register(pages)
    writer = fars()
    writer(there.target, MiB, provider=wire.provider, mapped=True, seed=4)
    (name,) = writer(there.names)
    writer(there.begin, here.address, region.address, 16384)
    writer(there.finish)
    writer(there.step_guard, here.address)
    since = time.monotonic()
    with pytest.raises(TransportError, match="stopped in the middle of a copy"):
        here.fence(name, timeout=0.2)
    assert time.monotonic() - since < LIMIT
    writer(there.step_guard, here.address)
    here.fence(name)


def test_a_fence_of_strangers_ends_nothing(engines, wire):
    here = engines(provider=wire.provider)
    assert here.fence("nobody") == 0
    with pytest.raises(UsageError, match="expected a timeout"):
        here.fence("nobody", timeout="soon")
