"""What belongs to a peer, to a call and to a process, on a verbs device."""

import threading

import pytest

from mooncache import EngineInherited, TransportError
from mooncache.providers.rdma.provider import KEEPER
from tests.helpers import until
from tests.rdma.test_faults import WAIT, open_descriptors, outgoing, resources, write_right
from tests.test_forks import Child


def test_forget_gives_back_all_that_belonged_to_a_peer_and_it_can_be_connected_to_again(pair):
    def cycle():
        write_right(pair, 4)
        pair.here.forget(pair.peer)

    cycle()
    before, descriptors = resources(), open_descriptors()
    for _ in range(5):
        cycle()
    until(lambda: resources() == before, "as many resources as before")
    until(lambda: open_descriptors() == descriptors, "as many descriptors as before")
    write_right(pair, 4)
    assert resources() != before


def test_the_timeout_of_a_call_bounds_each_step_to_a_connection(pair, monkeypatch):
    going_on, serve = threading.Event(), pair.there.provider.serve

    def late(request):
        assert going_on.wait(WAIT)
        return serve(request)

    with monkeypatch.context() as slow:
        slow.setattr(pair.there.provider, "serve", late)
        with pytest.raises(TransportError, match=r"was not connected within the 0\.5 s"):
            pair.write(0, length=64, timeout=0.5)
        going_on.set()
    pair.here.connect(pair.peer)
    write_right(pair, 4)


def test_a_child_harms_nobody_and_is_told_whose_the_engine_is(pair):
    write_right(pair, 4)
    region = pair.here.provider._registered

    def use():
        with pytest.raises(EngineInherited):
            pair.write(0, length=64)
        pair.here.close()
        pair.there.close()
        region.clear()  # as when the child forgets it
        return True

    assert Child(use).result()
    write_right(pair, 4)
    outgoing(pair)._lanes.data[0].verbs.fail()
    write_right(pair, 4)


def test_a_device_that_is_gone_takes_its_port_down_and_not_the_keeper(pair, monkeypatch):
    """As when its driver is removed: asked for events, it fails."""

    def gone():
        raise TransportError("the test says so")

    write_right(pair, 4)
    provider, connection = pair.here.provider, outgoing(pair)
    monkeypatch.setattr(provider.nics[0], "next_event", gone)
    provider._look_at_events(0)
    until(lambda: connection.gone, "the end of the connection, which has no other port")
    assert any("the test says so" in trouble for trouble in pair.here.stats().trouble)
    assert [t.is_alive() for t in provider.background._threads if t.name == KEEPER] == [True]
    assert provider.down == {0}
