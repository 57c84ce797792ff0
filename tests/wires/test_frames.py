"""What strangers send to a target: nothing but what the keys permit reaches memory, whatever comes."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mooncache.discovery.dial import dial
from mooncache.errors import DiscoveryError, UsageError
from mooncache.kernels.verbs import WcStatus
from mooncache.limits import NOTE_BYTES_MOST, NOTE_HEAD_BYTES
from mooncache.providers.stream.frames import FRAME_SLICES, SLICE_BYTES_MAX, Frame
from mooncache.providers.stream.lane import FRAMES_VERSION
from tests.helpers import random_bytes, until
from tests.wires import there
from tests.wires.processes import Far, Nursery
from tests.wires.raw import closed, frame, lane_to, receive, receive_head

KiB = 1 << 10
FIRST, LAST = 64 * KiB, 128 * KiB  # what is registered of 192 KiB
CANARY, BLANK = 238, 119
DENIED = int(WcStatus.REM_ACCESS_ERR)
TOO_LONG = NOTE_BYTES_MOST + NOTE_HEAD_BYTES + 1  # for a notification of any engine's


class Target:
    """An engine in another process with one range registered for both, in the middle of others that are not."""

    def __init__(self, far: Far) -> None:
        self.far, self._numbers = far, itertools.count()
        self.address = far(there.open_engine, provider="shm")
        far(there.hold, 192 * KiB)
        far(there.fill, CANARY)
        self.base = far(there.register, first=FIRST, last=LAST).base
        self.key = far(there.key)
        far(there.hold, 4 * KiB, name="withdrawn")
        self.withdrawn = far(there.register, "withdrawn").base
        self.old_key = far(there.key, "withdrawn")
        far(there.unregister, "withdrawn", fill=CANARY)

    def reset(self) -> None:
        self.far(there.fill, BLANK, first=FIRST, last=LAST)

    def inside(self) -> np.ndarray:
        return np.frombuffer(self.far(there.read, first=FIRST, last=LAST), np.uint8)

    def assert_nothing_outside(self) -> None:
        everything = np.frombuffer(self.far(there.read), np.uint8)
        assert (everything[:FIRST] == CANARY).all()
        assert (everything[LAST:] == CANARY).all()
        assert set(self.far(there.read, "withdrawn")) == {CANARY}

    def assert_well(self) -> None:
        """Others are served as ever."""
        with lane_to(self.address) as sock:
            body = random_bytes(500, 1).tobytes()
            sock.sendall(frame(Frame.WRITE, 0, [(self.base + 7, 500, self.key)], body))
            assert receive_head(sock)[:4] == (Frame.ACK, 0, [], 0)
            sock.sendall(frame(Frame.READ, 1, [(self.base + 7, 500, self.key)]))
            assert receive_head(sock)[:4] == (Frame.DATA, 1, [], 500)
            assert receive(sock, 500) == body
            assert receive(sock, 8) == bytes(8)
            self.assert_nothing_outside()

    def lane(self) -> socket.socket:
        """A connection of a stranger with a name of its own."""
        self.stranger = f"stranger {next(self._numbers)}"
        return lane_to(self.address, self.stranger)

    def said(self) -> list[str]:
        """What the log says of the end of the last such connection."""
        return self.far(there.logged, f"connection from peer '{self.stranger}' ended: ")


@pytest.fixture(scope="module")
def lasting(nursery: Nursery) -> Iterator[Target]:
    """One for the whole file: nothing here does it any harm."""
    far = nursery.fork()
    yield Target(far)
    far(there.balanced)
    far.close()


@pytest.fixture
def target(lasting: Target) -> Target:
    lasting.reset()
    return lasting


@pytest.fixture
def lane(target: Target) -> Iterator[socket.socket]:
    with target.lane() as sock:
        yield sock


# ------------------------------------------------------------------------------ slices that are refused
REFUSED = {
    "another key": lambda t: (t.base, 64, t.key ^ 1 << 40),
    "no key": lambda t: (t.base, 64, 0),
    "the key of another slot": lambda t: (t.base, 64, t.key ^ 1),
    "a negative key": lambda t: (t.base, 64, t.key - (1 << 63)),
    "the key of a withdrawn region": lambda t: (t.withdrawn, 64, t.old_key),
    "another region's range": lambda t: (t.withdrawn, 64, t.key),
    "before the region": lambda t: (t.base - 64, 64, t.key),
    "into the region from before": lambda t: (t.base - 1, 64, t.key),
    "out of the region": lambda t: (t.base + LAST - FIRST - 63, 64, t.key),
    "behind the region": lambda t: (t.base + LAST - FIRST, 1, t.key),
    "longer than the region": lambda t: (t.base, LAST - FIRST + 1, t.key),
    "an end beyond 2**63": lambda t: ((1 << 63) - 32, 64, t.key),
    "a negative address": lambda t: (t.base - (1 << 63), 64, t.key),
    "the last address": lambda t: (-1, 64, t.key),
    "address 0": lambda t: (0, 64, t.key),
}


@pytest.mark.parametrize("entry", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("kind", [Frame.WRITE, Frame.READ])
def test_a_slice_that_no_key_permits_is_refused_and_its_neighbours_are_served(target, lane, kind, entry):
    bad = entry(target)
    lengths = [100, bad[1], 200]
    entries = [(target.base, 100, target.key), bad, (target.base + 1000, 200, target.key)]
    body = [bytes([k + 1]) * n for k, n in enumerate(lengths)]
    lane.sendall(frame(kind, 0, entries, b"".join(body) if kind == Frame.WRITE else b""))
    head = receive_head(lane)
    assert head.seq == 0
    assert head.entries == [(1, DENIED, 0)]
    expected = np.full(LAST - FIRST, BLANK, np.uint8)
    if kind == Frame.WRITE:
        assert head[::3] == (Frame.ACK, 0)
        expected[:100], expected[1000:1200] = 1, 3
    else:
        assert head[::3] == (Frame.DATA, 300)
        assert receive(lane, 308) == bytes([BLANK]) * 300 + bytes(8)
    assert (target.inside() == expected).all()
    target.assert_nothing_outside()
    assert target.said() == []


def test_refused_slices_longer_than_a_socket_holds_are_dropped_to_the_last_byte(target, lane):
    """Each is discarded in many pieces; what is good between them arrives."""
    n = 700_001
    entries = [(target.base, n, 5), (target.base + 5, 1000, target.key)] * 4
    body = (bytes(n) + random_bytes(1000, 3).tobytes()) * 4
    lane.sendall(frame(Frame.WRITE, 0, entries, body))
    assert receive_head(lane).entries == [(i, DENIED, 0) for i in range(0, 8, 2)]
    assert (target.inside()[5:1005] == random_bytes(1000, 3)).all()
    lane.sendall(frame(Frame.WRITE, 1, [(target.base, 1, target.key)], b"x"))  # the stream is in step
    assert receive_head(lane)[:3] == (Frame.ACK, 1, [])
    target.assert_nothing_outside()


def test_a_full_table_of_slices_is_served_and_its_refusals_are_listed(target, lane):
    entries = [(target.base + 16 * i, 16, target.key if i % 3 else 0) for i in range(FRAME_SLICES)]
    lane.sendall(frame(Frame.WRITE, 0, entries, bytes([9]) * 16 * FRAME_SLICES))
    assert receive_head(lane).entries == [(i, DENIED, 0) for i in range(0, FRAME_SLICES, 3)]
    got = target.inside()[: 16 * FRAME_SLICES].reshape(-1, 16)
    assert (got[::3] == BLANK).all()
    assert (np.delete(got, np.s_[::3], 0) == 9).all()


def test_frames_that_come_byte_by_byte_are_understood(target, lane):
    lane.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    frames = frame(Frame.WRITE, 0, [(target.base + i, 1, target.key) for i in range(5)], b"abcde")
    frames += frame(Frame.READ, 1, [(target.base, 5, target.key)])
    for at in range(len(frames)):
        lane.sendall(frames[at : at + 1])
    assert receive_head(lane)[:3] == (Frame.ACK, 0, [])
    assert receive_head(lane)[:4] == (Frame.DATA, 1, [], 5)
    assert receive(lane, 13) == b"abcde" + bytes(8)


def test_frames_that_come_all_at_once_are_answered_in_order(target, lane):
    n = 200
    frames = [frame(Frame.WRITE, i, [(target.base + i, 1, target.key)], bytes([i])) for i in range(n)]
    lane.sendall(b"".join(frames))
    assert [receive_head(lane).seq for _ in range(n)] == list(range(n))
    assert (target.inside()[:n] == np.arange(n)).all()


# ------------------------------------------------------------------------------ frames that end a connection
def _entry(t: Target, length: int = 64) -> tuple[int, int, int]:
    return t.base, length, t.key


NO_HEADER, NO_TABLE = "what came is no frame of this version", "a frame's table does not hold"
BAD = {
    "no entry": (lambda t: frame(Frame.WRITE, 0), NO_TABLE),
    "a negative count": (lambda t: frame(Frame.WRITE, 0, [_entry(t)], bytes(64), count=-1), NO_HEADER),
    "too many entries": (lambda t: frame(Frame.WRITE, 0, [_entry(t, 1)] * 257, bytes(257)), NO_HEADER),
    "a huge count": (lambda t: frame(Frame.WRITE, 0, [_entry(t)], bytes(64), count=1 << 62), NO_HEADER),
    "length 0": (lambda t: frame(Frame.WRITE, 0, [_entry(t, 0)]), NO_TABLE),
    "a negative length": (lambda t: frame(Frame.WRITE, 0, [_entry(t, -64)], size=-64), NO_HEADER),
    "a negative length among others": (
        lambda t: frame(Frame.WRITE, 0, [_entry(t, -64), _entry(t, 128)], bytes(64)),
        NO_TABLE,
    ),
    "a huge length": (lambda t: frame(Frame.WRITE, 0, [_entry(t, SLICE_BYTES_MAX + 1)], size=1 << 32), NO_TABLE),
    "lengths whose sum wraps": (lambda t: frame(Frame.WRITE, 0, [_entry(t, 1 << 62)] * 4, size=0), NO_TABLE),
    "a sum too large": (lambda t: frame(Frame.WRITE, 0, [_entry(t)], bytes(64), size=65), NO_TABLE),
    "a sum too small": (lambda t: frame(Frame.WRITE, 0, [_entry(t)], bytes(64), size=63), NO_TABLE),
    "a negative sum": (lambda t: frame(Frame.WRITE, 0, [_entry(t)], bytes(64), size=-1), NO_HEADER),
    "a read with bytes": (lambda t: frame(Frame.READ, 0, [_entry(t)], bytes(64)), NO_TABLE),
    "two notifications in one": (lambda t: frame(Frame.NOTE, 0, [_entry(t), _entry(t)], bytes(128)), NO_TABLE),
    "a notification too long": (lambda t: frame(Frame.NOTE, 0, [_entry(t, TOO_LONG)], size=TOO_LONG), NO_TABLE),
    **{
        f"kind {k}": ((lambda t, k=k: frame(k, 0, [_entry(t)], bytes(64))), NO_HEADER)
        for k in (1, 3, 5, 6, 7, 10, 100, 255)
    },
    "an acknowledgement": (lambda t: frame(Frame.ACK, 0), NO_HEADER),
    "data": (lambda t: frame(Frame.DATA, 0, [], bytes(64) + bytes(8), size=64), NO_HEADER),
    "another magic": (lambda t: frame(Frame.WRITE, 0, [_entry(t)], bytes(64), magic=0x4D434632 << 8), NO_HEADER),
    "no magic": (lambda t: frame(Frame.WRITE, 0, [_entry(t)], bytes(64), magic=0), NO_HEADER),
    "zeros": (lambda t: bytes(1000), NO_HEADER),
    "garbage": (lambda t: random_bytes(10_000, 8).tobytes(), NO_HEADER),
    "a web page": (lambda t: b"GET / HTTP/1.1\r\nHost: localhost\r\n".ljust(128, b"\n"), NO_HEADER),
}


@pytest.mark.parametrize(("make", "why"), BAD.values(), ids=BAD)
def test_a_bad_frame_closes_that_connection_with_one_line_in_the_log_and_nothing_else(target, lane, make, why):
    with lane_to(target.address) as bystander:
        good = frame(Frame.WRITE, 0, [_entry(target)], bytes([5]) * 64)
        bystander.sendall(good[:150])
        lane.sendall(make(target))
        assert closed(lane)
        until(target.said, "a line in the log")
        assert (target.inside()[64:] == BLANK).all()
        bystander.sendall(good[150:])
        assert receive_head(bystander)[:3] == (Frame.ACK, 0, [])
        assert (target.inside()[:64] == 5).all()
    target.assert_well()
    (line,) = target.said()
    assert line.startswith("WARNING")
    assert why in line


@pytest.mark.parametrize("part", [0, 1, 127, 128, 271, 272, 300, 1271])
def test_half_a_frame_and_the_end_of_the_stream(target, lane, part):
    """What came of its bytes may be there; nothing else is."""
    entries = [(target.base + 1000 * i, 100, target.key) for i in range(10)]
    lane.sendall(frame(Frame.WRITE, 0, entries, bytes([1]) * 1000)[:part])
    lane.shutdown(socket.SHUT_WR)
    assert closed(lane)
    until(target.said, "a line in the log")
    came = np.zeros(LAST - FIRST, bool)
    for i in range(10):
        came[1000 * i : 1000 * i + max(0, min(100, part - 272 - 100 * i))] = True
    inside = target.inside()
    assert ((inside == BLANK) | (came & (inside == 1))).all()
    target.assert_well()


def test_a_peer_that_closes_its_end_is_gone_and_what_is_left_of_it_is_dropped(target, lane):
    """Engines never close one end of a connection: it means that the process has ended."""
    lane.sendall(b"".join(frame(Frame.READ, i, [(target.base, 60 * KiB, target.key)]) for i in range(20)))
    lane.shutdown(socket.SHUT_WR)
    until(target.said, "a line in the log")
    target.assert_well()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.fuzz
def test_whatever_the_frames_only_permitted_bytes_change(target, data):
    """Headers and tables at random, around the values that matter; a bystander's frame gets through every time."""
    inner = target.base + np.array([0, 1, 100, LAST - FIRST - 64, LAST - FIRST - 1, LAST - FIRST])
    places = st.sampled_from([*inner.tolist(), target.base - 1, target.base - 64, target.withdrawn, 0, -1, 1 << 62])
    lengths = st.sampled_from([1, 63, 64, 65, 1000]) | st.sampled_from([0, -1, 1 << 31, (1 << 31) + 1, 1 << 62])
    keys = st.sampled_from([target.key] * 3 + [0, 1, target.old_key, target.key ^ 1, -target.key])
    entry = st.tuples(places, lengths, keys)
    kinds, counts = st.sampled_from([0, 0, 0, 4, 4, 1, 2, 3, 8, 9, 255]), st.none() | st.integers(-1, 300)
    sizes = st.sampled_from([None, None, None, 0, 1, -1, 1 << 40])
    frames = data.draw(st.lists(st.tuples(kinds, st.lists(entry, max_size=6), counts, sizes), min_size=1, max_size=4))
    target.far(there.fill, BLANK, first=FIRST, last=LAST)
    allowed = np.zeros(LAST - FIRST, bool)
    with lane_to(target.address) as sock:
        for i, (kind, entries, count, size) in enumerate(frames):
            total = sum(n for _, n, _ in entries if 0 < n <= 1000) if kind != Frame.READ else 0
            for at, n, key in entries:
                if key == target.key and 0 <= at - target.base <= LAST - FIRST - n:
                    allowed[at - target.base : at - target.base + n] = True
            try:
                sock.sendall(frame(kind, i, entries, bytes(total), count=count, size=size))
            except ConnectionError:
                break
        try:
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 20):
                pass
        except OSError:
            pass
    inside = target.inside()
    assert (inside[~allowed] == BLANK).all()
    target.assert_well()


# ------------------------------------------------------------------------------ lanes
def test_an_answer_shows_nothing_of_what_its_lane_said_to_others_before(engines, far):
    """Heads of frames are padded; a lane's memory is used again for the next connection."""
    here = engines(provider="tcp")
    place = far(there.target, 1 << 16, provider="tcp")
    data = random_bytes(1 << 16)
    local = here.register(data)
    at = np.arange(4, dtype=np.int64) * 128
    here.write(place.address, local.address + at, place.base + at * 2, 64).wait(20).close()
    far.kill()
    (row,) = here.provider.ports[0].lanes
    until(lambda: row.free, "the lane, free")
    with lane_to(here.address) as sock:
        sock.sendall(frame(Frame.WRITE, 0, [(local.address, 64, 5)], bytes(64)))
        head = receive_head(sock)
        assert head.entries == [(0, DENIED, 0)]
        assert not any(head.padding)
    assert here.provider.ports[0].lanes == [row]


@pytest.mark.parametrize("body", [{}, {"lanes": FRAMES_VERSION - 1}, {"lanes": str(FRAMES_VERSION)}, {"lanes": None}])
def test_a_lane_of_another_version_is_refused(target, body):
    theirs = f"speaks frames of version {FRAMES_VERSION}, the caller .*; use the same release"
    with pytest.raises(DiscoveryError, match=theirs):
        dial(target.address, "lane", body, caller="a stranger", generation=1, secret=None)


@pytest.mark.parametrize("body", [{}, {"queue": 5}, {"queue": "x", "round": 1}, {"queue": None, "round": 1}])
def test_a_lane_asked_for_in_other_words_is_refused(target, body):
    with pytest.raises(UsageError, match="the body of 'lane' does not hold"):
        dial(target.address, "lane", {"lanes": FRAMES_VERSION, **body}, caller="a stranger", generation=1, secret=None)


def test_what_was_sent_before_a_queue_pair_was_connected_anew_is_not_written_over_what_comes_after(target):
    """Bytes may wait in a socket while their sender takes them for lost and sends others instead."""
    big = target.base, 60 * KiB, target.key
    old, other = lane_to(target.address, queue=5, round=1), lane_to(target.address, queue=6, round=1)
    with old, other:
        for sock in (old, other):
            sock.sendall(frame(Frame.WRITE, 0, [big], bytes([1]) * 60 * KiB)[: 30 * KiB])
        with lane_to(target.address, queue=5, round=2) as new, lane_to(target.address, queue=5, round=2) as sibling:
            new.sendall(frame(Frame.WRITE, 0, [big], bytes([2]) * 60 * KiB))
            assert receive_head(new)[:3] == (Frame.ACK, 0, [])
            assert closed(old)
            sibling.sendall(frame(Frame.READ, 0, [big]))
            assert receive_head(sibling)[:4] == (Frame.DATA, 0, [], 60 * KiB)
            assert set(receive(sibling, 60 * KiB + 8)[: 60 * KiB]) == {2}
            other.sendall(bytes([1]) * 60 * KiB)  # another queue pair's goes on
            assert receive_head(other)[:3] == (Frame.ACK, 0, [])
