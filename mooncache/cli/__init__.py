"""The `mooncache` command: this package's own commands, and those that others add by entry point."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, version
from typing import Any

import typer

from mooncache import plugins
from mooncache.cli.bench import bench
from mooncache.cli.doctor import doctor
from mooncache.cli.found import Found, Place
from mooncache.cli.serve import serve
from mooncache.errors import MooncacheError

FAULT, INTERRUPTED = 2, 130  # exit statuses: the caller's or the machine's fault; Ctrl-C


class Commands(Found):
    """The package's own commands first, then those of entry points."""

    def found(self) -> dict[str, Place]:
        """Return the commands that entry points add."""
        return {name: Place(point.load, needs(point)) for name, point in plugins.offered(plugins.COMMANDS).items()}

    def invoke(self, ctx: Any) -> Any:
        """Run a command; print its refusal as one line on stderr."""
        try:
            return super().invoke(ctx)
        except MooncacheError as error:
            print("mooncache: error:", " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(FAULT) from error
        except KeyboardInterrupt as stop:
            raise typer.Exit(INTERRUPTED) from stop


def needs(point: EntryPoint) -> str:
    """Return what pip installs for an entry point to be imported: its distribution, with the extras that it names."""
    return f"{point.dist.name}[{','.join(point.extras)}]" if point.dist is not None and point.extras else ""


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)
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
    """Run the command line; exit with its status."""
    app(prog_name="mooncache")
