"""The refusals of the simulator: scenarios and traces that cannot be read. Nothing was run."""

from __future__ import annotations

from typing import NamedTuple

from mooncache import errors
from mooncache.errors import UsageError


def came(value: object) -> str:
    """Quote a refused value as `mooncache.errors.came` does; None is nothing."""
    return "nothing" if value is None else errors.came(value)


class Problem(NamedTuple):
    """One mistake in a scenario."""

    where: str  # "tp4.yaml:12", or the override "--set nic.rate=4"
    key: str  # "nic.rate"; empty when the file as a whole is meant
    message: str  # "expected a bit rate such as '400Gbps', came 400 (int)"

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class ConfigError(UsageError):
    """A scenario that cannot be used. `problems` holds all that was found, one per printed line."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class TraceError(UsageError):
    """A request trace that cannot be read.

    Attributes:
        file:     path as it was given.
        line:     1-based line number; 0 when the file as a whole is meant.
        field:    name of the JSON field; empty when the line as a whole is meant.
        expected: what the format asks for.
        came:     what was there instead.
    """

    def __init__(self, file: str, line: int, field: str, expected: str, came: str) -> None:
        super().__init__(file, line, field, expected, came)
        self.file, self.line, self.field, self.expected, self.came = file, line, field, expected, came

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part)
        field = f"field {self.field!r}: " if self.field else ""
        return f"{place}: {field}expected {self.expected}, came {self.came}"
