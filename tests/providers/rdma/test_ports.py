"""Devices as the kernel lists them, in a folder made like its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mooncache.errors import TransportError, UsageError
from mooncache.providers.rdma.gids import parse
from mooncache.providers.rdma.ports import Choice, Gid, Port, all_ports, choose

LINK_LOCAL = "fe80:0000:0000:0000:5054:00ff:fe00:0001"
GLOBAL = "2001:0db8:0000:0000:0000:0000:0000:0001"
MAPPED = "0000:0000:0000:0000:0000:ffff:0a00:0001"  # 10.0.0.1
VLAN = "0000:0000:0000:0000:0000:ffff:0a01:0001"  # 10.1.0.1
UNUSED = "0000:0000:0000:0000:0000:0000:0000:0000"
SUBNET = "fe80:0000:0000:0000:0002:c903:0000:0001"  # of InfiniBand
SHORT = "2001:db8::1"  # GLOBAL, as people write it

V1, V2 = "IB/RoCE v1", "RoCE v2"
ROCE = (
    (LINK_LOCAL, V1, "eth0"),
    (LINK_LOCAL, V2, "eth0"),
    (UNUSED, "", ""),
    (GLOBAL, V1, "eth0"),
    (GLOBAL, V2, "eth0"),
    (MAPPED, V1, "eth0"),
    (MAPPED, V2, "eth0"),
    (VLAN, V1, "eth0.7"),
    (VLAN, V2, "eth0.7"),
)

Make = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A folder like /sys/class/infiniband, beside one like /sys/class/net."""
    for netdev, mtu in (("eth0", 9000), ("eth0.7", 9000), ("eth1", 1500)):
        write(tmp_path / "net" / netdev / "mtu", mtu)
    (tmp_path / "infiniband").mkdir()
    return str(tmp_path / "infiniband")


@pytest.fixture
def port(root: str) -> Make:
    """Adds a port to the folder."""

    def make(
        device: str,
        number: int = 1,
        state: str = "4: ACTIVE",
        layer: str = "Ethernet",
        node: str = "1: CA",
        gids: tuple[tuple[str, str, str], ...] = ROCE,
    ) -> Path:
        top = Path(root) / device
        folder = top / "ports" / str(number)
        write(top / "node_type", node)
        write(top / "fw_ver", "22.36.1010")
        write(top / "device" / "numa_node", 1)
        write(folder / "state", state)
        write(folder / "link_layer", layer)
        write(folder / "rate", "100 Gb/sec (4X EDR)")
        for index, (gid, kind, netdev) in enumerate(gids):
            write(folder / "gids" / str(index), gid)
            if kind:
                write(folder / "gid_attrs" / "types" / str(index), kind)
            if netdev:
                write(folder / "gid_attrs" / "ndevs" / str(index), netdev)
        return folder

    return make


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{content}\n")


def chosen(choices: list[Choice]) -> list[tuple[str, int]]:
    return [(choice.port.name, choice.gid.index) for choice in choices]


def test_a_port_is_read_with_all_that_the_kernel_says(root: str, port: Make) -> None:
    port("mlx5_0", gids=(ROCE[0], ROCE[2], ROCE[6]))
    assert all_ports(root) == [
        Port(
            device="mlx5_0",
            number=1,
            link_layer="Ethernet",
            state="ACTIVE",
            mtu=4096,
            rate_gbps=100.0,
            numa=1,
            netdev="eth0",
            firmware="22.36.1010",
            gids=(
                Gid(0, parse(LINK_LOCAL), "RoCE v1", "eth0", "ipv6"),
                Gid(2, parse(MAPPED), "RoCE v2", "eth0", "ipv4"),
            ),
        )
    ]


def test_what_the_kernel_does_not_say_is_unknown(root: str) -> None:
    (Path(root) / "rxe0" / "ports" / "1").mkdir(parents=True)
    assert all_ports(root) == [Port("rxe0", 1, "", "", 0, 0.0, -1, "", "", ())]


def test_ports_come_by_name_and_number(root: str, port: Make) -> None:
    for device, number in (("mlx5_10", 1), ("mlx5_9", 2), ("mlx5_9", 1)):
        port(device, number)
    assert [found.name for found in all_ports(root)] == ["mlx5_9:1", "mlx5_9:2", "mlx5_10:1"]


@pytest.mark.parametrize(("netdev", "mtu"), [("eth0", 4096), ("eth1", 1024)])
def test_the_mtu_is_what_the_interface_has_room_for(root: str, port: Make, netdev: str, mtu: int) -> None:
    port("mlx5_0", gids=((MAPPED, V2, netdev),))
    assert all_ports(root)[0].mtu == mtu


def test_a_gid_is_shown_as_an_address(root: str, port: Make) -> None:
    port("mlx5_0")
    port("mlx5_1", layer="InfiniBand", gids=((SUBNET, V1, ""),))
    roce, infiniband = all_ports(root)
    assert [str(gid) for gid in roce.gids[1:3]] == [
        "1: fe80::5054:ff:fe00:1 RoCE v2 on eth0",
        f"3: {SHORT} RoCE v1 on eth0",
    ]
    assert str(roce.gids[5]) == "6: 10.0.0.1 RoCE v2 on eth0"
    assert str(infiniband.gids[0]) == "0: fe80::2:c903:0:1 IB"


@pytest.mark.parametrize(
    ("gids", "index"),
    [
        (ROCE, 6),  # v2, and an IPv4 address
        (ROCE[:5], 4),  # v2, and a global address
        (ROCE[:4], 1),  # v2
        ((ROCE[0], ROCE[3], ROCE[5]), 2),  # no v2: an IPv4 address
        ((ROCE[0], ROCE[3]), 1),  # a global address
        ((ROCE[8], ROCE[6]), 0),  # the lowest index of the best
    ],
)
def test_the_best_gid_of_a_port_is_chosen(
    root: str, port: Make, gids: tuple[tuple[str, str, str], ...], index: int
) -> None:
    port("mlx5_0", gids=gids)
    assert chosen(choose(root=root)) == [("mlx5_0:1", index)]


def test_on_infiniband_it_is_the_first(root: str, port: Make) -> None:
    port("mlx5_0", layer="InfiniBand", gids=((SUBNET, V1, ""), (GLOBAL, V1, "")))
    (choice,) = choose(root=root)
    assert choice.gid == Gid(0, parse(SUBNET), "IB", "", "ib")
    assert choice.port.mtu == 0


def test_the_gid_can_be_narrowed_by_interface_family_and_index(root: str, port: Make) -> None:
    port("mlx5_0")
    assert chosen(choose(interface="eth0.7", root=root)) == [("mlx5_0:1", 8)]
    assert chosen(choose(family="ipv6", root=root)) == [("mlx5_0:1", 4)]
    assert chosen(choose(gid_index=5, root=root)) == [("mlx5_0:1", 5)]
    assert chosen(choose(gid_index=0, family="ipv6", interface="eth0", root=root)) == [("mlx5_0:1", 0)]


def test_without_names_every_active_port_with_a_fitting_gid_is_chosen(root: str, port: Make) -> None:
    port("mlx5_0")
    port("mlx5_1", state="1: DOWN")
    port("mlx5_2", gids=((LINK_LOCAL, V2, "eth1"),))
    port("siw0", node="4: RNIC")
    assert chosen(choose(root=root)) == [("mlx5_0:1", 6), ("mlx5_2:1", 0)]
    assert chosen(choose(interface="eth1", root=root)) == [("mlx5_2:1", 0)]


def test_a_device_names_all_its_active_ports_and_each_port_is_chosen_once(root: str, port: Make) -> None:
    for number, state in ((1, "4: ACTIVE"), (2, "1: DOWN"), (3, "4: ACTIVE")):
        port("mlx4_0", number, state)
    port("mlx5_0")
    assert chosen(choose(["mlx4_0", "mlx4_0:3"], root=root)) == [("mlx4_0:1", 6), ("mlx4_0:3", 6)]


def test_without_a_device_the_error_says_how_to_get_one(root: str) -> None:
    assert all_ports(root) == []
    with pytest.raises(TransportError, match=r"expected an RDMA device, .* lists none\. .*modprobe rdma_rxe"):
        choose(root=root)
    with pytest.raises(TransportError, match="expected an RDMA device"):
        choose(root=root + "/none")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (
            ["mlx5_9"],
            {},
            r"or \"device:port\", got 'mlx5_9'; there are mlx5_0:1 \(Ethernet, ACTIVE\), siw0:1 \(iWARP, ",
        ),
        (["mlx5_0:2"], {}, r"got 'mlx5_0:2'; there are mlx5_0:1 "),
        (["mlx5_0:one"], {}, r"got 'mlx5_0:one'"),
        (["siw0"], {}, "speaks iWARP; expected InfiniBand or RoCE"),
        (
            ["mlx5_0"],
            {"gid_index": 2},
            r"expected a GID of index 2 on mlx5_0:1; there are .*6: 10\.0\.0\.1 RoCE v2 on eth0",
        ),
        (["mlx5_0"], {"interface": "eth9"}, "expected a GID of interface eth9 on mlx5_0:1"),
        (["mlx5_0"], {"family": "ib", "interface": "eth0"}, "expected a GID of family ib of interface eth0 on"),
        (
            None,
            {"interface": "eth9"},
            r"expected a port with a GID of interface eth9; there are mlx5_0:1 with 0: fe80::",
        ),
    ],
)
def test_what_is_not_there_is_named_beside_what_is(
    root: str, port: Make, names: list[str] | None, options: dict[str, Any], message: str
) -> None:
    port("mlx5_0")
    port("siw0", node="4: RNIC")
    with pytest.raises(UsageError, match=message):
        choose(names, root=root, **options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mlx5_0:1"], "port mlx5_0:1 is DOWN; see"),
        (["mlx5_0"], r"expected an active InfiniBand or RoCE port; .*mlx5_0:1 \(Ethernet, DOWN\)\..*cable"),
        (None, "expected an active InfiniBand or RoCE port"),
    ],
)
def test_a_port_that_is_down_is_named(root: str, port: Make, names: list[str] | None, message: str) -> None:
    port("mlx5_0", state="1: DOWN")
    with pytest.raises(TransportError, match=message):
        choose(names, root=root)
