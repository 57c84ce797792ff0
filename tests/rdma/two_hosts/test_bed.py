"""The test bed itself: commands reach the other guest, bytes take the rail they are meant to, a pulled rail is dead."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.testbed.peer import Peer, Process
from tests.testbed.rail import Rail

if TYPE_CHECKING:
    from tests.testbed.verbs import Endpoint


def connect(peer: Peer, rail: Rail) -> tuple[Endpoint, Process]:
    """An endpoint here, connected to one in a process there."""
    from tests.testbed.verbs import Endpoint

    endpoint, far = Endpoint(rail.device), peer.start("python", "-m", "tests.testbed.verbs", rail.device)
    endpoint.connect(json.loads(far.expect("gid")))
    far.send(json.dumps(endpoint.address))
    far.expect("ready")
    return endpoint, far


def arrived(far: Process) -> str:
    far.send("show")
    return bytes.fromhex(far.expect("^[0-9a-f]+$")).rstrip(b"\0").decode()


def test_a_process_there_is_started_spoken_with_and_ended(peer: Peer) -> None:
    program = "import os; print(os.environ['NAME'])\nwhile True: print('heard', input())"
    echo = peer.start("python", "-c", program, NAME="value")
    assert echo.expect() == "value"
    echo.send("first")
    echo.send("second")
    assert echo.expect("second") == "heard second"
    echo.kill()
    assert echo.wait() == -9


def test_what_a_process_there_fails_with_is_told_here(peer: Peer) -> None:
    failing = peer.start("python", "-c", "raise SystemExit('out of luck')")
    with pytest.raises(AssertionError, match="out of luck"):
        failing.expect("never")
    assert failing.wait() == 1


@pytest.mark.parametrize("index", [0, 1])
def test_a_write_arrives_over_each_rail(peer: Peer, rails: list[Rail], index: int) -> None:
    endpoint, far = connect(peer, rails[index])
    assert endpoint.write(b"over rail %d" % index) == "success"
    assert arrived(far) == f"over rail {index}"
    far.kill()


@pytest.mark.parametrize("end", ["here", "there"])
def test_a_pulled_rail_is_dead_and_the_other_is_not(peer: Peer, rails: list[Rail], end: str) -> None:
    ends: list[Any] = [connect(peer, rail) for rail in rails]
    getattr(rails[0], f"pull_{end}")()
    assert ends[0][0].write(b"lost") == {"here": "local QP op error", "there": "retry exceeded error"}[end]
    assert ends[1][0].write(b"safe") == "success"
    assert (arrived(ends[0][1]), arrived(ends[1][1])) == ("", "safe")
    getattr(rails[0], f"plug_in_{end}")()
    endpoint, far = connect(peer, rails[0])
    assert endpoint.write(b"again") == "success"
    assert arrived(far) == "again"
    for _, process in [*ends, (endpoint, far)]:
        process.kill()
