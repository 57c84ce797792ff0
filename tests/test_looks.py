"""Memory registered anew at the target: its peers learn of it by themselves, and no request fails for it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mooncache import Status, TransferFailed
from mooncache.providers.inprocess.emulated import Emulated, Nic
from mooncache.providers.inprocess.loopback import Loopback
from mooncache.providers.shm.provider import Shm
from mooncache.providers.stream.tcp import Tcp
from tests.helpers import POLICIES, Pair, assert_balanced, looks_held, until

WIRES = {
    "loopback": Loopback,
    "emulated": lambda: Emulated(Nic(latency_ns=5000), Nic(latency_ns=7000)),
    "breaking": lambda: Emulated(Nic(latency_ns=5000, breaks=True)),
    "gathering": lambda: Emulated(Nic(latency_ns=5000, breaks=True, gathers=4, signal=4)),
    "tcp": lambda: Tcp(lanes=2),
    "shm": Shm,
}


@pytest.fixture(params=WIRES)
def wired(request, pairs) -> Pair:
    """Two engines over each wire, with two workers each."""
    return pairs(WIRES[request.param](), WIRES[request.param](), workers=2, slices=16 * 1024, queue_depth=64, chain=16)


def blocks(n: int) -> np.ndarray:
    """Scattered requests of 64 bytes."""
    return np.arange(n, dtype=np.int64) * 65


def anew(pair: Pair) -> None:
    """Register the target again: the same range, under another key."""
    pair.remote.unregister()
    pair.remote = pair.there.register(pair.target)


def test_memory_registered_anew_at_the_same_address_is_reached_without_a_failure(wired):
    n = 300
    expected = wired.source[: n * 65].reshape(n, 65)[:, :64]
    for number in range(6):
        wired.target[:] = 0
        wired.write(blocks(n), notify=str(number)).wait(20).close()
        np.testing.assert_array_equal(wired.target[: n * 65].reshape(n, 65)[:, :64], expected)
        anew(wired)
        wired.read(blocks(n), blocks(n) + 65 * n).wait(20).close()
        anew(wired)
    several = [wired.write(blocks(40)) for _ in range(5)]
    for batch in several:
        batch.wait(20).close()
    assert [note.message for note in wired.there.notifications()] == [str(number).encode() for number in range(6)]
    wired.close()
    assert assert_balanced(wired.here).counts["failed"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_under_every_policy_all_comes_back(pairs, policy):
    pair = pairs(policy=policy, slices=16 * 1024)
    for _ in range(3):
        pair.write(blocks(700)).wait(20).close()
        anew(pair)
    pair.write(blocks(700)).close()  # at once
    until(lambda: pair.here.stats().open_batches == 0, "the end of the closed batch")
    pair.close()
    assert_balanced(pair.here)


def test_a_region_that_covers_the_former_one_is_found_too(wired):
    memory = np.zeros(1 << 16, np.uint8)
    region = wired.there.register(memory[:4096])
    for end in (8192, 1 << 16):
        wired.here.write(wired.peer, wired.local.address, region.address, 4096).wait(20).close()
        region.unregister()
        region = wired.there.register(memory[:end])
    wired.here.write(wired.peer, wired.local.address, region.address, 1 << 16).wait(20).close()
    np.testing.assert_array_equal(memory, wired.source[: 1 << 16])


def test_what_is_withdrawn_for_good_fails_once_and_is_refused_from_then_on(wired):
    wired.write(blocks(100)).wait(20).close()
    wired.remote.unregister()
    less = wired.there.register(wired.target[:64])
    before = wired.target.copy()
    batch = wired.write(blocks(100))
    with pytest.raises(TransferFailed, match="100 of 100 requests"):
        batch.wait(20)
    assert {failure.status for failure in batch.failures} == {Status.REMOTE_ACCESS}
    batch.close()
    np.testing.assert_array_equal(wired.target, before)
    assert [region.length for region in wired.here.connect(wired.peer).regions] == [64]
    wired.here.write(wired.peer, wired.local.address, less.address, 64).wait(20).close()
    wired.close()
    assert_balanced(wired.here)


def test_less_access_than_before_is_refused(pairs):
    pair = pairs()
    pair.write(blocks(10)).wait(20).close()
    pair.remote.unregister()
    pair.remote = pair.there.register(pair.target, access="read")
    with pytest.raises(TransferFailed, match="REMOTE_ACCESS"):
        pair.write(blocks(10)).wait(20)


@pytest.mark.parametrize("wire", ["loopback", "breaking", "tcp"])
@pytest.mark.parametrize("how", ["cancel", "deadline", "close", "close the engine"])
def test_what_waits_for_a_peer_that_does_not_answer_ends_all_the_same(pairs, wire, how):
    pair = pairs(WIRES[wire](), WIRES[wire]())
    pair.write(blocks(300)).wait(20).close()
    pair.remote.unregister()
    with looks_held(pair.here) as asked:
        batch = pair.write(blocks(300), timeout=0.3 if how == "deadline" else None)
        assert asked.wait(20)
        if how == "close the engine":
            pair.here.close()
        elif how == "close":
            batch.close()
            until(lambda: batch.quiesced, "the end of the closed batch")
        else:
            if how == "cancel":
                batch.cancel()
            with pytest.raises(TransferFailed, match="CANCELLED" if how == "cancel" else "TIMED_OUT"):
                batch.wait(20)
            batch.close()
    pair.close()
    assert_balanced(pair.here)


def test_others_go_on_while_a_peer_is_asked(engines, pairs, monkeypatch):
    pair = pairs()
    other = engines("another one")
    memory = np.zeros(64, np.uint8)
    there = other.register(memory)
    pair.here.connect(other.name)
    pair.write(0).wait(20).close()
    asked, answer, look_up = threading.Event(), threading.Event(), pair.here._peers._look_up

    def slowly(name, *rest):
        if name == pair.peer:
            asked.set()
            answer.wait(60)
        return look_up(name, *rest)

    monkeypatch.setattr(pair.here._peers, "_look_up", slowly)
    anew(pair)
    waiting = pair.write(blocks(10))
    assert asked.wait(20)
    for _ in range(3):
        there.unregister()
        there = other.register(memory)
        pair.here.write(other.name, pair.local.address, there.address, 64).wait(20).close()
    assert not waiting.done
    answer.set()
    waiting.wait(20).close()
    assert pair.here.connect(pair.peer).table.header["begun"] >= 1
