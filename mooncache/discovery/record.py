"""Records: a `Descriptor` as bytes for other processes. JSON of bounded size; reading it runs nothing."""

from __future__ import annotations

from typing import Any

from mooncache.descriptor import Descriptor, RemoteRegion
from mooncache.discovery.address import parse_address
from mooncache.discovery.fields import VERSION, WORD, Fields, check_version, dump, is_name, parse
from mooncache.errors import CapacityError, DiscoveryError, UsageError
from mooncache.limits import NICS, REGIONS_MOST, KiB

RECORD_BYTES = (
    REGIONS_MOST * (96 + 20 * NICS)  # four field names, two integers of 19 digits, punctuation; rkeys of 19 digits
    + REGIONS_MOST * 64  # the provider's data: numbers of segments that can be mapped, 19 digits each; or NICs
    + 8 * KiB  # two names of 255 characters, each 12 bytes when escaped, the address of 260, the rest
)
"""Largest record."""

ACCESS_BITS = 3
"""enums.Access.READ | WRITE: all that a peer can be allowed."""


def encode(descriptor: Descriptor, keys: bool = True) -> bytes:
    """Write the record of a descriptor, at most RECORD_BYTES.

    Args:
        keys: with rkeys, for peers that have proven who they are. Stores of names hold none.

    Raises:
        UsageError: the name would be refused by `decode`. CapacityError: the record would be too large.
    """
    if not is_name(descriptor.name):
        raise UsageError(f"expected an engine's name to be 1 to 255 printable characters, got {descriptor.name!r}")
    record = dump(to_json(descriptor, keys))
    if len(record) > RECORD_BYTES:
        raise CapacityError(f"engine {descriptor.name!r} has a record of {len(record)} bytes; limit {RECORD_BYTES}")
    return record


def decode(record: bytes, source: str) -> Descriptor:
    """Read the descriptor in a record that came from `source`, as error messages call it. Raises DiscoveryError."""
    if len(record) > RECORD_BYTES:
        raise DiscoveryError(f"{source}: expected a record of at most {RECORD_BYTES} bytes, got {len(record)}")
    return from_json(parse(record, source), source)


def to_json(descriptor: Descriptor, keys: bool = True) -> dict[str, Any]:
    """Return the record as a JSON object, for the body of a handshake."""
    return {
        "version": VERSION,
        "name": descriptor.name,
        "generation": descriptor.generation,
        "address": descriptor.address,
        "provider": descriptor.provider,
        "regions": [{**region._asdict(), "rkeys": list(region.rkeys) if keys else []} for region in descriptor.regions],
        "data": descriptor.data,
    }


def from_json(value: object, source: str) -> Descriptor:
    """Read a JSON object of `to_json`; check everything but `data`, the provider's. Raises DiscoveryError."""
    check_version(value, source)
    fields = Fields(value, source, ("version", "name", "generation", "address", "provider", "regions", "data"))
    regions = fields.get("regions", list)
    if len(regions) > REGIONS_MOST:
        raise DiscoveryError(f"{source}: expected at most {REGIONS_MOST} regions, got {len(regions)}")
    return Descriptor(
        fields.name("name"),
        fields.integer("generation", 1, WORD),
        _address(fields),
        fields.name("provider"),
        tuple(_region(region, f"{source}: region {i}") for i, region in enumerate(regions)),
        fields.get("data", object),
    )


def _address(fields: Fields) -> str:
    address = fields.get("address", str)
    try:
        if address:
            parse_address(address)
    except UsageError as error:
        raise DiscoveryError(f"{fields.source}: {error}") from error
    return address


def _keys(values: list[object], source: str) -> tuple[int, ...]:
    if len(values) > NICS:
        raise DiscoveryError(f"{source}: expected at most {NICS} rkeys, got {len(values)}")
    return tuple(Fields({"rkey": value}, source, ("rkey",)).integer("rkey", 0, WORD) for value in values)


def _region(value: object, source: str) -> RemoteRegion:
    fields = Fields(value, source, RemoteRegion._fields)
    address = fields.integer("address", 0, WORD)
    return RemoteRegion(
        address,
        fields.integer("length", 1, WORD - address),
        _keys(fields.get("rkeys", list), source),
        fields.integer("access", 1, ACCESS_BITS + 1),
    )
