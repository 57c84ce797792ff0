"""File descriptors that a listener keeps for the time when its process has none left."""

from __future__ import annotations

import os
from contextlib import suppress

from mooncache import forks

DESCRIPTORS = (
    1  # the caller's connection
    + 2  # the user's secret: a folder and a file in it
)


class Spare:
    """The descriptors that it takes to let one caller in and to tell it that there are no more."""

    def __init__(self) -> None:
        """Raises OSError: there are not even these."""
        self._kept: list[int] = []
        forks.private(self)
        try:
            self._fill()
        except OSError:
            self.give()
            raise

    def _fill(self) -> None:
        while len(self._kept) < DESCRIPTORS:
            self._kept.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def give(self) -> bool:
        """Close the descriptors, so that they can be used; return False where there are none."""
        given = len(self._kept)
        while self._kept:
            os.close(self._kept.pop())
        return given > 0

    def disown(self) -> None:
        """Close the descriptors in a forked child; see `forks.Holder`."""
        forks.drop(self._kept)
        self._kept.clear()

    def take(self) -> None:
        """Keep the descriptors again; as many as are free."""
        with suppress(OSError):
            self._fill()
