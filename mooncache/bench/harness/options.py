"""Options that several benches have, and the names that they take."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import typer

from mooncache.kernels.enums import Policy, Store

STORES = tuple(store.name.lower() for store in Store)
POLICIES = tuple(policy.name.lower() for policy in Policy)
StoreName = Enum("StoreName", {name.upper(): name for name in STORES}, type=str)  # type: ignore[misc]
PolicyName = Enum("PolicyName", {name.upper(): name for name in POLICIES}, type=str)  # type: ignore[misc]

JSON = typer.Option(False, "--json", help="Print one JSON object, and nothing else, on stdout.")


class Op(str, Enum):
    """The operations that a bench measures."""

    WRITE = "write"
    READ = "read"


class Provider(str, Enum):
    """The wires between processes, the one within a process, and the choice between them."""

    TCP = "tcp"
    SHM = "shm"
    LOOPBACK = "loopback"
    AUTO = "auto"


def names(chosen: Iterable[Enum]) -> list[str]:
    """Return the values of what a repeatable option was given, each once, in the order given."""
    return list(dict.fromkeys(one.value for one in chosen))
