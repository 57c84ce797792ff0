"""What the options of several benches may be."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from mooncache.errors import UsageError
from mooncache.kernels.enums import Policy, Store

STORES = tuple(store.name.lower() for store in Store)
POLICIES = tuple(policy.name.lower() for policy in Policy)
PROVIDERS = ("tcp", "shm", "loopback", "auto")

JSON = typer.Option(False, "--json", help="Print one JSON object, and nothing else, on stdout.")


def one_of(what: str, name: str, known: Sequence[str]) -> None:
    """Raise UsageError for a name that is not known."""
    if name not in known:
        raise UsageError(f"expected --{what} to be one of {', '.join(known)}, got {name!r}")


def within(what: str, value: int, most: int) -> None:
    """Raise UsageError for a number that is not in 1 .. most."""
    if not 1 <= value <= most:
        raise UsageError(f"expected --{what} in 1 .. {most}, got {value}")
