"""Other packages add wires, stores of names and commands by entry points.

A package says in its pyproject.toml, for instance, `[project.entry-points."mooncache.providers"]` and
`carrier = "pigeons:Pigeon"`; once it is installed, `Engine(provider="carrier")` finds it.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from mooncache.errors import UsageError, came

T = TypeVar("T")

PROVIDERS = "mooncache.providers"
"""Name -> function without arguments that makes a `Provider`."""

NAMES = "mooncache.names"
"""Scheme of a URL -> function (parts: urllib.parse.SplitResult, lease_s, timeout_s) that makes a `Names`."""

COMMANDS = "mooncache.commands"
"""Name -> typer function: a subcommand of `mooncache`. That is how `sim` adds some which this package never imports."""


def offered(group: str) -> dict[str, EntryPoint]:
    """Return what installed packages offer in a group, by name; nothing is imported yet."""
    return {point.name: point for point in entry_points(group=group)}


def make(group: str, name: str, kind: type[T], *arguments: Any) -> T:
    """Call the function that is offered under a name with these arguments; return what it makes.

    Raises UsageError: its module cannot be imported, or what it makes is not of this kind.
    """
    try:
        function = offered(group)[name].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the entry point {name!r} of {group} cannot be imported: {error}; install it anew") from error
    made = function(*arguments)
    if not isinstance(made, kind):
        raise UsageError(f"expected the entry point {name!r} of {group} to make a {kind.__name__}, got {came(made)}")
    return made
