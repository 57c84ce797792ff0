"""Peers that are killed, stopped, and started again."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from mooncache import Batch, MooncacheError, Quiesced, Status, TransferFailed, TransportError, UsageError
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.stream.frames import Frame
from tests.helpers import Task, assert_balanced, until
from tests.wires import there
from tests.wires.conftest import OVER_SOCKETS, Joined, over
from tests.wires.raw import frame, lane_to, receive_head

MiB = 1 << 20


def outcome(batch: Batch, peer: str) -> set[Status]:
    """How it ended, within the limit; closes it."""
    with batch:
        until(lambda: batch.done, "the end of a batch")
        if not batch.failures:
            return {Status.OK}
        with pytest.raises(TransferFailed, match=repr(peer)) as caught:
            batch.wait()
        assert caught.value.peer == peer
        return {f.status for f in batch.failures}


def gone(pair: Joined) -> bool:
    return pair.here._peers.known[pair.peer].gone


def restart(pair: Joined, fars, **options) -> None:
    """Another process with the same address."""
    pair.far = fars()
    pair.place = pair.far(
        there.target, pair.data.size, mapped=pair.wire.mapped, seed=2, provider=pair.wire.provider, listen=pair.peer,
        **options,
    )  # fmt: skip
    assert pair.place.address == pair.peer


def test_a_peer_killed_in_the_middle_fails_its_batches_and_nobody_elses(join, wire):
    pair = join(wire, 4 * MiB, workers=2, batches=2048)
    other = join(wire, 4 * MiB, here=pair.here)
    at = np.arange(63, dtype=np.int64) * 65_537
    batches, others = [], []
    for k in range(1000):  # 4 GiB: copying all of that takes far longer than dying
        batches.append((pair.write if k % 2 else pair.read)(at, None, 65_536))
        if k % 50 == 0:
            others.append(other.write(0, 0, 4 * MiB))
    until(lambda: any(batch.done for batch in batches), "the first batch, done")
    pair.far.kill()
    ends = [outcome(batch, pair.peer) for batch in batches]
    assert set().union(*ends) == {Status.OK, Status.PEER_GONE}
    assert [outcome(batch, other.peer) for batch in others] == [{Status.OK}] * len(others)
    assert (other.there() == other.data).all()
    with pytest.raises(TransportError, match=f"{pair.peer} refused the connection; is the engine there open"):
        pair.write()
    other.write(0, 0, 4 * MiB).wait(20).close()
    pair.here.close()
    assert_balanced(pair.here)


def test_a_peer_restarted_at_its_address_is_used_again_by_the_next_submit(join, fars, wire):
    pair = join(wire, MiB)
    pair.write(0, 0, MiB).wait(20).close()
    before = pair.here.connect(pair.peer)
    generation, (old,) = before.generation, before.regions
    pair.far.kill()
    until(lambda: gone(pair), "the peer, gone")
    with pytest.raises(TransportError, match=f"{pair.peer} refused the connection"):
        pair.write()
    restart(pair, fars)
    pair.far(there.hold, MiB, name="more")
    more = pair.far(there.register, "more")

    def submitted() -> bool:
        """For a moment after a try that failed, what is submitted is told of that one."""
        with contextlib.suppress(TransportError):
            pair.write(0, 0, MiB).wait(20).close()
            return True
        return False

    # The first batch after a restart that was noticed: it connects anew, and learns what is there now.
    until(submitted, "a batch that reaches the peer")
    assert (pair.there() == pair.data).all()
    pair.here.write(pair.peer, pair.local.address, more.base, 64).wait(20).close()
    after = pair.here.connect(pair.peer)
    assert after is before
    assert after.generation != generation
    assert len(after.regions) == 2
    assert old.rkeys not in {region.rkeys for region in after.regions}
    with lane_to(pair.peer) as sock:  # the old key opens nothing
        sock.sendall(frame(Frame.WRITE, 0, [(pair.place.base, 64, old.rkeys[0])], bytes(64)))
        assert receive_head(sock).entries == [(0, WcStatus.REM_ACCESS_ERR, 0)]
    with pytest.raises(UsageError, match="has not registered all of it"):
        pair.write(0, more.base - pair.place.base + MiB, 64)
    assert (pair.there() == pair.data).all()


@over("tcp", "mapped", "process")
def test_a_peer_restarted_unnoticed_costs_one_batch_at_most(join, fars, wire):
    pair = join(wire, MiB)
    for _ in range(5):
        pair.far.kill()
        restart(pair, fars)
        with contextlib.suppress(TransferFailed):  # it may still go to the dead one
            pair.write(0, 0, MiB).wait(20).close()
        until(lambda: not gone(pair) or pair.write(0, 0, 64).wait(20), "the peer, known to be another")
        pair.write(0, 0, MiB).wait(20).close()
        assert (pair.there() == pair.data).all()


@over("tcp", "mapped", "process", "by_lanes")
def test_an_initiator_killed_in_the_middle_harms_nobody_else(join, fars, engines, wire):
    """It dies while it writes into our memory: its descriptors come back, `unregister` does not wait for it."""
    here = engines(provider=wire.provider)
    before = there.usage().descriptors
    arrays = [here.allocate(4 * MiB) if wire.mapped else np.zeros(4 * MiB, np.uint8) for _ in range(2)]
    places = [here.register(array) for array in arrays]
    held = there.usage().descriptors
    dying, living = fars(), fars()
    for far, place in zip((dying, living), places, strict=True):
        far(there.target, 4 * MiB, provider=wire.provider, mapped=wire.mapped, seed=4, workers=2)
        for op in ("write", "write", "read"):
            far(there.hammer, here.address, place.address, op, block=65_537, by_lanes=wire.by_lanes)
        until(lambda far=far: min(far(there.hammered)) > 0, "transfers")
    dying.kill()
    Task(places[0].unregister).result()
    arrays[0][:] = 170
    rounds = living(there.hammered)
    until(lambda: min(map(int.__sub__, living(there.hammered), rounds)) > 3, "more transfers")
    assert [error for _, error, _, _ in living(there.end_hammers)] == ["", "", ""]
    assert (arrays[0] == 170).all()
    living.close()
    until(lambda: there.usage().descriptors == held, "all descriptors, closed")
    here.close()
    del arrays, places
    until(lambda: there.usage().descriptors <= before, "no descriptor left")


# ------------------------------------------------------------------------------ stopped
@over(*OVER_SOCKETS)
@pytest.mark.parametrize("op", ["write", "read"])
def test_a_stopped_peer_counts_as_gone_after_the_limit_and_can_go_on(join, wire, op, caplog):
    pair = join(wire, 16 * MiB)
    other = join(wire, MiB, here=pair.here)
    there.set_stall(pair.here, 0.5)
    pair.far.stop()
    batch = getattr(pair, op)(0, 0, 16 * MiB)
    small = getattr(pair, op)(0, 0, 64)
    other.write(0, 0, MiB).wait(20).close()
    assert outcome(batch, pair.peer) == {Status.PEER_GONE}
    assert outcome(small, pair.peer) == {Status.PEER_GONE}
    until(lambda: "nothing moved for" in caplog.text, "the log")
    pair.far.go_on()
    pair.data[:] = 9
    pair.write(0, 0, 16 * MiB).wait(20).close()
    assert (pair.there() == 9).all()
    pair.here.close()
    assert_balanced(pair.here)


@over(*OVER_SOCKETS)
def test_closing_does_not_wait_for_a_stopped_peer_longer_than_the_limit(join, wire):
    pair = join(wire, 16 * MiB)
    there.set_stall(pair.here, 0.5)
    until(lambda: pair.far(there.connections), "the connection, with the peer's worker")
    pair.far.stop()
    batch = pair.write(0, 0, 16 * MiB)
    until(lambda: pair.here.stats().counts["work_requests"], "slices, posted")
    Task(pair.here.close).result(20)
    assert batch.quiesced is Quiesced.SOURCE  # what was sent lies in the socket of a process that may go on
    assert_balanced(pair.here)
    pair.far.go_on()
    until(lambda: pair.far(there.logged, "ended"), "the end of the connection, there")


@over("mapped", "process")
def test_a_stopped_peer_can_be_written_to_through_shared_memory(join, wire):
    """One-sided: nobody there has to run."""
    pair = join(wire, MiB)
    pair.far.stop()
    pair.write(0, 0, MiB).wait(20).close()
    pair.data[:] = 0
    pair.read(0, 0, MiB).wait(20).close()
    pair.far.go_on()
    assert (pair.there() == pair.data).all()


def test_descriptors_of_killed_peers_come_back(join, fars, wire):
    pair = join(wire, MiB)
    pair.write().wait(20).close()
    open_then = there.usage().descriptors
    for _ in range(5):
        pair.far.kill()
        until(lambda: gone(pair), "the peer, gone")
        restart(pair, fars)
        with contextlib.suppress(MooncacheError):
            pair.write().wait(20).close()
        pair.write().wait(20).close()
        assert there.usage().descriptors == open_then
