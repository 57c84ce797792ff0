"""SimPy's environment with a clock of integer picoseconds."""

from __future__ import annotations

import simpy


class Environment(simpy.Environment):
    """Starts at 0; every delay must be an int. 2**63 picoseconds are 106 days."""

    def __init__(self) -> None:
        super().__init__(initial_time=0)

    @property
    def now(self) -> int:
        """The current time, ps."""
        return self._now  # type: ignore[return-value]
