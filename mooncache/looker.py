"""An engine's looker is the thread that has peers asked again whose refusal a worker has reported.

Workers keep the refused slices until the peer was asked again, and write to an eventfd: see `kernels/look.py`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import partial

from mooncache import forks
from mooncache.background import Background


class Looker:
    """A thread that calls `look` of its engine whenever workers ask for it.

    Attributes:
        event_fd: what workers write to.
        background: its thread, and those that `look` starts.
    """

    def __init__(self) -> None:
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.background = Background()
        self._name = ""  # of its thread
        self._closed = False
        forks.private(self)

    def disown(self) -> None:
        """Close the eventfd in a forked child; see `forks.Holder`."""
        forks.drop([self.event_fd])

    def start(self, name: str, look: Callable[[], None]) -> None:
        """Start the thread.

        `look` is a method of the engine, which is not held: a forgotten engine can be collected.
        """
        self._name = f"{name}-looker"
        self.background.start(self._name, partial(self._run, weakref.WeakMethod(look)))

    def _run(self, method: weakref.WeakMethod[Callable[[], None]]) -> None:
        while True:
            look = method()
            if self._closed or look is None:
                return
            look()  # also at first: should it have failed, what was asked for is still to be looked for
            del look
            os.eventfd_read(self.event_fd)

    def stop(self) -> None:
        """End the thread. A look that waits for the network is not waited for."""
        self._closed = True
        self.background.stop()
        if self.event_fd >= 0:
            os.eventfd_write(self.event_fd, 1)
        self.background.join(self._name)

    def close(self) -> None:
        """Close the eventfd. The thread must have been stopped, and the workers must have left."""
        descriptor, self.event_fd = self.event_fd, -1
        forks.drop([descriptor])
