"""Addresses as people write them: "host:port", IPv6 in brackets."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv6Address, ip_address

from mooncache.errors import UsageError, came

# A host name or IPv4 address of at most 253 characters (RFC 1035), or a bracketed IPv6 address.
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([A-Za-z0-9._-]{1,253})):([0-9]{1,5})", re.ASCII)


def parse_address(address: str) -> tuple[str, int]:
    """Read host (without brackets) and port, 0..65535, of "host:port" or "[::1]:7000". Raises UsageError."""
    if not isinstance(address, str):
        raise UsageError(f"expected an address such as 'prefill-3:7000' or '[::1]:7000', got {came(address)}")
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UsageError(f"expected an address such as 'prefill-3:7000' or '[::1]:7000', got {address[:300]!r}")
    six, name, port = match.groups()
    try:
        host = name or _written(six)
    except ValueError as error:
        raise UsageError(f"expected an IPv6 address in the brackets of {address[:300]!r}: {error}") from error
    if int(port) > 65535:
        raise UsageError(f"expected a port of at most 65535, got {address[:300]!r}")
    return host, int(port)


def _written(six: str) -> str:
    """Return an IPv6 address as the C library writes it; Python's spelling differs between releases.

    Raises ValueError.
    """
    _, percent, zone = six.partition("%")
    return socket.inet_ntop(socket.AF_INET6, IPv6Address(six).packed) + percent + zone


def is_loopback(host: str) -> bool:
    """Return whether an IP address, with or without a zone, leads to this host alone, IPv4 in IPv6 included."""
    address = ip_address(host.partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_wildcard(host: str) -> bool:
    """Return whether a host stands for all addresses of a machine, at which one can listen and not be dialled."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def join_address(host: str, port: int) -> str:
    """Return "host:port", the inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
