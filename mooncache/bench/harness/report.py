"""The output of benches: one JSON object, or a table and the sentence that says what it means."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any


def answer(report: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], None]) -> None:
    """Print a report for a program or for people."""
    (show_json if as_json else table)(report)


def show_json(report: dict[str, Any]) -> None:
    """Print the report as the one object on stdout."""
    json.dump(report, sys.stdout, indent=2)
    print()


def figure(cell: object) -> str:
    """Format a cell: floats with three digits that count, or all those before the point."""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], says: str) -> None:
    """Print a table of figures, the sentence that says what they mean, and where they were measured."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if isinstance(rows[0][at], str) else "right")
    for row in rows:
        table.add_row(*map(figure, row))
    console = Console()
    console.print(table)
    console.print(says, highlight=False)
    measured = provenance()
    console.print(
        f"Measured on {measured['cpu']}, {measured['cores']} cores, Linux {measured['kernel']}, "
        f"{measured['libc']}, Python {measured['python']}, numba {measured['numba']}.",
        style="dim",
        highlight=False,
    )


@contextmanager
def progress(what: str, steps: int) -> Iterator[Any]:
    """Show a bar on stderr, redrawn only at `bar()`: between measurements only. Silent without a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=steps)
    with bar:
        yield lambda: bar.update(task, advance=1, refresh=True)


def named(row: dict[str, Any]) -> str:
    """Return the provider's name, and that of what carries it where that is another."""
    return row["provider"] if row["transport"] in ("", row["provider"]) else f"{row['provider']} ({row['transport']})"


def between(ratios: Sequence[float]) -> str:
    """Format the range that figures span."""
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"


def provenance() -> dict[str, Any]:
    """Return where and with what the figures were measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "numba": version("numba"),
        "numpy": version("numpy"),
        "mooncache": version("mooncache"),
    }
