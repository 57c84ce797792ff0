"""`mooncache bench`: every file of `mooncache.bench` is a command."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

import typer

from mooncache import bench as benches
from mooncache.cli.found import Found, Place


class Benches(Found):
    """The benches as commands, one a file. A bench's kernels are compiled only when it is run."""

    def found(self) -> dict[str, Place]:
        """Return the benches by name."""
        files = [module.name for module in iter_modules(benches.__path__) if not module.ispkg]
        return {name: Place(partial(command, name)) for name in files}


def command(name: str) -> Callable[..., None]:
    """Return the function that runs a bench; its parameters are the options."""
    function: Callable[..., None] = import_module(f"{benches.__name__}.{name}").command
    return function


bench = typer.Typer(cls=Benches, no_args_is_help=True, help="Measure this machine with the real engine.")
