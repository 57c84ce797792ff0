"""Commands that a group finds by name, and imports only when they are run or described."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import typer
from rich.markup import escape
from typer.core import TyperGroup

from mooncache.errors import UsageError


class Place(NamedTuple):
    """The place that a command is loaded from."""

    load: Callable[[], Callable[..., None]]
    """Imports it; returns the function whose parameters are its options."""
    needs: str = ""
    """The requirement that pip installs for it to work, such as mooncache[sim]."""


class Found(TyperGroup):
    """A group of the commands that were added to it, and after them of those that it finds."""

    @abstractmethod
    def found(self) -> Mapping[str, Place]:
        """Return the commands there are, by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        own = super().list_commands(ctx)
        return [*own, *sorted(self.found().keys() - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of that name, or None."""
        own = super().get_command(ctx, cmd_name)
        if own is None and (place := self.found().get(cmd_name)) is not None:
            return imported(cmd_name, place)
        return own

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command to run. Refuse one that does not exist, with the name that is most alike."""
        if args and self.get_command(ctx, args[0]) is None:
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if close:
                ctx.fail(f"No such command {args[0]!r}. Did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)


def imported(name: str, place: Place) -> Any:
    """Import a command. One that cannot be imported is still listed, and says why when it is run."""
    settings: dict[str, Any] = {}
    try:
        function = place.load()
    except (ImportError, AttributeError) as error:
        function = absent(name, place.needs, error)
        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, context_settings=settings)(function)
    return typer.main.get_command(single)


def absent(name: str, needs: str, error: Exception) -> Callable[..., None]:
    """Make a command that stands for one that cannot be imported: it takes any options, and refuses."""
    if needs and isinstance(error, ModuleNotFoundError):
        why = f"needs more than the engine does: pip install '{needs}' ({error})"
    else:
        why = f"cannot be imported: {error}"

    def command(ctx: typer.Context) -> None:
        raise UsageError(f"{name} {why}") from error

    command.__doc__ = escape(f"Not available: {why}.")
    return command
