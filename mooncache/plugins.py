"""What other packages add to this one by entry points: wires, stores of names, commands.

A package says in its pyproject.toml, for instance, `[project.entry-points."mooncache.providers"]` and
`carrier = "pigeons:Pigeon"`; once it is installed, `Engine(provider="carrier")` finds it.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

PROVIDERS = "mooncache.providers"
"""Name -> function without arguments that makes a `Provider`."""

NAMES = "mooncache.names"
"""Scheme of a URL -> function (parts: urllib.parse.SplitResult, lease_s, timeout_s) that makes a `Names`."""

COMMANDS = "mooncache.commands"
"""Name -> typer function: a subcommand of `mooncache`. That is how `sim` adds some which this package never imports."""


def offered(group: str) -> dict[str, EntryPoint]:
    """What installed packages offer in a group, by name; nothing is imported yet."""
    return {point.name: point for point in entry_points(group=group)}
