"""What engines on one host hand each other, to whom, and what they believe of each other's memory."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mooncache import Engine, Notification, TransportError
from mooncache.discovery.credentials import has_ended, process_at
from mooncache.discovery.dial import AnotherUser, dial
from mooncache.discovery.messages import Answer, Reply, Request
from mooncache.kernels.arrays import address_of
from mooncache.limits import NOTE_BYTES, NOTE_HEAD_BYTES, REGIONS_MOST
from mooncache.providers.records import KEY
from mooncache.providers.shm.mappings import GUARD_BYTES, reachable
from mooncache.providers.stream.frames import Frame
from mooncache.providers.stream.lane import FRAMES_VERSION
from mooncache.segments import HUGE_BYTES, Segment, allocate, check_foreign, segment_of
from tests.helpers import LIMIT, until
from tests.wires import there
from tests.wires.fake import FakeTarget
from tests.wires.raw import frame, lane_to, receive_head

KiB = 1 << 10
TABLE_BYTES = REGIONS_MOST * KEY.itemsize


def segment_behind(array: np.ndarray) -> Segment:
    segment = segment_of(address_of(array), array.nbytes)
    assert segment is not None
    return segment


# ------------------------------------------------------------------------------ memory that has a descriptor
@pytest.fixture(params=[False, True], ids=["small pages", "huge pages"])
def array(request: pytest.FixtureRequest) -> np.ndarray:
    array = allocate(10_000, huge=request.param)
    if request.param and segment_behind(array).length < HUGE_BYTES:
        pytest.skip("this machine has no huge pages to give")
    return array


CHANGES: dict[str, Callable[[int, int], object]] = {
    "shorter": lambda fd, length: os.ftruncate(fd, 0),
    "longer": lambda fd, length: os.ftruncate(fd, 2 * length),
    "sealed": lambda fd, length: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nobody_takes_pages_from_allocated_memory_or_seals_it_anew(array, change):
    segment = segment_behind(array)
    again = os.open(f"/proc/self/fd/{segment.descriptor}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            change(again, segment.length)
    finally:
        os.close(again)
    array[:] = 7


def test_memory_for_reading_is_written_by_its_owner_only():
    array = allocate(10_000, for_reading=True)
    again = os.open(f"/proc/self/fd/{segment_behind(array).descriptor}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, 4096)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
        with mmap.mmap(again, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
            array[5] = 99
            assert seen[5] == 99
            where = np.frombuffer(seen, np.uint8).ctypes.data
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mprotect(ctypes.c_void_p(where), 4096, mmap.PROT_READ | mmap.PROT_WRITE) == -1
    finally:
        os.close(again)


def unsealed(length: int, seals: int = 0) -> int:
    descriptor = os.memfd_create("lies", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, length)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


LIES: dict[str, Callable[[int], int]] = {
    "that can shrink": unsealed,
    "sealed against growing only": lambda n: unsealed(n, fcntl.F_SEAL_GROW),
    "that is shorter": lambda n: unsealed(n // 2, fcntl.F_SEAL_SHRINK),
    "of nothing": lambda n: unsealed(0, fcntl.F_SEAL_SHRINK),
    "that is no memory": lambda n: os.open("/dev/zero", os.O_RDWR),
    "that is a pipe": lambda n: _closing(os.pipe()),
}


def _closing(ends: tuple[int, int]) -> int:
    os.close(ends[1])
    return ends[0]


@pytest.mark.parametrize("lie", LIES)
def test_memory_that_could_vanish_is_not_mapped(lie):
    descriptor = LIES[lie](8192)
    try:
        with pytest.raises(TransportError, match="as long and sealed against shrinking"):
            check_foreign(descriptor, 8192)
    finally:
        os.close(descriptor)


class Sharer(FakeTarget):
    """An engine that shares memory as it should, but for one of its descriptors, and calls itself another process."""

    def __init__(self, wrong: str, lie: str) -> None:
        super().__init__(64 * KiB)
        self.nonce = np.array([12345], np.int64)
        self.changes = {"provider": "shm", "data": {"lanes": FRAMES_VERSION, "unix": self.unix, "segments": [1]}}
        self.descriptors = []
        for name, length in {"table": TABLE_BYTES, "guards": GUARD_BYTES, "segment": self.memory.nbytes}.items():
            made = LIES[lie](length) if name == wrong else unsealed(length, fcntl.F_SEAL_SHRINK)
            self.descriptors.append(made)

    def _serve(self, request: Request) -> Reply:
        if request.purpose != "share":
            return super()._serve(request)
        body: dict[str, Any] = {"segments": [[1, self.base, self.memory.nbytes]], "pid": 1}
        return Reply(body | {"word": address_of(self.nonce), "nonce": 12345}, self.descriptors, then=self._made.append)

    def __exit__(self, *what: Any) -> None:
        super().__exit__(*what)
        for descriptor in self.descriptors:
            os.close(descriptor)


@pytest.mark.parametrize("wrong", ["table", "guards", "segment"])
@pytest.mark.parametrize("lie", LIES)
def test_a_peer_whose_memory_could_vanish_is_a_typed_error_and_leaves_nothing(engines, wrong, lie):
    here = engines(provider="shm")
    with Sharer(wrong, lie) as fake:
        with pytest.raises(TransportError, match="as long and sealed against shrinking"):
            here.connect(fake.address)
        assert here.provider._shares == {}
        with open("/proc/self/maps") as maps:
            assert "memfd:lies" not in maps.read()


def test_a_peers_process_is_the_one_that_the_kernel_names(engines):
    """It calls itself process 1."""
    here = engines(provider="shm")
    with Sharer("", "") as fake:
        here.connect(fake.address)
        assert here.provider._shares[fake.address].pid == os.getpid()


def test_a_process_that_does_not_hold_the_word_is_not_touched():
    word = np.array([77], np.int64)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert process_at(ours) == (os.getpid(), os.geteuid())
        assert reachable(ours, address_of(word), 77) == (os.getpid(), "")
        assert reachable(ours, address_of(word), 78) == (0, "the process that listened there is another one")
        assert reachable(ours, 4096, 77) == (0, "Bad address")


def test_a_process_that_has_ended_is_not_taken_for_one_of_the_same_number(far):
    far(there.open_engine, provider="shm")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + far(there.unix))
        assert process_at(sock).pid == far.pid
        assert not has_ended(sock)
        far.kill()
        if os.uname().release.split(".") >= ["6", "5"]:
            until(lambda: has_ended(sock), "the end of the process")


# ------------------------------------------------------------------------------ what is handed out
@pytest.fixture
def engine(engines: Callable[..., Engine]) -> Engine:
    return engines(provider="shm")


@pytest.fixture
def share(engine: Engine) -> Iterator[Callable[[], Answer]]:
    """Asks the engine for its memory, as a peer of the same user does."""
    answers: list[Answer] = []

    def ask() -> Answer:
        unix = engine.provider.describe(engine._service.unix)["unix"]
        answers.append(
            dial(f"unix:{unix}", "share", {"have": []}, caller="asking", generation=1, secret=None)
        )  # fmt: skip
        return answers[-1]

    yield ask
    for answer in answers:
        answer.sock.close()
        for descriptor in answer.fds:
            os.close(descriptor)


def shared(share: Callable[[], Answer]) -> list[int]:
    """Addresses of the segments that a peer gets."""
    answer = share()
    assert len(answer.fds) == 2 + len(answer.body["segments"])
    return [address for _, address, _ in answer.body["segments"]]


# ranges of 10,000 bytes, and what is registered of them
HANDED_OUT = {
    "all of it": (True, [(0, 10_000, "both")]),
    "in parts": (True, [(0, 4000, "both"), (4000, 10_000, "both")]),
    "nothing": (False, []),
    "for reading": (False, [(0, 10_000, "read")]),
    "for writing": (False, [(0, 10_000, "write")]),
    "the first part": (False, [(0, 9_999, "both")]),
    "with a gap": (False, [(0, 4000, "both"), (4001, 10_000, "both")]),
    "one part for reading": (False, [(0, 4000, "read"), (4000, 10_000, "both")]),
}


@pytest.mark.parametrize("what", HANDED_OUT)
def test_a_segment_is_handed_out_only_if_each_byte_of_it_may_be_read_and_written(engine, share, what):
    handed_out, parts = HANDED_OUT[what]
    array = engine.allocate(10_000)
    engine.allocate(10_000)
    for first, last, access in parts:
        engine.register(array[first:last], access=access)
    assert shared(share) == ([address_of(array)] if handed_out else [])


def test_what_is_withdrawn_is_not_handed_out_any_more(engine, share):
    array = engine.allocate(10_000)
    first, second = engine.register(array[:5000]), engine.register(array[5000:])
    assert shared(share)
    first.unregister()
    assert not shared(share)
    first = engine.register(array[:5000])
    assert shared(share)
    first.unregister()
    second.unregister()
    assert not shared(share)


def test_the_key_table_that_peers_map_cannot_be_written_by_them(engine, share):
    array = engine.allocate(10_000)
    answer = share()
    for descriptor in (answer.fds[0], os.open(f"/proc/self/fd/{answer.fds[0]}", os.O_RDWR)):
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, TABLE_BYTES)
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"\1" * 32, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
    os.close(descriptor)
    key = engine.register(array)._parts[0].keys.rkeys[0]
    with mmap.mmap(answer.fds[0], TABLE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ) as table:
        assert key.to_bytes(8, "little") in bytes(table)  # while its owner does


@pytest.mark.parametrize("access", ["read", "write", "both"])
def test_memory_that_is_not_handed_out_is_reached_all_the_same(engines, far, access):
    here = engines(provider="shm")
    array = here.allocate(64 * KiB)
    array[:] = 9
    region = here.register(array[: 32 * KiB], access=access)
    far(there.target, 32 * KiB, provider="shm", mapped=True, seed=1)
    far(there.send, here.address, region.address, 32 * KiB, op="write" if access == "write" else "read")
    assert array[: 32 * KiB].tobytes() == far(there.read)
    assert (array[32 * KiB :] == 9).all()


# ------------------------------------------------------------------------------ notifications
@pytest.mark.parametrize("provider", ["tcp", "shm"])
@pytest.mark.parametrize(
    "text", [b"", b"\5\0legit: forged", b"\xff" * (NOTE_BYTES + NOTE_HEAD_BYTES)], ids=["empty", "a name", "long"]
)
def test_a_notification_is_of_the_engine_that_connected_whatever_it_says(engines, provider, text):
    there = engines(provider=provider)
    note = b"\0" + text[1:]
    with lane_to(there.address, caller="a stranger") as sock:
        sock.sendall(frame(Frame.NOTE, 0, [(0, len(note), 0)], note))
        assert receive_head(sock).entries == []
    assert there.notifications().get(LIMIT) == Notification("a stranger", text[1:])


# ------------------------------------------------------------------------------ other users
@pytest.mark.parametrize("provider", ["tcp", "shm", "auto"])
def test_another_user_is_refused_over_loopback(engines, far, provider):
    here = engines(provider=provider)
    far(there.open_engine, provider=provider)
    if not far(there.drop_privileges):
        pytest.skip("needs to be root, else all processes of a test are of one user")
    error = far(there.try_connect, here.address)
    assert error.startswith(f"DiscoveryError: {here.address} did not prove")
    assert "it is another user's, or in another container; start both engines with the same one, by secret=" in error


def test_another_user_gets_nothing_over_the_unix_socket(engines, far, caplog):
    here = engines(provider="shm")
    here.register(here.allocate(64 * KiB))
    if not far(there.drop_privileges):
        pytest.skip("needs to be root, else all processes of a test are of one user")
    assert far(there.received_from, here._service.unix) == b""
    assert f"process {far.pid} of user 65534: another user's, and there is no secret" in caplog.text


def test_another_users_unix_socket_is_not_spoken_to(far):
    if not far(there.drop_privileges):
        pytest.skip("needs to be root, else all processes of a test are of one user")
    unix = far(there.listen_unix)
    with pytest.raises(AnotherUser, match="user 65534, this one of user 0: give both the same secret="):
        dial(f"unix:{unix}", "share", {}, caller="asking", generation=1, secret=None)


def test_another_user_who_knows_the_secret_shares_memory(engines, far):
    here = engines(provider="shm", secret="between us two only")
    array = here.allocate(64 * KiB)
    region = here.register(array)
    far(there.open_engine, provider="shm", secret="between us two only")
    if not far(there.drop_privileges):
        pytest.skip("needs to be root, else all processes of a test are of one user")
    far(there.hold, 64 * KiB, mapped=True, seed=1)
    far(there.register)
    far(there.send, here.address, region.address, 64 * KiB)
    assert array.tobytes() == far(there.read)
    assert far(there.describe)["peers"] == {here.address: "shm, other memory by tcp (Operation not permitted)"}
