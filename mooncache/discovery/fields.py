"""JSON that somebody else wrote is read field by field: nothing is believed that was not checked."""

from __future__ import annotations

import json
from collections.abc import Collection
from math import isfinite
from reprlib import repr as short  # what came may be long, and an error message may not
from typing import Any, NoReturn, TypeVar, cast

from mooncache.errors import DiscoveryError

VERSION = 1
"""The version of records and handshakes alike: all engines that talk to each other are of one release."""

NAME_LENGTH = 255
"""Characters of a name: a host name (253) fits."""

WORD = 2**63
"""Integers are below this: the kernels hold them in int64."""

T = TypeVar("T")


def is_name(name: object) -> bool:
    """Return whether this may name an engine or a provider: 1 to 255 printable characters."""
    return isinstance(name, str) and 1 <= len(name) <= NAME_LENGTH and name.isprintable()


def dump(value: object) -> bytes:
    """Write the one JSON text of a value, the same for every writer: proofs are made over this."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse(text: bytes, source: str) -> Any:
    """Read the JSON value in `text`. Raises DiscoveryError for anything that is not JSON, naming the source."""
    try:
        return json.loads(text.decode("ascii"), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # ValueError: not ASCII, not JSON, or digits without end
        raise DiscoveryError(f"{source}: expected JSON, got {short(text)}: {type(error).__name__}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(digits: str) -> float:
    value = float(digits)
    return value if isfinite(value) else _no_constant(digits)


class Fields:
    """A JSON object of exactly the fields `keys`. Everything raises DiscoveryError naming the source."""

    def __init__(self, value: object, source: str, keys: Collection[str]) -> None:
        self.source = source
        if not isinstance(value, dict) or value.keys() != set(keys):
            raise DiscoveryError(f"{source}: expected an object of {', '.join(keys)}, got {short(value)}")
        self._value: dict[str, Any] = value

    def get(self, key: str, kind: type[T]) -> T:
        """Return the field, which must be of this type; any JSON value for `object`."""
        value = self._value[key]
        if kind is not object and type(value) is not kind:  # isinstance would take True for an integer
            raise DiscoveryError(f"{self.source}: expected {key} to be {kind.__name__}, got {short(value)}")
        return cast(T, value)

    def integer(self, key: str, low: int, end: int) -> int:
        """Return the field, an integer from `low` to below `end`."""
        value = self.get(key, int)
        if not low <= value < end:
            raise DiscoveryError(f"{self.source}: expected {key} to be {low} .. {end - 1}, got {short(value)}")
        return value

    def name(self, key: str) -> str:
        """Return the field, a name (see `is_name`)."""
        value = self.get(key, str)
        if not is_name(value):
            raise DiscoveryError(
                f"{self.source}: expected {key} to be 1 to {NAME_LENGTH} printable characters, got {short(value)}"
            )
        return value


def check_version(value: object, source: str) -> None:
    """Raise DiscoveryError unless the object says this engine's version. The other fields may differ by version."""
    version = value.get("version") if isinstance(value, dict) else None
    if type(version) is not int:
        raise DiscoveryError(f"{source}: expected an object with a version, got {short(value)}")
    if version != VERSION:
        raise DiscoveryError(
            f"{source}: peer speaks version {short(version)}, this engine {VERSION}: use the same release on both ends"
        )
