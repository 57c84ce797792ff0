"""What one opened port hands out, on a real device whose two ends are connected to each other."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import select
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from mooncache.errors import TransportError, UsageError
from mooncache.kernels.enums import Access
from mooncache.kernels.records.verbs import SEND_WR
from mooncache.kernels.verbs import SEND_SIGNALED, WcStatus
from mooncache.providers.rdma import gids
from mooncache.providers.rdma.nic import Event, Nic
from mooncache.providers.rdma.ports import Choice, choose
from mooncache.providers.rdma.queues import CompletionQueue, QueuePair, Remote

ALL = Access.READ | Access.WRITE | Access.LOCAL
BYTES = 8192
RDMA_WRITE = 0
PATIENCE_MS = 60_000
WC = np.dtype({"names": ["wr_id", "status"], "formats": ["<u8", "<u4"], "offsets": [0, 8], "itemsize": 48})
SGE = np.dtype([("addr", "<u8"), ("length", "<u4"), ("lkey", "<u4")])


@pytest.fixture
def choice(device: str) -> Choice:
    return choose([device])[0]


@pytest.fixture
def nic(choice: Choice) -> Iterator[Nic]:
    nic = Nic(choice)
    yield nic
    nic.close()


def queue_pair(nic: Nic, cq: CompletionQueue, **other: int) -> QueuePair:
    return nic.queue_pair(cq, cq, **{"send_depth": 64, "recv_depth": 16, "sges": 2, "inline": 0, **other})


def connect(nic: Nic, a: QueuePair, b: QueuePair) -> None:
    figures = {"mtu": nic.mtu, "rd_atomic": 1, "timeout": 14, "retry_count": 7, "rnr_retry": 7}
    a.connect(Remote(b.number, nic.gid, nic.lid), psn=1234, remote_psn=5678, **figures)
    b.connect(Remote(a.number, nic.gid, nic.lid), psn=5678, remote_psn=1234, **figures)


class Wire(NamedTuple):
    """Two queue pairs of one NIC, connected to each other, that report to one completion queue."""

    nic: Nic
    cq: CompletionQueue
    a: QueuePair
    b: QueuePair

    @classmethod
    def over(cls, nic: Nic, **made: Any) -> Wire:
        cq = nic.completion_queue(made.pop("entries", 128), made.pop("channel", None))
        wire = cls(nic, cq, queue_pair(nic, cq, **made), queue_pair(nic, cq))
        connect(nic, wire.a, wire.b)
        return wire

    def post(self, source: np.ndarray, lkey: int, target: np.ndarray, rkey: int) -> int:
        """Post one RDMA write, as a kernel does; what the driver answers."""
        sge = np.array([(source.ctypes.data, source.nbytes, lkey)], SGE)
        wr, bad = np.zeros(1, SEND_WR), np.zeros(1, np.uint64)
        wr["wr_id"], wr["sg_list"], wr["num_sge"] = 7, sge.ctypes.data, 1
        wr["opcode"], wr["send_flags"] = RDMA_WRITE, SEND_SIGNALED
        wr["remote_addr"], wr["rkey"] = target.ctypes.data, rkey
        call = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)(self.nic.operations.post_send)
        return int(call(self.a.address, wr.ctypes.data, bad.ctypes.data))

    def poll(self) -> WcStatus:
        """How the next work request ended."""
        wc = np.zeros(1, WC)
        call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(
            self.nic.operations.poll_cq
        )
        while call(self.cq.address, 1, wc.ctypes.data) == 0:
            os.sched_yield()
        assert wc["wr_id"][0] == 7
        return WcStatus(int(wc["status"][0]))

    def write(self) -> WcStatus:
        """Write between two registered arrays, and compare them."""
        source, target = np.arange(BYTES, dtype=np.uint8), np.zeros(BYTES, np.uint8)
        local = self.nic.register(source.ctypes.data, BYTES, Access.LOCAL)
        remote = self.nic.register(target.ctypes.data, BYTES, ALL)
        assert self.post(source, local.lkey, target, remote.rkey) == 0
        status = self.poll()
        assert (status == WcStatus.SUCCESS) == np.array_equal(source, target)
        local.close()
        remote.close()
        return status


def test_an_opened_port_says_what_it_is_and_can_hold(nic: Nic, choice: Choice) -> None:
    assert (nic.port, nic.gid, nic.gid_index) == (choice.port, choice.gid.gid, choice.gid.index)
    assert nic.lid == 0 or nic.port.link_layer == "InfiniBand"
    assert nic.mtu in (256, 512, 1024, 2048, 4096)
    assert nic.port.mtu in (0, nic.mtu)
    assert all(limit > 0 for limit in nic.limits)
    assert nic.limits.max_qp_wr >= 1024
    assert nic.limits.max_cqe >= 1024
    assert all(nic.operations)
    assert repr(nic).startswith(f"Nic({nic.port.name}, ")


def test_queues_hold_at_least_what_was_asked(nic: Nic) -> None:
    cq = nic.completion_queue(100)
    qp = queue_pair(nic, cq, send_depth=100, recv_depth=50, sges=3, inline=200)
    assert cq.capacity >= 100
    assert (qp.send_depth >= 100, qp.recv_depth >= 50, qp.sges >= 3) == (True, True, True)
    assert qp.state == "INIT"


def test_inline_is_as_much_of_what_was_asked_as_the_device_grants(nic: Nic) -> None:
    cq = nic.completion_queue(100)
    assert queue_pair(nic, cq, inline=1 << 20).inline < 1 << 20


def test_a_write_arrives_before_and_after_a_reset(nic: Nic) -> None:
    wire = Wire.over(nic)
    assert (wire.a.state, wire.b.state) == ("RTS", "RTS")
    assert wire.write() == WcStatus.SUCCESS
    wire.a.reset()
    wire.b.reset()
    assert (wire.a.state, wire.b.state) == ("INIT", "INIT")
    connect(nic, wire.a, wire.b)
    assert wire.write() == WcStatus.SUCCESS


def test_a_failed_queue_pair_flushes_what_is_posted_and_can_be_reset(nic: Nic) -> None:
    wire = Wire.over(nic)
    wire.a.fail()
    assert wire.a.state == "ERR"
    assert wire.write() == WcStatus.WR_FLUSH_ERR
    wire.a.reset()
    wire.b.reset()
    connect(nic, wire.a, wire.b)
    assert wire.write() == WcStatus.SUCCESS


def test_peers_may_do_what_the_access_says(nic: Nic) -> None:
    source, target = np.ones(BYTES, np.uint8), np.zeros(BYTES, np.uint8)
    local = nic.register(source.ctypes.data, BYTES, Access.LOCAL)
    remote = nic.register(target.ctypes.data, BYTES, Access.READ | Access.LOCAL)
    wire = Wire.over(nic)
    assert wire.post(source, local.lkey, target, remote.rkey) == 0
    assert wire.poll() == WcStatus.REM_ACCESS_ERR
    assert not target.any()


def test_a_closed_registration_no_longer_opens_the_memory(nic: Nic) -> None:
    source, target = np.ones(BYTES, np.uint8), np.zeros(BYTES, np.uint8)
    local = nic.register(source.ctypes.data, BYTES, Access.LOCAL)
    remote = nic.register(target.ctypes.data, BYTES, ALL)
    remote.close()
    remote.close()  # a second time does nothing
    wire = Wire.over(nic)
    assert wire.post(source, local.lkey, target, remote.rkey) == 0
    assert wire.poll() == WcStatus.REM_ACCESS_ERR
    assert not target.any()


def test_read_only_memory_registers_without_local_access_only(nic: Nic, device: str) -> None:
    zero = os.open("/usr/bin/env", os.O_RDONLY)
    with mmap.mmap(zero, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ) as memory:
        address = np.frombuffer(memory, np.uint8).ctypes.data
        nic.register(address, 4096, Access.READ).close()
        with pytest.raises(TransportError, match=rf"{device} could not register 4096 bytes at .* writable"):
            nic.register(address, 4096, Access.READ | Access.LOCAL)
    os.close(zero)


def test_memory_that_is_not_mapped_is_refused(nic: Nic, device: str) -> None:
    with pytest.raises(TransportError, match=rf"RDMA device {device} could not register 4096 bytes at 0x1000 .*mapped"):
        nic.register(0x1000, 4096, ALL)


@contextmanager
def little_memory_to_lock() -> Iterator[None]:
    """64 KiB of it, and not the privilege (CAP_IPC_LOCK) to lock more."""
    libc, limits = ctypes.CDLL(None), resource.getrlimit(resource.RLIMIT_MEMLOCK)
    this_thread, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(this_thread, sets) == 0
    effective = sets[0]
    sets[0] &= ~(1 << 14)
    assert libc.capset(this_thread, sets) == 0
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)
    sets[0] = effective
    assert libc.capset(this_thread, sets) == 0


def test_memory_that_may_not_be_locked_is_refused_with_the_limit(nic: Nic, device: str) -> None:
    memory = np.zeros(1 << 20, np.uint8)
    with little_memory_to_lock(), pytest.raises(TransportError) as refusal:
        nic.register(memory.ctypes.data, memory.nbytes, ALL)
    assert f"RDMA device {device} could not register 1048576 bytes at 0x" in str(refusal.value)
    assert "this process may lock 64 KiB of memory (ulimit -l). Raise that: " in str(refusal.value)


def test_what_is_no_dmabuf_or_cannot_be_one_is_refused(nic: Nic, device: str) -> None:
    with open(os.devnull) as no_dmabuf, pytest.raises(TransportError) as refusal:
        nic.register_dmabuf(no_dmabuf.fileno(), 0, 4096, 0x7000_0000_0000, ALL)
    assert f"RDMA device {device} could not register 4096 bytes of a dma-buf for address 0x7" in str(refusal.value)
    if device.startswith("rxe"):
        assert str(refusal.value).endswith("this device, its driver or the kernel cannot do that")


def test_an_armed_queue_wakes_its_owner_once(nic: Nic) -> None:
    channel = nic.completion_channel()
    wire = Wire.over(nic, channel=channel)
    arm = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(nic.operations.req_notify_cq)
    poller = select.poll()
    poller.register(channel.fd, select.POLLIN)
    cq, given = ctypes.c_uint64(), ctypes.c_uint64()

    def take() -> int:
        return int(nic.verbs.c.ibv_get_cq_event(channel.address, ctypes.byref(cq), ctypes.byref(given)))

    assert take() == -1
    for _ in range(2):
        assert arm(wire.cq.address, 0) == 0
        assert wire.write() == WcStatus.SUCCESS
        assert poller.poll(PATIENCE_MS) == [(channel.fd, select.POLLIN)]
        assert take() == 0
        assert cq.value == wire.cq.address
        assert take() == -1
    wire.cq.acknowledge(2)
    wire.cq.close()  # would wait forever for an event that is not acknowledged
    channel.close()


def test_events_of_the_device_are_told_with_their_subject(nic: Nic) -> None:
    assert nic.next_event() is None
    wire = Wire.over(nic, entries=1, send_depth=64)
    source, target = np.ones(8, np.uint8), np.zeros(8, np.uint8)
    local, remote = (nic.register(array.ctypes.data, 8, ALL) for array in (source, target))
    for _ in range(wire.cq.capacity + 2):  # more completions than it holds
        assert wire.post(source, local.lkey, target, remote.rkey) == 0
    poller = select.poll()
    poller.register(nic.async_fd, select.POLLIN)
    events = []
    while Event("CQ_ERR", wire.cq.address) not in events:
        assert poller.poll(PATIENCE_MS)
        while event := nic.next_event():
            events.append(event)
    others = {event for event in events if event.name != "CQ_ERR"}
    assert others <= {Event(name, qp.number) for name in ("COMM_EST", "QP_FATAL") for qp in (wire.a, wire.b)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda nic: nic.completion_queue(1 << 30), "has room for 1 to .* completion queue entries, 1073741824 were"),
        (lambda nic: queue_pair(nic, nic.completion_queue(1), send_depth=1 << 30), "work requests in a send queue"),
        (lambda nic: queue_pair(nic, nic.completion_queue(1), sges=1 << 20), "ranges in a work request"),
    ],
)
def test_more_than_the_device_holds_is_refused(nic: Nic, make: Callable[[Nic], object], message: str) -> None:
    with pytest.raises(TransportError, match=message):
        make(nic)


def test_a_peer_that_cannot_be_reached_is_named(nic: Nic, device: str) -> None:
    qp = queue_pair(nic, nic.completion_queue(8))
    nowhere = Remote(17, gids.parse("::ffff:192.0.2.1"), 0)
    with pytest.raises(
        TransportError, match=rf"{device} could not connect GID .* to queue pair 17 at .*:0201: .* in one network"
    ):
        qp.connect(nowhere, psn=0, remote_psn=0, mtu=nic.mtu, rd_atomic=1, timeout=14, retry_count=7, rnr_retry=7)


@pytest.mark.parametrize(
    "remote", [Remote(17, b"no GID", 0), Remote(1 << 40, gids.parse("::1"), 0), Remote(17, b"", 1 << 20)]
)
def test_what_a_peer_cannot_have_meant_is_refused(nic: Nic, remote: Remote) -> None:
    qp = queue_pair(nic, nic.completion_queue(8))
    with pytest.raises(TransportError, match=f"to queue pair {remote.number} at "):
        qp.connect(remote, psn=0, remote_psn=0, mtu=nic.mtu, rd_atomic=1, timeout=14, retry_count=7, rnr_retry=7)


def test_a_device_that_is_not_there_is_named(choice: Choice) -> None:
    with pytest.raises(TransportError, match=r"RDMA device none0 could not be opened: .*ibverbs-providers"):
        Nic(Choice(replace(choice.port, device="none0"), choice.gid))
    with pytest.raises(UsageError, match=f"got 'none0'; there are .*{choice.port.device}"):
        choose(["none0"])


def test_a_gid_index_that_is_not_there_is_refused_with_the_table(choice: Choice) -> None:
    with pytest.raises(UsageError, match=f"expected a GID of index 77 on {choice.port.name}.*{choice.gid.address}"):
        choose([choice.port.name], gid_index=77)


def test_closing_gives_everything_back(choice: Choice, device: str) -> None:
    def held() -> tuple[int, object]:
        shown = json.loads(subprocess.run(["rdma", "-j", "resource", "show"], capture_output=True, check=True).stdout)
        return len(os.listdir("/proc/self/fd")), [row for row in shown if row["ifname"] == device]

    memory = np.zeros(BYTES, np.uint8)
    before = held()
    for _ in range(100):
        nic = Nic(choice)
        wire = Wire.over(nic, channel=nic.completion_channel())
        nic.register(memory.ctypes.data, BYTES, ALL)
        wire.b.close()
        nic.close()
    assert held() == before
