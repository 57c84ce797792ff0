"""The sockets that a listener listens at, the event loop that serves them, and the address that peers are told."""

from __future__ import annotations

import asyncio
import re
import secrets
import selectors
import socket
from typing import Any

from mooncache import forks
from mooncache.discovery.address import is_loopback, is_wildcard, join_address, parse_address
from mooncache.errors import TransportError, UsageError

BACKLOG = 512
"""Connections that wait in the system meanwhile: twice as many as may be at the door (`visitors`)."""


UNIX_PREFIX = "mooncache-"
"""The beginning of the names of Unix sockets, by which engines are found on a machine."""


def resolve_own(bind: str, loopback_only: bool) -> tuple[int, Any]:
    """Return address family and socket address to listen at: the first that the system names for the host."""
    host, port = parse_address(bind)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TransportError(f"cannot listen at {bind}: unknown host ({error}); bind to an address") from error
    outside = [where[0] for *_, where in found if not is_loopback(str(where[0]))]
    if outside and loopback_only:
        raise UsageError(
            f"other hosts can reach {bind} ({outside[0]}), and without a secret anybody there could read and write "
            "this engine's memory: set a secret, bind to 127.0.0.1, or say insecure=True"
        )
    return found[0][0], found[0][4]


def listen_tcp(family: int, where: Any, bind: str) -> socket.socket:
    """Open a non-blocking socket that listens. Raises TransportError, and OSError when no descriptor is left."""
    sock = forks.private(socket.socket(family, socket.SOCK_STREAM))
    try:
        # A restart need not wait until the system has forgotten the old connections.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise TransportError(
            f"cannot listen at {bind}: {error.strerror}; another port, or port 0 for a free one, and an address of "
            "this machine will do"
        ) from error
    return sock


def listen_unix() -> socket.socket:
    """Open a socket that listens at an abstract name: no file is left behind."""
    sock = forks.private(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    sock.bind(f"\0{UNIX_PREFIX}{secrets.token_hex(16)}")
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


class Loop(asyncio.SelectorEventLoop):
    """An event loop that is silent when it is collected half made, for want of descriptors to wake itself by."""

    made = False

    def __init__(self, selector: selectors.BaseSelector) -> None:
        super().__init__(selector)
        self.made = True

    def __del__(self) -> None:
        if self.made:
            super().__del__()


def advertised(host: str, advertise: str | None, port: int) -> str:
    """Return the "host:port" that peers are told. Raises UsageError for one that nobody could dial."""
    if advertise is None:
        advertise = socket.gethostname() if is_wildcard(host) else host
    if not isinstance(advertise, str):
        raise UsageError(f"expected advertise to be 'host' or 'host:port', got {advertise!r}")
    try:
        host, port = parse_address(advertise)
    except UsageError:  # a host alone, or nothing
        try:
            host, _ = parse_address(join_address(re.sub(r"^\[(.*)\]$", r"\1", advertise), port))
        except UsageError as error:
            raise UsageError(
                "expected advertise (else the name of this machine) to be a host or 'host:port' that peers can dial, "
                f"such as 'prefill-3', 'prefill-3:7000' or '[fd00::3]:7000', got {advertise[:300]!r}"
            ) from error
    if port == 0 or is_wildcard(host):
        raise UsageError(f"expected advertise to be one host and port for peers to dial, got {advertise!r}")
    return join_address(host, port)
