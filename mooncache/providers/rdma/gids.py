"""The address of a port, a GID: 16 bytes. Its text is made and read here alone.

A value is never compared by its text: how a library prints it differs between releases (Python 3.13 writes the last 32
bits of an IPv4 address in decimal), and so between two hosts.
"""

from __future__ import annotations

from ipaddress import IPv6Address

MAPPED = bytes(10) + b"\xff\xff"
"""The beginning of an IPv4 address that is mapped into IPv6 (RFC 4291, 2.5.5.2)."""

SUBNET_BYTES = 8


def parse(text: str) -> bytes:
    """Read a GID in any form of an IPv6 address. Raises ValueError."""
    return IPv6Address(text).packed


def text_of(gid: bytes) -> str:
    """Write a GID as eight words of four hexadecimal digits, as the kernel and pyverbs do and peers are told."""
    return gid.hex(":", 2)


def address_of(gid: bytes) -> str:
    """Write a GID as people do: as an IPv4 or a shortened IPv6 address."""
    parsed = IPv6Address(gid)
    return str(parsed.ipv4_mapped or parsed)


def is_ipv4(gid: bytes) -> bool:
    """Return whether a GID is an IPv4 address mapped into IPv6."""
    return gid.startswith(MAPPED)


def is_link_local(gid: bytes) -> bool:
    """Return whether a GID is an address that only its own link knows."""
    return IPv6Address(gid).is_link_local


def common(a: bytes, b: bytes) -> int:
    """Count the leading bits that two GIDs have in common."""
    return 128 - (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_length()
