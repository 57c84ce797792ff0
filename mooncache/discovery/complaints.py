"""Log lines that others cause: the first of a kind from a source is written, and the rest are counted."""

from __future__ import annotations

import logging
import threading
from time import monotonic

PERIOD_S = 10.0
"""One line of a kind from a source in this time, and how many more there were."""

SOURCES = 256
"""Pairs of source and kind kept apart; what comes from yet others meanwhile counts as one source."""

OTHERS = "others"


class Complaints:
    """A log for what others cause. Methods may be called from any thread."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._lock = log, threading.Lock()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}  # until when, and how many were not written

    def tell(self, source: str, message: str, *arguments: object, trace: bool = False) -> None:
        """Write a warning, or count it. `message`, its places open, is the kind. `trace`: of the exception at hand."""
        now = monotonic()
        with self._lock:
            self._tell_counts(now)
            key = source, message
            if key not in self._told and len(self._told) >= SOURCES:
                key = OTHERS, ""
            first = key not in self._told
            until, more = (now + PERIOD_S, 0) if first else self._told[key]
            self._told[key] = until, more + (not first)
        if first:
            self._log.warning(message, *arguments, exc_info=trace)

    def close(self) -> None:
        """Write the counts of what was not written."""
        with self._lock:
            self._tell_counts(float("inf"))

    def _tell_counts(self, now: float) -> None:
        for key in [key for key, (until, _) in self._told.items() if until <= now]:
            _, more = self._told.pop(key)
            if more:
                source, message = key
                kind = f" of the kind {message!r}" if message else ""
                self._log.warning("%d more lines%s because of %s were not written", more, kind, source)
