"""Progress of a long command: a bar at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINES = 5
"""Lines that one activity gets where there is no terminal, about."""


class Told:
    """A reporter on stderr of how far each activity is; silent when `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = not quiet and sys.stderr.isatty()
        self._lines = not quiet and not self._bar
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not self._bar)
        self._task = self._progress.add_task("starting", total=None)
        self._activity, self._said = "", 0.0

    def __enter__(self) -> Told:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, activity: str, done: int, of: int, detail: str = "") -> None:
        """Report that `done` of `of` steps are done; `of` may grow."""
        if activity != self._activity:
            self._activity, self._said = activity, -1.0
        if self._bar:
            description = f"{activity}: {detail}" if detail else activity
            self._progress.update(self._task, completed=done, total=of, description=description)
        elif self._lines and (done / of >= self._said + 1 / LINES or done == of):
            self._said = done / of
            print(f"mooncache: {activity}: {done} of {of}", file=sys.stderr)
