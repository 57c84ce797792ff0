"""The checks of `mooncache doctor` on RDMA devices, GPUs and stores of names, on made-up machines."""

import shutil

import pytest

from mooncache.cli import checks
from mooncache.cli.checks.base import Finding
from tests.cli.machines import (
    CLOSED_DRIVER,
    LACKS,
    LOADS,
    LOCAL,
    OPEN_DRIVER,
    V1,
    V2,
    V4,
    V6,
    levels,
    nic,
    only,
    pci,
    unreadable,
    write,
)


# ------------------------------------------------------------------ RDMA
def rdma_of(root, need="auto"):
    return {finding.check: finding for finding in checks.rdma.ports(need, checks.rdma.found_ports(root), root)}


def test_no_device(tmp_path):
    assert checks.rdma.ports("auto", [], tmp_path) == [Finding("rdma", "warning", "no RDMA device; tcp and shm work")]
    needed = only(checks.rdma.ports("rdma", [], tmp_path))
    assert needed.level == "error"
    assert "rdma link add" in needed.cure


def test_a_healthy_port(tmp_path):
    found = rdma_of(write(tmp_path, nic(gids=[(LOCAL, V1), (LOCAL, V2), (V4, V1), (V4, V2)])))
    assert set(levels(found.values())) == {"ok"}
    assert found["rdma mlx5_0:1"].text == (
        "Ethernet, ACTIVE, physically LinkUp, 100 Gb/s, NUMA node 0, firmware 20.31.1014, netdev eth0"
    )
    assert found["rdma mlx5_0:1 mtu"].text == "4096 bytes in frames of 9000 of eth0"
    assert found["rdma mlx5_0:1 gid"].text == (
        "uses 3: 10.0.0.1 RoCE v2 on eth0; there are also 0: fe80::1 RoCE v1 on eth0, 1: fe80::1 RoCE v2 on eth0 and "
        "2: 10.0.0.1 RoCE v1 on eth0"
    )


def test_a_small_mtu(tmp_path):
    small = rdma_of(write(tmp_path, nic(mtu=1500)))["rdma mlx5_0:1 mtu"]
    assert small.level == "warning"
    assert small.text.startswith("1024 bytes in frames of 1500 of eth0: ")
    assert small.cure.startswith("ip link set mtu 9000 dev eth0 ")


def test_a_netdev_that_is_not_seen(tmp_path):
    write(tmp_path, nic())
    shutil.rmtree(tmp_path / "sys/class/net")
    assert rdma_of(tmp_path)["rdma mlx5_0:1 mtu"].text.startswith("unknown: ")


@pytest.mark.parametrize(
    ("gids", "level", "says"),
    [
        ([(LOCAL, V2)], "warning", "peers on the same link only"),
        ([(V6, V2)], "ok", "2001:db8::1 RoCE v2"),
        ([(V4, V1)], "warning", "there is no RoCE v2"),
        ([], "error", "none to use"),
    ],
)
def test_gids(tmp_path, gids, level, says):
    found = rdma_of(write(tmp_path, nic(gids=gids)), "rdma")["rdma mlx5_0:1 gid"]
    assert found.level == level
    assert says in found.text
    assert (found.cure is None) == (level == "ok")


def test_a_port_without_gid_matters_less_beside_one_that_has_some(tmp_path):
    found = rdma_of(write(tmp_path, nic(gids=[]) | nic("mlx5_1")), "rdma")
    assert (found["rdma mlx5_0:1 gid"].level, found["rdma mlx5_1:1 gid"].level) == ("warning", "ok")


def test_a_line_does_not_list_hundreds_of_gids(tmp_path):
    found = rdma_of(write(tmp_path, nic(gids=[(V4, V2)] * 200)))["rdma mlx5_0:1 gid"]
    assert found.text.endswith(" and 195 more")


def test_infiniband_needs_neither_netdev_nor_roce(tmp_path):
    found = rdma_of(write(tmp_path, nic(layer="InfiniBand", gids=[("fe80::1", "IB/RoCE v1")])))
    assert set(levels(found.values())) == {"ok"}


@pytest.mark.parametrize(
    ("port", "says", "cure"),
    [
        ({"state": "1: DOWN"}, "DOWN, physically Disabled", "ip link set eth0 up"),
        ({"state": "2: INIT", "layer": "InfiniBand"}, "INIT", "systemctl start opensm"),
        ({"kind": "4: RNIC"}, "not iWARP", None),
    ],
)
def test_a_port_that_cannot_be_used_matters_unless_another_can(tmp_path, port, says, cure):
    write(tmp_path, nic(**port))
    for need, level in (("auto", "warning"), ("rdma", "error")):
        found = rdma_of(tmp_path, need)["rdma mlx5_0:1"]
        assert found.level == level
        assert says in found.text
        assert found.cure is None if cure is None else found.cure.startswith(cure)
    write(tmp_path, nic("mlx5_1"))
    both = rdma_of(tmp_path, "rdma")
    assert (both["rdma mlx5_0:1"].level, both["rdma mlx5_1:1"].level) == ("warning", "ok")


def test_access_to_devices(tmp_path):
    write(tmp_path, nic() | nic("mlx5_1") | nic("mlx5_2") | nic("mlx5_3", 1) | nic("mlx5_3", 2))
    (tmp_path / "dev/infiniband/uverbs_mlx5_1").unlink()
    unreadable(tmp_path / "dev/infiniband/uverbs_mlx5_2")
    shutil.rmtree(tmp_path / "sys/class/infiniband_verbs/uverbs_mlx5_3")
    findings = checks.rdma.access("rdma", checks.rdma.found_ports(tmp_path), tmp_path)
    assert levels(findings) == ["ok", "error", "error", "error"]  # one a device, however many ports it has
    assert [says in finding.text for says, finding in zip(
        ("opens", "missing", "cannot be opened: Is a directory", "ib_uverbs is not loaded"), findings, strict=True
    )] == [True] * 4  # fmt: skip
    assert set(levels(checks.rdma.access("auto", checks.rdma.found_ports(tmp_path), tmp_path))) == {"ok", "warning"}


def test_the_library(tmp_path):
    ports = checks.rdma.found_ports(write(tmp_path, nic()))
    assert only(checks.rdma.library("rdma", ports, LOADS)).text == "pyverbs 44.0-2 beside libibverbs of rdma-core 44.0"
    assert levels(checks.rdma.library("auto", [], LACKS)) == ["ok"]
    assert levels(checks.rdma.library("auto", ports, LACKS)) == ["warning"]
    needed = only(checks.rdma.library("rdma", [], LACKS))
    assert (needed.level, needed.cure) == ("error", LACKS.cure)


# ------------------------------------------------------------------ GPUs, names
def test_gpus_are_found_among_other_devices(tmp_path):
    devices = pci("0000:17:00.0", "0x10de", "0x030200", 1) | pci("0000:65:00.0", "0x1002", "0x120000", -1)
    others = pci("0000:00:1f.0", "0x8086", "0x030000") | pci("0000:17:00.1", "0x10de", "0x040300")  # an audio device
    found = checks.gpu.gpus(write(tmp_path, devices | others))
    assert found == [checks.gpu.Gpu("0000:17:00.0", "NVIDIA", 1), checks.gpu.Gpu("0000:65:00.0", "AMD", -1)]
    (tmp_path / "sys/bus/pci/devices/0000:17:00.0/numa_node").unlink()
    assert checks.gpu.gpus(tmp_path)[0].node == -1


@pytest.mark.parametrize(
    ("linux", "texts", "level", "says"),
    [
        ("6.8.0", {}, "warning", "without a driver"),
        ("6.8.0", {"proc/driver/nvidia/version": OPEN_DRIVER}, "ok", "by dma-buf"),
        ("6.8.0", {"proc/driver/nvidia/version": CLOSED_DRIVER}, "warning", "dma-buf needs the open kernel modules"),
        ("5.4.0", {"proc/driver/nvidia/version": OPEN_DRIVER}, "warning", "dma-buf needs Linux 5.12"),
        ("5.4.0", {"proc/driver/nvidia/version": CLOSED_DRIVER, "sys/module/nvidia_peermem/refcnt": "0"}, "ok",
         "by nvidia_peermem"),
    ],
)  # fmt: skip
def test_memory_of_nvidia_gpus(tmp_path, linux, texts, level, says):
    write(tmp_path, {"proc/sys/kernel/osrelease": linux} | texts)
    found = only(checks.gpu.peer_memory([checks.gpu.Gpu("0000:17:00.0", "NVIDIA", 0)] * 8, tmp_path))
    assert found.level == level
    assert found.text.startswith("8 by NVIDIA")
    assert says in found.text


def test_memory_of_amd_gpus_and_of_none(tmp_path):
    card = [checks.gpu.Gpu("0000:65:00.0", "AMD", 0)]
    write(tmp_path, {"proc/sys/kernel/osrelease": "5.4.0"})
    assert only(checks.gpu.peer_memory([], tmp_path)) == Finding("gpu", "ok", "none")
    assert only(checks.gpu.peer_memory(card, tmp_path)).cure == "modprobe amdgpu"
    write(tmp_path, {"sys/module/amdgpu/refcnt": "0"})
    assert only(checks.gpu.peer_memory(card, tmp_path)).level == "warning"
    write(tmp_path, {"proc/sys/kernel/osrelease": "6.8.0"})
    assert only(checks.gpu.peer_memory(card, tmp_path)).level == "ok"


def test_stores_of_names_are_optional():
    here, absent = checks.names.names({"redis": ("typer",), "pigeon": ("typer", "no-such-package")})
    assert here.level == absent.level == "ok"
    assert "no-such-package is not installed (pip install 'mooncache[pigeon]')" in absent.text
