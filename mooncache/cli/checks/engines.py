"""The engines that are open on this machine and answer this user: their background threads' trouble."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mooncache.cli.checks.base import ROOT, Finding, check, read_if_there
from mooncache.deadline import Deadline
from mooncache.discovery.dial import dial
from mooncache.discovery.sockets import UNIX_PREFIX
from mooncache.errors import MooncacheError

LISTENS = 0x10000
"""The flag of a listening socket in /proc/net/unix (__SO_ACCEPTCON)."""

ASK_S = 2.0
"""The time for one engine, whose process may be stopped; mostly a millisecond."""


def ask(name: str) -> dict[str, Any]:
    """Ask the engine at a Unix socket to describe itself. Raises MooncacheError if it does not answer this user."""
    answer = dial(f"unix:{name}", "trouble", {}, caller="doctor", generation=1, secret=None, deadline=Deadline(ASK_S))
    answer.sock.close()
    return answer.body


def listening(root: Path) -> list[str]:
    """Return the names of the abstract Unix sockets that engines listen at."""
    rows = [line.split() for line in (read_if_there(root / "proc/net/unix") or "").splitlines()[1:]]
    ours = [row for row in rows if len(row) == 8 and row[7].startswith(f"@{UNIX_PREFIX}")]
    return sorted(row[7][1:] for row in ours if int(row[3], 16) & LISTENS)


@check("engines")
def engines(root: Path = ROOT) -> Iterator[Finding]:
    """Report the trouble of this user's engines. Engines with a secret tell it by `engine.stats()` only."""
    told, silent = 0, 0
    for name in listening(root):
        try:
            said = ask(name)
        except MooncacheError:
            silent += 1
            continue
        told += 1
        for line in said["trouble"]:
            yield Finding("engines", "warning", f"{said['name']!r} of process {said['process']}: {line}")
    text = f"{told} of this user are open and answer"
    if silent:
        text += (
            f"; {silent} do not: they have a secret or another user, or are stopped; see engine.stats().trouble there"
        )
    yield Finding("engines", "ok", text)
