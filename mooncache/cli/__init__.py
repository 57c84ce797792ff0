"""The `mooncache` command: this package's own commands, and those that others add by entry point."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import typer
from typer.core import TyperGroup

from mooncache.cli.bench import bench
from mooncache.cli.doctor import doctor
from mooncache.cli.serve import serve
from mooncache.errors import MooncacheError, UsageError

COMMANDS = "mooncache.commands"
"""Entry point group: name -> function. That is how `sim` adds commands which this package never imports."""

FAULT, INTERRUPTED = 2, 130  # exit statuses: the caller's or the machine's fault; Ctrl-C


class Commands(TyperGroup):
    """Own commands first, then entry points, which are imported when they are run or described."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        own = super().list_commands(ctx)
        return [*own, *sorted(added().keys() - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        own = super().get_command(ctx, cmd_name)
        if own is None and cmd_name in added():
            return imported(added()[cmd_name])
        return own

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what it refuses becomes one line on stderr."""
        try:
            return super().invoke(ctx)
        except MooncacheError as error:
            print("mooncache: error:", " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(FAULT) from error
        except KeyboardInterrupt as stop:
            raise typer.Exit(INTERRUPTED) from stop


def added() -> dict[str, EntryPoint]:
    """The commands that entry points add, by name."""
    return {point.name: point for point in entry_points(group=COMMANDS)}


def imported(point: EntryPoint) -> Any:
    """An added command. One that cannot be imported is still listed, and says why when it is run."""
    try:
        function = point.load()
    except (ImportError, AttributeError) as error:
        function = absent(point, error)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(point.name)(function)
    return typer.main.get_command(single)


def absent(point: EntryPoint, error: Exception) -> Any:
    """What stands in for a command that cannot be imported."""

    def command() -> None:
        raise UsageError(f"{point.name} comes from {point.value}, which cannot be imported: {error}") from error

    command.__doc__ = f"Not available: {error}."
    return command


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")
app.command()(serve)
app.command()(doctor)


def show_version(asked: bool) -> None:
    """Print the version and leave."""
    if asked:
        print("mooncache", version("mooncache"))
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Move LLM KV cache between machines, and find out beforehand what that will cost."""


def main() -> None:
    """Run the command line; exits with its status."""
    app()
