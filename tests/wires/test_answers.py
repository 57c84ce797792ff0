"""What a target that means no good answers: its peers' batches fail typed, and only a read's own ranges change."""

from __future__ import annotations

import contextlib
import queue
import socket
from typing import Any

import numpy as np
import pytest

from mooncache import DiscoveryError, MooncacheError, Status, TransferFailed, TransportError
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.stream import connections
from mooncache.providers.stream.frames import Frame
from mooncache.providers.stream.lane import FRAMES_VERSION, LaneState
from mooncache.providers.stream.tcp import Tcp
from tests.helpers import LIMIT, Task, assert_balanced, random_bytes, until
from tests.wires import there
from tests.wires.fake import FakeTarget
from tests.wires.raw import frame, receive, receive_head

END = bytes(8)  # a good trailer
N, LENGTH = 4, 100


@pytest.fixture
def fake():
    with FakeTarget() as fake:
        yield fake


@pytest.fixture
def here(engines):
    return engines(provider="tcp")


def connect(here, fake):
    """The lane of the only worker."""
    task = Task(here.connect, fake.address)
    lane = fake.lane()
    task.result()
    return lane


READS = {
    "another sequence number": frame(Frame.DATA, 7, [], bytes(N * LENGTH) + END, size=N * LENGTH),
    "a negative one": frame(Frame.DATA, -1, [], bytes(N * LENGTH) + END, size=N * LENGTH),
    "an acknowledgement": frame(Frame.ACK, 0),
    "too few bytes": frame(Frame.DATA, 0, [], bytes(N * LENGTH - 1) + END, size=N * LENGTH - 1),
    "too many bytes": frame(Frame.DATA, 0, [], bytes(N * LENGTH + 1) + END, size=N * LENGTH + 1),
    "no bytes": frame(Frame.DATA, 0, [], END, size=0),
    "a negative size": frame(Frame.DATA, 0, [], bytes(N * LENGTH) + END, size=-N * LENGTH),
    "a failure too many": frame(Frame.DATA, 0, [(i, 10, 0) for i in range(N + 1)], END, size=0),
    "the same failure twice": frame(Frame.DATA, 0, [(0, 10, 0)] * N, END, size=0),
    "257 failures": frame(Frame.DATA, 0, [(0, 10, 0)] * 257, END, size=0),
    "-1 failures": frame(Frame.DATA, 0, [], END, count=-1, size=0),
    "an index behind the last": frame(Frame.DATA, 0, [(N, 10, 0)], bytes(N * LENGTH) + END, size=N * LENGTH),
    "a negative index": frame(Frame.DATA, 0, [(-1, 10, 0)], bytes(N * LENGTH) + END, size=N * LENGTH),
    "a huge index": frame(Frame.DATA, 0, [(1 << 62, 10, 0)], bytes(N * LENGTH) + END, size=N * LENGTH),
    "a failure that is none": frame(Frame.DATA, 0, [(0, 0, 0)], bytes(N * LENGTH) + END, size=N * LENGTH),
    "a failure of ours": frame(Frame.DATA, 0, [(0, 4, 0)], bytes(N * LENGTH) + END, size=N * LENGTH),
    "an unknown failure": frame(Frame.DATA, 0, [(0, 999, 0)], bytes(N * LENGTH) + END, size=N * LENGTH),
    "a request": frame(Frame.WRITE, 0, [(0, 64, 0)], bytes(64)),
    "another magic": frame(Frame.DATA, 0, [], bytes(N * LENGTH) + END, magic=1 << 8, size=N * LENGTH),
    "garbage": random_bytes(1000, 4).tobytes(),
    "half an answer": frame(Frame.DATA, 0, [], bytes(N * LENGTH) + END, size=N * LENGTH)[: 128 + 150],
    "nothing": b"",
}


@pytest.mark.parametrize("answer", READS.values(), ids=READS)
def test_a_bad_answer_to_a_read_fails_that_peers_batches_only(here, fake, far, answer):
    place = far(there.target, 1 << 16, seed=6, provider="tcp")
    data = np.full(1 << 16, 238, np.uint8)
    local = here.register(data)
    lane = connect(here, fake)
    to = np.arange(N, dtype=np.int64) * 1000
    batch = here.read(fake.address, fake.base + to, local.address + to, LENGTH)
    head = receive_head(lane)
    assert head[:2] == (Frame.READ, 0)
    assert [n for _, n, _ in head.entries] == [LENGTH] * N
    with contextlib.suppress(OSError):  # it may have hung up at the first words
        lane.sendall(answer)
        lane.shutdown(socket.SHUT_WR)
    with pytest.raises(TransferFailed) as caught:
        batch.wait(20)
    assert caught.value.peer == fake.address
    assert {f.status for f in caught.value.failures} == {Status.PEER_GONE}
    assert len(caught.value.failures) == N
    batch.close()
    outside = np.ones(data.size, bool)
    for t in to:
        outside[t : t + LENGTH] = False
    assert (data[outside] == 238).all()
    here.read(place.address, place.base, local.address, 1 << 16).wait(20).close()
    assert (data == random_bytes(1 << 16, 6)).all()
    here.close()
    assert_balanced(here)


GONE, GATE = Status.REMOTE_ERROR, Status.REMOTE_ACCESS


@pytest.mark.parametrize(
    ("trailer", "failed"),
    [(b"", {}), (b"\x0a", {0: GATE}), (b"\0\0\x0b\x0a", {2: GONE, 3: GATE}), (b"\0\xff\x04", {1: GONE, 2: GONE}),
     (b"\0\0\0\0\x0a\x0a", {})],
)  # fmt: skip
def test_a_reads_trailer_says_which_slices_are_not_true(here, fake, trailer, failed):
    data = np.zeros(1 << 16, np.uint8)
    local = here.register(data)
    lane = connect(here, fake)
    to = np.arange(N, dtype=np.int64) * 1000
    with here.read(fake.address, fake.base + to, local.address + to, LENGTH) as batch:
        receive_head(lane)
        lane.sendall(frame(Frame.DATA, 0, [], b"x" * N * LENGTH + trailer.ljust(8, b"\0"), size=N * LENGTH))
        until(lambda: batch.done, "the end")
        assert {f.request: f.status for f in batch.failures} == failed


SAID = {WcStatus.REM_ACCESS_ERR, WcStatus.REM_INV_REQ_ERR, WcStatus.REM_OP_ERR, WcStatus.RNR_RETRY_EXC_ERR}
WRITES = {
    "another sequence number": frame(Frame.ACK, 1),
    "data": frame(Frame.DATA, 0, [], END),
    "bytes": frame(Frame.ACK, 0, [], bytes(5)),
    "a failure too many": frame(Frame.ACK, 0, [(1, 10, 0)]),
    "an unknown failure": frame(Frame.ACK, 0, [(0, -1, 0)]),
    **{
        f"a failure that is not the target's: {WcStatus(n).name}": frame(Frame.ACK, 0, [(0, n, 0)])
        for n in set(WcStatus) - SAID
    },
    "the end": b"",
}


@pytest.mark.parametrize("answer", WRITES.values(), ids=WRITES)
def test_a_bad_answer_to_a_write_fails_it(here, fake, answer):
    local = here.register(random_bytes(1 << 16))
    lane = connect(here, fake)
    with here.write(fake.address, local.address, fake.base, LENGTH) as batch:
        receive_head(lane)
        receive(lane, LENGTH)
        lane.sendall(answer)
        if not answer:
            lane.shutdown(socket.SHUT_RDWR)
        with pytest.raises(TransferFailed, match=f"peer '{fake.address}' failed.*PEER_GONE"):
            batch.wait(20)


def test_an_answer_nobody_asked_for_ends_the_connection(here, fake, caplog):
    local = here.register(random_bytes(1 << 16))
    lane = connect(here, fake)
    with here.write(fake.address, local.address, fake.base, LENGTH) as batch:
        receive_head(lane)
        receive(lane, LENGTH)
        lane.sendall(frame(Frame.ACK, 0))
        batch.wait(20)
    lane.sendall(frame(Frame.ACK, 1))
    until(lambda: "an answer matches no request" in caplog.text, "the log")
    assert here._peers.known[fake.address].gone


def test_an_answer_before_the_request_was_sent_is_not_believed(engines):
    """Else the caller would use a buffer again that is still being sent. One frame, longer than sockets hold."""
    with FakeTarget(16 << 20) as fake:
        here = engines(provider="tcp")
        local = here.register(np.zeros(16 << 20, np.uint8))
        lane = connect(here, fake)
        with here.write(fake.address, local.address, fake.base, 16 << 20) as batch:
            assert receive_head(lane).kind == Frame.WRITE
            lane.sendall(frame(Frame.ACK, 0))
            with pytest.raises(TransferFailed, match="PEER_GONE"):
                batch.wait(20)


def test_a_lane_that_breaks_while_its_siblings_are_made_takes_them_along(engines, monkeypatch):
    """Else the queue pair would never come to rest, and the peer could never be connected to again."""
    attach, first = connections.Port.attach, queue.Queue[socket.socket]()
    attached: list[Any] = []

    def slowly(port: Any, lane: Any, sock: Any, queue: Any, peer: str) -> None:
        attach(port, lane, sock, queue, peer)
        attached.append(lane)
        if len(attached) == 1:
            first.get(timeout=LIMIT).close()
            until(lambda: lane.state == LaneState.BROKEN, "the first lane, broken")

    monkeypatch.setattr(connections.Port, "attach", slowly)
    with FakeTarget() as fake:
        here = engines(provider=Tcp(lanes=3))
        local = here.register(random_bytes(1 << 16))
        connecting = Task(here.connect, fake.address)
        first.put(fake.lane())
        fake.lane(), fake.lane()
        peer = connecting.result()
        assert peer.gone
        (pair,) = here.provider.queues_of(fake.address)
        until(lambda: pair.settled, "the queue pair, at rest")
        again = Task(here.connect, fake.address)
        lanes = [fake.lane() for _ in range(3)]
        again.result()
        assert not peer.gone
        batch = here.write(fake.address, local.address, fake.base, LENGTH)
        batch.close()
        assert len(lanes) == 3


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": {"lanes": FRAMES_VERSION + 1}}, TransportError),
        ({"data": None}, TransportError),
        ({"data": []}, TransportError),
        ({"provider": "emulated", "data": {}}, TransportError),
        ({"version": 99}, DiscoveryError),
        ({"generation": 0}, DiscoveryError),
        ({"regions": [{"address": -1, "length": 5, "rkeys": [1], "access": 3}]}, DiscoveryError),
        ({"regions": [{"address": a, "length": 5, "rkeys": [1], "access": 3} for a in (10, 12)]}, MooncacheError),
    ],
    ids=str,
)
@pytest.mark.parametrize("provider", ["tcp", "auto"])
def test_a_peer_that_says_odd_things_of_itself_is_a_typed_error(engines, provider, changes, error):
    with FakeTarget(**changes) as fake, pytest.raises(error):
        engines(provider=provider).connect(fake.address)


@pytest.mark.parametrize(
    "data",
    [
        {"lanes": FRAMES_VERSION, "unix": "UNIX", "segments": 5},
        {"lanes": FRAMES_VERSION, "unix": "UNIX"},
        {"lanes": FRAMES_VERSION, "unix": "UNIX", "segments": [["x"]]},
        {"lanes": FRAMES_VERSION, "unix": "UNIX", "segments": []},
    ],
    ids=str,
)
@pytest.mark.parametrize("provider", ["shm", "auto"])
def test_a_peer_that_offers_odd_memory_is_a_typed_error(engines, provider, data):
    """It is asked to share, and answers with an object of nothing, and no descriptor."""
    with FakeTarget() as fake:
        if data["unix"] == "UNIX":
            data = {**data, "unix": fake.unix}
        fake.changes = {"provider": "shm", "data": data}
        here = engines(provider=provider)
        with pytest.raises(MooncacheError):
            here.connect(fake.address)
