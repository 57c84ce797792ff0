"""Peers: unknown, wrong, closed, opened again."""

from __future__ import annotations

import contextlib
import sys
import threading

import numpy as np
import pytest

from mooncache import (
    CapacityError,
    MooncacheError,
    TransferFailed,
    TransportError,
    UsageError,
)
from tests.helpers import in_threads


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
    with pytest.raises(CapacityError, match=r"is connected to 2 peers, as many as it may: forget\(\)"):
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
    with pytest.raises(TransportError, match="no engine named"):
        pair.here.connect(pair.peer)
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
