"""RDMA devices, their ports and GIDs as the kernel lists them; and the choice of those to use.

A GID is the address of a port. RoCE ports have several: for every IP address of their network interface one for RoCE
v2 (in UDP, routable) and one for v1 (Ethernet only). Both ends must use the same kind.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mooncache.errors import TransportError, UsageError
from mooncache.providers.rdma import gids

ROOT = "/sys/class/infiniband"
ACTIVE = "ACTIVE"
ROCE_V2, ROCE_V1, IB = "RoCE v2", "RoCE v1", "IB"

MTUS = (4096, 2048, 1024, 512, 256)  # bytes of payload; verbs knows no others
ROCE_HEADER_BYTES = 96  # what Linux keeps for headers of a RoCE packet: iboe_get_mtu in rdma/ib_addr.h


@dataclass(frozen=True)
class Gid:
    """One entry of a port's GID table.

    Attributes:
        gid: 16 bytes.
        type: "RoCE v2", "RoCE v1" or "IB".
        netdev: the network interface it belongs to; empty for InfiniBand.
        family: "ipv4", "ipv6" or "ib".
    """

    index: int
    gid: bytes
    type: str
    netdev: str
    family: str

    @property
    def address(self) -> str:
        """The GID as people write it: an IPv4 or a shortened IPv6 address."""
        return gids.address_of(self.gid)

    def __str__(self) -> str:
        return f"{self.index}: {self.address} {self.type}" + (f" on {self.netdev}" if self.netdev else "")


@dataclass(frozen=True)
class Port:
    """One port of one RDMA device.

    Attributes:
        link_layer: "InfiniBand", "Ethernet", or "iWARP" (which Mooncache cannot use).
        state: "ACTIVE" when it can carry data; else "DOWN", "INIT", "ARMED" or "ACTIVE_DEFER".
        mtu: bytes of payload in a packet, as the network interface's MTU allows; 0 for InfiniBand, where the subnet
            manager decides and only the opened device says (`Nic.mtu`).
        rate_gbps: gigabits per second.
        numa: NUMA node of the device; -1 when unknown.
        netdev: network interface of its first GID; empty for InfiniBand.
        firmware: version, as the device words it.
        gids: those in use, by index.
    """

    device: str
    number: int
    link_layer: str
    state: str
    mtu: int
    rate_gbps: float
    numa: int
    netdev: str
    firmware: str
    gids: tuple[Gid, ...]

    @property
    def name(self) -> str:
        """The port as `choose` takes it: "device:number"."""
        return f"{self.device}:{self.number}"

    def __str__(self) -> str:
        return f"{self.name} ({self.link_layer}, {self.state})"


class Choice(NamedTuple):
    """A port, and the GID by which peers reach it."""

    port: Port
    gid: Gid


def all_ports(root: str = ROOT) -> list[Port]:
    """Return every port of every RDMA device, by name and number; empty when there is none. Needs no pyverbs."""
    devices = sorted(Path(root).glob("*"), key=_natural)
    return [_port(device, port) for device in devices for port in sorted((device / "ports").glob("*"), key=_natural)]


def choose(
    names: Sequence[str] | None = None,
    *,
    gid_index: int | None = None,
    interface: str | None = None,
    family: str | None = None,
    root: str = ROOT,
) -> list[Choice]:
    """Choose the ports to use, each with one GID.

    The GID is a RoCE v2 one before a v1; of those one that is an IPv4 address, then a global and last a link-local
    IPv6 one; then the lowest index. On InfiniBand it is the first.

    Args:
        names: "device" (all its active ports) or "device:port"; None for every active port that has a fitting GID.
        gid_index: only the GID with this index.
        interface: only GIDs of this network interface.
        family: only GIDs of this family: "ipv4", "ipv6" or "ib".

    Raises:
        UsageError: there is no such device, port or GID; says which there are.
        TransportError: there is no RDMA device, or none of the ports is active.
    """
    ports = all_ports(root)
    if not ports:
        raise TransportError(
            f"expected an RDMA device, but {root} lists none. Load the NIC's driver (mlx5_ib, irdma, bnxt_re, ...); in "
            "a container, share the host's /dev/infiniband; without such a NIC, make a device in software: "
            "modprobe rdma_rxe && rdma link add rxe0 type rxe netdev NAME"
        )
    named = ports if names is None else [port for name in names for port in _named(ports, name)]
    active = [port for port in dict.fromkeys(named) if port.state == ACTIVE and port.link_layer != "iWARP"]
    if not active:
        raise TransportError(
            f"expected an active InfiniBand or RoCE port; {_listed(named)}. See `rdma link` and `ip link`: is the "
            "cable in, the interface up, the subnet manager running?"
        )
    choices = [
        Choice(port, gid) for port in active if (gid := _best(port, gid_index, interface, family, names is not None))
    ]
    if not choices:
        there = "; ".join(f"{port.name} with {_gids_of(port)}" for port in active)
        raise UsageError(f"expected a port with {_wanted(gid_index, interface, family)}; there are {there}")
    return choices


def _named(ports: Sequence[Port], name: str) -> list[Port]:
    device, _, number = name.partition(":")
    found = [port for port in ports if port.device == device and number in ("", str(port.number))]
    if not found:
        raise UsageError(f'expected "device" or "device:port", got {name!r}; there are {_listed(ports)}')
    if number and found[0].state != ACTIVE:
        raise TransportError(f"port {name} is {found[0].state}; see `rdma link` and `ip link`, or choose another")
    if all(port.link_layer == "iWARP" for port in found):
        raise UsageError(f"device {device!r} speaks iWARP; expected InfiniBand or RoCE. There are {_listed(ports)}")
    return found


def _best(port: Port, index: int | None, interface: str | None, family: str | None, needed: bool) -> Gid | None:
    fitting = [
        gid
        for gid in port.gids
        if index in (None, gid.index) and interface in (None, gid.netdev) and family in (None, gid.family)
    ]
    if needed and not fitting:
        raise UsageError(f"expected {_wanted(index, interface, family)} on {port.name}; there are {_gids_of(port)}")
    return min(fitting, key=_rank, default=None)


def _rank(gid: Gid) -> tuple[int, int, int]:
    reach = 0 if gid.family == "ipv4" else 2 if gids.is_link_local(gid.gid) else 1
    return (ROCE_V2, ROCE_V1, IB).index(gid.type), reach if gid.type != IB else 0, gid.index


def _wanted(index: int | None, interface: str | None, family: str | None) -> str:
    said = (("index", index), ("family", family), ("interface", interface))
    return "a GID" + "".join(f" of {what} {value}" for what, value in said if value is not None)


def _listed(ports: Sequence[Port]) -> str:
    return ", ".join(map(str, ports))


def _gids_of(port: Port) -> str:
    return ", ".join(map(str, port.gids)) or "none"


# ------------------------------------------------------------------ reading the kernel's files
def _port(device: Path, port: Path) -> Port:
    iwarp = _read(device / "node_type").startswith("4")  # "4: RNIC"; InfiniBand and RoCE are "1: CA"
    link_layer = "iWARP" if iwarp else _read(port / "link_layer")
    table = tuple(_gids(port, link_layer))
    netdev = next((gid.netdev for gid in table if gid.netdev), "")
    rate = re.match(r"[\d.]+", _read(port / "rate"))  # "100 Gb/sec (4X EDR)"
    return Port(
        device=device.name,
        number=int(port.name),
        link_layer=link_layer,
        state=_read(port / "state").partition(": ")[2],  # "4: ACTIVE"
        mtu=_mtu(device.parent.parent / "net" / netdev / "mtu") if netdev else 0,
        rate_gbps=float(rate[0]) if rate else 0.0,
        numa=int(_read(device / "device" / "numa_node") or -1),
        netdev=netdev,
        firmware=_read(device / "fw_ver"),
        gids=table,
    )


def _gids(port: Path, link_layer: str) -> list[Gid]:
    """Read a GID table of up to 1,024 entries, most of them unused: these cost one plain read each, no more."""
    found, table, attributes = [], port / "gids", port / "gid_attrs"
    for index in sorted(map(int, os.listdir(table) if table.is_dir() else ())):
        text = _read(f"{table}/{index}")
        if text.strip("0:"):  # an unused entry is all zeros
            gid = gids.parse(text)
            kind = _read(attributes / "types" / str(index))  # "RoCE v2", or "IB/RoCE v1"
            if link_layer == "InfiniBand":
                found.append(Gid(index, gid, IB, "", "ib"))
            else:
                netdev = _read(attributes / "ndevs" / str(index))
                family = "ipv4" if gids.is_ipv4(gid) else "ipv6"
                found.append(Gid(index, gid, kind if kind == ROCE_V2 else ROCE_V1, netdev, family))
    return found


def _mtu(file: Path) -> int:
    room = int(_read(file) or 0) - ROCE_HEADER_BYTES
    return next((mtu for mtu in MTUS if mtu <= room), 0)


def _natural(path: Path) -> list[tuple[str, int]]:
    """Return a key that sorts "mlx5_10" after "mlx5_9"."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D+|^)(\d*)", path.name)]


def _read(file: Path | str) -> str:
    """Read a file; empty where the kernel answers with an error, as it does for an unused entry."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(descriptor, mmap.PAGESIZE).decode().strip()  # the kernel's files have a page at most
    except OSError:
        return ""
    finally:
        os.close(descriptor)
