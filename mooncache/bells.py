"""Workers of a wire of descriptors sleep on bells: one epoll set each, over the wire's own set and an eventfd."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence

from mooncache import forks
from mooncache.kernels.state import State


class Bells:
    """The epoll sets and eventfds of an engine's workers; none where the wire has no descriptors."""

    def __init__(self, state: State, descriptors: Sequence[Sequence[int]], *, spins: bool) -> None:
        self._epolls: list[select.epoll] = []
        self._bells: list[int] = []
        forks.private(self)
        for row, watched in zip(state.worker_rows, descriptors, strict=False):
            try:
                epoll = select.epoll()
                self._epolls.append(epoll)
                bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._bells.append(bell)
            except OSError:
                self.close()
                raise
            epoll.register(bell, select.EPOLLIN | select.EPOLLET)  # by its edges, so that nobody needs to read it
            for descriptor in watched:
                epoll.register(descriptor, select.EPOLLIN | (select.EPOLLET if spins else 0))
            row["epoll"], row["bell_fd"] = epoll.fileno(), bell
            row["serves"], row["spins"] = 1, spins

    def close(self) -> None:
        """Close the epoll sets and eventfds. The workers must have left."""
        for epoll in self._epolls:
            epoll.close()
        while self._bells:
            os.close(self._bells.pop())

    def disown(self) -> None:
        """Close nothing in a forked child; see `forks.Holder`."""
        for epoll in self._epolls:
            epoll.close()
        forks.drop(self._bells)
