"""Commands that a group finds by name, and imports only when they are run or described."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import typer
from typer.core import TyperGroup

from mooncache.errors import UsageError

Loader = Callable[[], Callable[..., None]]
"""Imports a command; returns the function whose parameters are its options."""


class Found(TyperGroup):
    """Commands that were added to the group first, then those that it finds."""

    @abstractmethod
    def found(self) -> Mapping[str, Loader]:
        """What there is, by the name of the command."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        own = super().list_commands(ctx)
        return [*own, *sorted(self.found().keys() - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        own = super().get_command(ctx, cmd_name)
        if own is None and (load := self.found().get(cmd_name)) is not None:
            return imported(cmd_name, load)
        return own


def imported(name: str, load: Loader) -> Any:
    """A command that was found. One that cannot be imported is still listed, and says why when it is run."""
    try:
        function = load()
    except (ImportError, AttributeError) as error:
        function = absent(name, error)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(function)
    return typer.main.get_command(single)


def absent(name: str, error: Exception) -> Callable[[], None]:
    """What stands in for a command that cannot be imported."""

    def command() -> None:
        raise UsageError(f"{name} cannot be imported: {error}") from error

    command.__doc__ = f"Not available: {error}."
    return command
