"""The test bed itself: there is a device, and it writes."""

from __future__ import annotations


def test_the_port_is_active(device: str) -> None:
    from tests.testbed.verbs import Endpoint

    assert Endpoint(device).active()


def test_a_write_between_two_queue_pairs_arrives(device: str) -> None:
    from tests.testbed.verbs import Endpoint

    source, target = Endpoint(device), Endpoint(device)
    source.connect(target.address)
    target.connect(source.address)
    data = bytes(range(256)) * 64
    assert source.write(data) == "success"
    assert target.memory.read(len(data), 0) == data
