"""The answer of a check, and what checks share: reading the system's files, and findings about unreadable ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Level = Literal["ok", "warning", "error"]

ROOT = Path("/")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        level: "ok"; "warning": it works, but less well or with less; "error": what was asked for does not work.
        text: what was seen, and what it means unless all is well.
        cure: what to type or to set, one possibility a line; None where there is nothing to do.
    """

    check: str
    level: Level
    text: str
    cure: str | None = None


def check(name: str) -> Callable[[Callable[P, Iterator[Finding]]], Callable[P, list[Finding]]]:
    """Make a check of a generator of findings; a file that cannot be read becomes a finding as well."""

    def decorate(look: Callable[P, Iterator[Finding]]) -> Callable[P, list[Finding]]:
        @wraps(look)
        def run(*arguments: P.args, **options: P.kwargs) -> list[Finding]:
            findings: list[Finding] = []
            try:
                findings.extend(look(*arguments, **options))
            except (OSError, ValueError) as error:
                findings.append(unreadable(name, error))
            return findings

        return run

    return decorate


def unreadable(name: str, error: OSError | ValueError) -> Finding:
    """Return the finding that something could not be found out."""
    why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    return Finding(name, "warning", f"cannot be told: {why}")


def read(path: Path) -> str:
    """Read a file of the system, without the last newline."""
    return path.read_text().strip()


def read_if_there(path: Path) -> str | None:
    """Read a file of the system; return None where there is no such file."""
    try:
        return read(path)
    except FileNotFoundError:
        return None


def number(path: Path, base: int = 10) -> int:
    """Read the whole number that a file of the system holds."""
    text = read(path)
    try:
        return int(text, base)
    except ValueError as error:
        raise ValueError(f"{path}: expected a number, got {text!r}") from error


def listed(names: list[str], none: str = "none") -> str:
    """Format names for a sentence: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or none


def attempt(name: str, look: Callable[[], Iterable[T]]) -> tuple[list[T], list[Finding]]:
    """Look something up for several checks; return it, or None and the finding that says why not."""
    try:
        return list(look()), []
    except (OSError, ValueError) as error:
        return [], [unreadable(name, error)]
