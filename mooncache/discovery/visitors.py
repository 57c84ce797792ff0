"""Visitors are connections whose callers have not proven anything yet; here is decided which has to go, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

VISITORS = 256
"""The visitors of one listener at once: every peer an engine can have (limits.PEERS) may come in the same moment."""

CROWD = 32
"""From so many on they count as a crowd, which has less patience."""

CROWD_S = 1.0
"""The time for the call of a visitor in a crowd: a hundred times what it takes on a busy host."""

GRACE_S = 0.1
"""Nobody has to go earlier than this: ten times what a call takes on a busy host."""


class Visitors:
    """The visitors in the order of their coming. A source is an address, or a user of this host.

    When there are too many the one to go is the oldest of the source that has most, never the newest comer: who holds
    places without saying anything cannot keep others out.
    """

    def __init__(self) -> None:
        self._came: dict[Hashable, tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._came)

    def enter(self, visitor: Hashable, source: str, now: float) -> None:
        """Add a visitor. There must not be too many."""
        self._came[visitor] = source, now

    def leave(self, visitor: Hashable) -> None:
        """Remove a visitor, which has proven itself or is gone. May be called more than once."""
        self._came.pop(visitor, None)

    @property
    def crowded(self) -> bool:
        """True when there is less patience with new visitors."""
        return len(self._came) >= CROWD

    @property
    def too_many(self) -> bool:
        """True when a visitor has to go before another one enters."""
        return len(self._came) > VISITORS

    def next_to_go(self) -> tuple[Hashable, float]:
        """Return the visitor that has to go, and when; there must be one."""
        most = Counter(source for source, _ in self._came.values()).most_common(1)[0][0]
        return next((visitor, came + GRACE_S) for visitor, (source, came) in self._came.items() if source == most)
