"""Sizes on the command line: "4096", "64KiB", "1.5GiB", "10MB" are bytes."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from mooncache.errors import UsageError

_size = TypeAdapter(ByteSize)
_UNITS = ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)


def size_of(text: str) -> int:
    """Read a size in bytes. Raises UsageError for a text that is no size, and for less than one byte."""
    try:
        size = int(_size.validate_python(text))
    except ValidationError:
        size = 0
    if not 0 < size < 1 << 62:
        raise UsageError(f"expected a size of at least one byte, such as 4096, 64KiB or 1GiB, got {text!r}")
    return size


def spell(size: int) -> str:
    """Return the shortest exact spelling, which `size_of` reads back: 65536 -> "64KiB"."""
    return next((f"{size >> bits}{unit}" for unit, bits in _UNITS if size and size % (1 << bits) == 0), f"{size}B")
