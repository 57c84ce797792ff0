"""Quantities with units, such as "90ns", "64KiB", "400Gbps": read into integers, exactly.

| kind       | integer of    | examples         |
|------------|---------------|------------------|
| Duration   | picoseconds   | 90ns, 1.5us, 3ms |
| Bytes      | bytes         | 512B, 64KiB, 1MB |
| BitRate    | bits a second | 400Gbps          |
| EventRate  | events/second | 200M/s           |
| FlopRate   | FLOP a second | 990T             |

Picoseconds, because a 512 B slice at 400 Gb/s takes 10.24 ns. A bare number is refused: "latency: 2" has been
read as two of something else too often. So is what would have to be rounded, and what int64 cannot hold.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, PlainSerializer

from mooncache.errors import UsageError
from sim.errors import came

_INT64_MAX = 2**63 - 1
_QUANTITY = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) ?([A-Za-z/]+)", re.ASCII)


class Dimension(NamedTuple):
    """One physical dimension: how its quantities are written, and how many base units each unit is."""

    noun: str
    example: str
    base: str  # what the integer counts
    least: int  # smallest value that means anything, in base units
    most: int
    units: dict[str, int]  # base units in one of each, smallest unit first

    def parse(self, value: object) -> int:
        """Read a quantity as an integer of the base unit.

        Raises: UsageError for anything but a string of a decimal number and a known unit, for a quantity that
        is not a whole number of base units, and for one outside `least` to `most`.
        """
        match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
        scale = self._scale(match[2]) if match else None
        if match is None or scale is None:
            wanted = f"such as {self.example!r} (units: {', '.join(self.units)})"
            raise UsageError(f"expected {self.noun} {wanted}, came {came(value)}")
        exact = Fraction(match[1]) * scale
        if exact.denominator != 1:
            raise UsageError(f"expected {self.noun} in whole {self.base}, came {came(value)}")
        if not self.least <= exact <= self.most:
            wanted = f"from {self.least} to {self.most} {self.base}"
            raise UsageError(f"expected {self.noun} {wanted}, came {came(value)}")
        return int(exact)

    def _scale(self, unit: str) -> int | None:
        """Return the base units in one of a unit, which may be all in small or capital letters: 200gbps, 64kib.

        Mixed cases stand as they are written: in Mb the b is a bit.
        """
        if unit in self.units or not (unit.islower() or unit.isupper()):
            return self.units.get(unit)
        return next((scale for name, scale in self.units.items() if name.lower() == unit.lower()), None)

    def spell(self, value: int) -> str:
        """Return the shortest exact spelling of a value that `parse` returned; `parse(spell(value)) == value`."""
        exact = (f"{value // scale}{unit}" for unit, scale in self.units.items() if value % scale == 0)
        return min(exact, key=len)


def _powers(base: int, *units: str) -> dict[str, int]:
    return {unit: base**power for power, unit in enumerate(units)}


_DAY = 86_400 * 10**12  # one duration of a day leaves int64 picoseconds room for sums of a hundred
DURATION = Dimension("a duration", "90ns", "picoseconds", 0, _DAY, _powers(1000, "ps", "ns", "us", "ms", "s"))
BYTES = Dimension(
    "a size",
    "64KiB",
    "bytes",
    1,
    _INT64_MAX,
    _powers(1000, "B", "KB", "MB", "GB", "TB") | _powers(1024, "B", "KiB", "MiB", "GiB", "TiB"),
)
BIT_RATE = Dimension(
    "a bit rate",
    "400Gbps",
    "bits a second",
    1,
    _INT64_MAX,
    _powers(1000, "bps", "Kbps", "Mbps", "Gbps", "Tbps"),
)
EVENT_RATE = Dimension(
    "an event rate", "200M/s", "events a second", 1, _INT64_MAX, _powers(1000, "/s", "K/s", "M/s", "G/s")
)
FLOP_RATE = Dimension(
    "a compute rate",
    "990T",
    "FLOP a second",
    1,
    _INT64_MAX,
    {unit: 1000**power for unit, power in (("M", 2), ("G", 3), ("T", 4), ("P", 5))},
)

_TOKENS = {"k": 1 << 10, "m": 1 << 20}


def parse_tokens(value: object) -> object:
    """Read a number of tokens as context lengths are written: 8k is 8,192, 1M is 1,048,576; leave others."""
    match = re.fullmatch(r"([0-9]{1,9})([kKmM]?)", value, re.ASCII) if isinstance(value, str) else None
    return value if match is None else int(match[1]) * _TOKENS.get(match[2].lower(), 1)


# As pydantic fields: read from strings and dumped as strings in JSON, so that a dumped scenario loads again.
Duration = Annotated[int, BeforeValidator(DURATION.parse), PlainSerializer(DURATION.spell, when_used="json")]
Bytes = Annotated[int, BeforeValidator(BYTES.parse), PlainSerializer(BYTES.spell, when_used="json")]
BitRate = Annotated[int, BeforeValidator(BIT_RATE.parse), PlainSerializer(BIT_RATE.spell, when_used="json")]
EventRate = Annotated[int, BeforeValidator(EVENT_RATE.parse), PlainSerializer(EVENT_RATE.spell, when_used="json")]
FlopRate = Annotated[int, BeforeValidator(FLOP_RATE.parse), PlainSerializer(FLOP_RATE.spell, when_used="json")]


def format_duration(ps: float) -> str:
    """Format a duration for people: three digits and the largest unit not above it: "1.50 us", "-240 ms"."""
    for unit, scale in reversed(DURATION.units.items()):
        if abs(ps) >= scale:
            value = ps / scale
            decimals = max(0, 3 - len(str(int(abs(value)))))
            return f"{value:.{decimals}f} {unit}"
    return f"{ps:g} ps"
