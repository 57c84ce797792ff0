"""The threads that call an engine: each has a control block of its own."""

from __future__ import annotations

import os
import threading

from mooncache import forks
from mooncache.errors import EngineInherited
from mooncache.kernels.reclaim import thread_cache
from mooncache.kernels.state import Block, State


class Callers:
    """Control blocks of the threads that call one engine; a block of a thread that has ended is used again.

    Args:
        name: of the engine.

    Attributes:
        local: its `ctl` is the address of the calling thread's control block, once it has one.
        process: whose threads may call.
    """

    def __init__(self, name: str, state: State) -> None:
        self._name, self._state = name, state
        self.local = threading.local()
        self.process = os.getpid()
        self._inherited = False
        self._lock = threading.RLock()
        self._blocks: dict[int, Block] = {}
        forks.private(self)

    def disown(self) -> None:
        """Give no thread a control block in a forked child; see `forks.Holder`."""
        self._inherited = True
        self._lock, self.local = threading.RLock(), threading.local()

    def check_own(self) -> None:
        """Raise EngineInherited in a process that was forked from the engine's."""
        if self._inherited:
            raise EngineInherited(
                f"engine {self._name!r} belongs to process {self.process}, which this one ({os.getpid()}) was forked "
                "from: open an engine here, after the fork, or have multiprocessing 'spawn' its processes"
            )

    @property
    def ctl(self) -> int:
        """The address of the calling thread's control block."""
        try:
            return self.local.ctl  # type: ignore[no-any-return]
        except AttributeError:
            self.local.ctl = self._enter().ctl
            return self.local.ctl  # type: ignore[no-any-return]

    def _enter(self) -> Block:
        """Make a block for a thread that calls for the first time, or take that of a thread that ended."""
        self.check_own()
        with self._lock:
            own = threading.current_thread().ident or 0  # also makes a thread that Python did not start known below
            # A new thread may have the number of one that ended.
            ended = own if own in self._blocks else next(iter(self._left_behind()), None)
            block = Block(self._state) if ended is None else self._blocks.pop(ended)
            self._blocks[own] = block
            return block

    def _left_behind(self) -> list[int]:
        """Return threads that have ended and left a block behind. Under the lock."""
        alive = {thread.ident for thread in threading.enumerate()}
        return [ident for ident in self._blocks if ident not in alive]

    @property
    def blocks(self) -> dict[int, Block]:
        """The blocks that there are, by the numbers of the threads."""
        with self._lock:
            return dict(self._blocks)

    def drop_caches_left_behind(self) -> None:
        """Give back what threads that have ended keep for themselves, under the policy `thread_cache`."""
        with self._lock:
            for ident in self._left_behind():
                thread_cache.drop(self._blocks[ident].ctl)
