"""The scenarios that come with the simulator, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from mooncache.errors import UsageError

_HERE = Path(__file__).resolve().parent


def folder() -> Path:
    """Return the folder of scenarios: beside this file in an installation, at the top of a checkout."""
    installed = _HERE / "configs"
    return installed if installed.is_dir() else _HERE.parent / "configs"


def names() -> list[str]:
    """Return the names of the scenarios."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(asked: str) -> Path:
    """Return the file of a scenario: of one that comes with the simulator by its name, of any other by its path.

    Raises: UsageError for a name that is neither.
    """
    path = Path(asked)
    if path.suffix or path.name != asked or path.is_file():
        return path
    known = names()
    if asked in known:
        return folder() / f"{asked}.yaml"
    close = difflib.get_close_matches(asked, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise UsageError(f"expected a scenario's name or file, came {asked!r}; {hint}")
