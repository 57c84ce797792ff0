"""Addresses as people write them: "host:port", IPv6 in brackets."""

from __future__ import annotations

import re
from ipaddress import IPv6Address

from mooncache.errors import UsageError

# A host name or IPv4 address of at most 253 characters (RFC 1035), or a bracketed IPv6 address.
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([A-Za-z0-9._-]{1,253})):([0-9]{1,5})", re.ASCII)


def parse_address(address: str) -> tuple[str, int]:
    """Host (without brackets) and port, 0..65535, of "host:port" or "[::1]:7000". Raises UsageError."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UsageError(f"expected an address such as 'prefill-3:7000' or '[::1]:7000', got {address[:300]!r}")
    six, name, port = match.groups()
    try:
        host = name or str(IPv6Address(six))
    except ValueError as error:
        raise UsageError(f"expected an IPv6 address in the brackets of {address[:300]!r}: {error}") from error
    if int(port) > 65535:
        raise UsageError(f"expected a port of at most 65535, got {address[:300]!r}")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
