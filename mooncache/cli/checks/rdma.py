"""RDMA devices: ports and their settings, access to them, and the library that talks to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mooncache.cli.checks.base import ROOT, Finding, Level, check, listed, read, read_if_there
from mooncache.errors import TransportError, UsageError
from mooncache.providers.rdma.gids import is_link_local
from mooncache.providers.rdma.library import Installed, installed
from mooncache.providers.rdma.ports import ACTIVE, MTUS, ROCE_V2, Port, all_ports, choose

JUMBO = 9000
LISTED = 4  # GIDs that a line names; a port may have hundreds
DRIVER = (
    "modprobe mlx5_ib    (or the driver of your NIC)\n"
    "without a NIC, to try things: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev NETDEV"
)
GIVE = "docker: docker run --device=/dev/infiniband ..."


def devices(root: Path = ROOT) -> Path:
    """Return the folder where Linux lists RDMA devices."""
    return root / "sys/class/infiniband"


def found_ports(root: Path = ROOT) -> list[Port]:
    """Return every port of every RDMA device. Raises ValueError for what cannot be understood."""
    return all_ports(str(devices(root)))


def usable(port: Port) -> bool:
    """Return whether the engine could send through a port."""
    return port.state == ACTIVE and port.link_layer != "iWARP"


def severity(need: str) -> Level:
    """Return how bad it is that RDMA does not work."""
    return "error" if need == "rdma" else "warning"


def ports(need: str, found: Sequence[Port], root: Path = ROOT) -> list[Finding]:
    """Check all ports of all devices; a lack of any is an error only where RDMA has to work."""
    if not found:
        text = "no RDMA device; tcp and shm work"
        return [Finding("rdma", severity(need), text, DRIVER if need == "rdma" else None)]
    spare = any(usable(port) and port.gids for port in found)  # then one that is out of order takes nothing away
    level = "warning" if spare else severity(need)
    findings = []
    for port in found:
        findings += link(port, level, root)
        if usable(port):
            findings += [*mtu(port, root), *gids(port, level, root)]
    return findings


@check("rdma")
def link(port: Port, level: Level, root: Path = ROOT) -> Iterator[Finding]:
    """Check whether a port is up, and say what it is; `level` says how bad it is if it is not."""
    name = f"rdma {port.name}"
    physical = read_if_there(devices(root) / f"{port.device}/ports/{port.number}/phys_state") or "unknown"
    parts = [
        port.link_layer, port.state, f"physically {physical.rpartition(': ')[2]}",
        f"{port.rate_gbps:g} Gb/s" if port.rate_gbps else "rate unknown",
        f"NUMA node {port.numa}" if port.numa >= 0 else "NUMA node unknown",
        f"firmware {port.firmware or 'unknown'}",
    ]  # fmt: skip
    text = ", ".join(parts + [f"netdev {port.netdev}"] * bool(port.netdev))
    if usable(port):
        yield Finding(name, "ok", text)
    elif port.link_layer == "iWARP":
        yield Finding(name, level, f"{text}: Mooncache speaks InfiniBand and RoCE, not iWARP")
    elif port.link_layer == "InfiniBand":
        cure = "systemctl start opensm    (a subnet manager, on one machine of the fabric)\nor look at the cable"
        yield Finding(name, level, f"{text}: nothing can be sent", cure)
    else:
        cure = f"ip link set {port.netdev or 'NETDEV'} up\nor look at the cable"
        yield Finding(name, level, f"{text}: nothing can be sent", cure)


@check("rdma mtu")
def mtu(port: Port, root: Path = ROOT) -> Iterator[Finding]:
    """Check the MTU of a port: on RoCE it is that of the netdev less some 60 bytes, rounded down to a power of two."""
    name = f"rdma {port.name} mtu"
    if port.link_layer == "InfiniBand":
        yield Finding(name, "ok", "as the subnet manager sets it")
        return
    around = read_if_there(root / f"sys/class/net/{port.netdev}/mtu") if port.netdev else None
    if around is None:
        yield Finding(name, "warning", "unknown: its netdev is not seen here (in another network namespace?)")
        return
    text = f"{port.mtu} bytes in frames of {around} of {port.netdev}"
    if port.mtu == MTUS[0]:
        yield Finding(name, "ok", text)
    else:
        cure = f"ip link set mtu {JUMBO} dev {port.netdev}    (on both hosts; the switches between have to carry it)"
        yield Finding(name, "warning", f"{text}: a NIC sends fewer and larger packets with {MTUS[0]}", cure)


@check("rdma gid")
def gids(port: Port, level: Level, root: Path = ROOT) -> Iterator[Finding]:
    """Check which GIDs a port has, and by which of them peers reach it; `level` says how bad it is to have none."""
    name = f"rdma {port.name} gid"
    address = f"ip addr add ADDRESS/PREFIX dev {port.netdev or 'NETDEV'}"
    try:
        ((_, gid),) = choose([port.name], root=str(devices(root)))
    except (UsageError, TransportError) as error:
        yield Finding(name, level, f"none to use: {error}", address)
        return
    others = [str(other) for other in port.gids if other != gid]
    more = [f"{len(others) - LISTED} more"] if len(others) > LISTED else []
    text = f"uses {gid}" + (f"; there are also {listed(others[:LISTED] + more)}" if others else "")
    if port.link_layer == "InfiniBand" or (gid.type == ROCE_V2 and not is_link_local(gid.gid)):
        yield Finding(name, "ok", text)
    elif gid.type == ROCE_V2:
        yield Finding(name, "warning", f"{text}: it reaches peers on the same link only", address)
    else:
        yield Finding(name, "warning", f"{text}: there is no RoCE v2, the only one that routers pass on", address)


@check("rdma access")
def access(need: str, found: Sequence[Port], root: Path = ROOT) -> Iterator[Finding]:
    """Check whether this process may open the devices: a container has them only if it was given them."""
    classes = root / "sys/class/infiniband_verbs"
    nodes = {read(node / "ibdev"): root / "dev/infiniband" / node.name for node in sorted(classes.glob("uverbs*"))}
    for device in dict.fromkeys(port.device for port in found):
        name, node = f"rdma {device} access", nodes.get(device)
        if node is None:
            yield Finding(name, severity(need), "it has no verbs device: ib_uverbs is not loaded", "modprobe ib_uverbs")
            continue
        try:
            os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            cure = f"{GIVE}\non the host: udevadm trigger --subsystem-match=infiniband_verbs"
            yield Finding(name, severity(need), f"{node} is missing", cure)
        except OSError as error:
            cure = f"{GIVE}\non the host: chmod 666 {node}"
            yield Finding(name, severity(need), f"{node} cannot be opened: {error.strerror}", cure)
        else:
            yield Finding(name, "ok", f"{node} opens")


@check("rdma library")
def library(need: str, found: Sequence[Port], what: Installed | None = None) -> Iterator[Finding]:
    """Check pyverbs beside rdma-core; without a device it is missed only where RDMA has to work."""
    seen = installed() if what is None else what
    if seen.problem is None:
        yield Finding("rdma library", "ok", f"pyverbs {seen.pyverbs} beside libibverbs of rdma-core {seen.rdma_core}")
    elif need == "rdma" or found:
        yield Finding("rdma library", severity(need), f"RDMA needs pyverbs: {seen.problem}", seen.cure)
    else:
        yield Finding("rdma library", "ok", f"pyverbs: {seen.problem}; it is needed for RDMA only")
