"""`mooncache doctor` says what this machine can do, what is wrong, and what to type to put it right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from json import dumps
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mooncache.cli.checks.base import Finding

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


class Need(str, Enum):
    """The provider that has to work; auto is content with whatever there is."""

    AUTO = "auto"
    TCP = "tcp"
    SHM = "shm"
    RDMA = "rdma"


def doctor(
    provider: Need = typer.Option(Need.AUTO, help="What has to work (auto: whatever there is). Its lack is an error."),
    warm: bool = typer.Option(False, "--warm", help="First compile all kernels, on all cores; say how long it took."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object, and nothing else, on stdout."),
) -> None:
    """Say what this machine can do, what is wrong with it, and what to type to put it right.

    Exit status 1 if there is an error; warnings say what works less well.
    """
    from mooncache.cli.checks import examine
    from mooncache.cli.warm import warm as compile_all

    warmed = compile_all() if warm else None
    findings = examine(provider.value)
    ok = not any(finding.level == "error" for finding in findings)
    if json:
        told = {} if warmed is None else {"warm": warmed._asdict()}
        print(dumps({"ok": ok, **told, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        if warmed is not None:
            took = f"{warmed.seconds:g} s ({warmed.cpu_seconds:g} s of all cores)"
            print(f"Compiled {warmed.compiled} of {warmed.kernels} kernels in {took}.")
        show(findings)
    if not ok:
        raise typer.Exit(1)


def show(findings: Sequence[Finding]) -> None:
    """Print the findings as a table; the cures follow it in whole lines, so that they can be copied."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("check", "level", "finding"):
        table.add_column(column)
    for finding in findings:
        table.add_row(Text(finding.check), Text(finding.level, STYLES[finding.level]), Text(finding.text))
    console.print(table)
    for finding in findings:
        if finding.cure is not None:
            console.print(Text(f"To mend {finding.check}:", STYLES[finding.level]))
            for line in finding.cure.splitlines():
                console.print(Text(f"  {line}"), soft_wrap=True)
    console.print(Text(summary(findings)))


def summary(findings: Sequence[Finding]) -> str:
    """Count the errors and warnings in words."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    spelled = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items() if count]
    return (", ".join(spelled) or "Nothing is wrong") + "."
