"""What joins the two guests: a control link and two rails, each an Ethernet cable between two QEMU processes.

```
 left 10.77.0.1 ── control ── 10.77.0.2 right     commands, discovery, handshakes
 left 10.77.1.1 ── rail0 ──── 10.77.1.2 right     rxe0
 left 10.77.2.1 ── rail1 ──── 10.77.2.2 right     rxe1
```
"""

from __future__ import annotations

import socket
import subprocess
from typing import NamedTuple

SIDES = ("left", "right")
PORT = 7700  # of the agent, on the control link


class Link(NamedTuple):
    """One cable. `name` is that of its interface in both guests; `device` the RDMA device on it, if any."""

    name: str
    subnet: str
    device: str = ""

    def address(self, side: str) -> str:
        """IPv4 address of that side."""
        return f"{self.subnet}.{1 + SIDES.index(side)}"

    def mac(self, side: str) -> str:
        """Ethernet address of that side."""
        return f"52:54:00:00:0{LINKS.index(self)}:0{1 + SIDES.index(side)}"


CONTROL = Link("control", "10.77.0")
RAILS = (Link("rail0", "10.77.1", "rxe0"), Link("rail1", "10.77.2", "rxe1"))
LINKS = (CONTROL, *RAILS)


class Cables:
    """Both ends of all links: socket pairs that two QEMU processes inherit, so there are no ports to choose."""

    def __init__(self) -> None:
        self._pairs = [socket.socketpair() for _ in LINKS]

    def ends(self, side: str) -> list[int]:
        """File descriptors of that side, in the order of `LINKS`."""
        return [pair[SIDES.index(side)].fileno() for pair in self._pairs]

    def devices(self, side: str) -> list[str]:
        """QEMU's arguments for that side."""
        arguments = []
        for link, end in zip(LINKS, self.ends(side), strict=True):
            arguments += ["-netdev", f"socket,id={link.name},fd={end}"]
            arguments += ["-device", f"virtio-net-pci,netdev={link.name},mac={link.mac(side)}"]
        return arguments

    def close(self) -> None:
        """Let go of our copies, so that an end is gone when its QEMU is."""
        for pair in self._pairs:
            for end in pair:
                end.close()


def script(side: str) -> str:
    """Bash for a guest of that side: names, addresses and RDMA devices of its links."""
    lines = ["set -e", "modprobe virtio_net", "modprobe rdma_rxe"]
    for link in LINKS:
        by_mac = f"$(basename $(dirname $(grep -l {link.mac(side)} /sys/class/net/*/address)))"
        lines += [
            f"ip link set {by_mac} down name {link.name}",
            f"ip address add {link.address(side)}/24 dev {link.name}",
            f"ip link set {link.name} up",
        ]
        if link.device:
            lines.append(f"rdma link add {link.device} type rxe netdev {link.name}")
    return "\n".join([*lines, "set +e", ""])


def set_link(name: str, up: bool) -> None:
    """Plug this machine's end of a link in, or pull it."""
    subprocess.run(["ip", "link", "set", name, "up" if up else "down"], check=True)
