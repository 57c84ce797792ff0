"""The inside of an engine: its memory, its wire, its workers, and what wakes those who wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mooncache.actors import Actors
from mooncache.awaiting import Awaiting
from mooncache.bells import Bells
from mooncache.inbox import Inbox
from mooncache.kernels import jit
from mooncache.kernels.reclaim import thread_cache
from mooncache.kernels.settings import Settings
from mooncache.kernels.state import Block, State
from mooncache.looker import Looker
from mooncache.providers.base import Provider

SETTLE_S = 1.0
"""The time that `close` gives peers to confirm that nothing of broken connections lands any more; they take ms."""


class Runtime:
    """The parts of one engine that know no peer. Opened together, or not at all, and closed together.

    Args:
        provider: not opened yet; opened and closed with the rest.

    Attributes:
        state, actors, provider, inbox, awaiting, looker: those parts.
    """

    def __init__(self, settings: Settings, provider: Provider) -> None:
        self.provider = provider
        self._opened: list[Callable[[], None]] = []  # what closes the parts that are open
        try:
            self.awaiting = Awaiting()
            self._opened.append(self.awaiting.close)
            self.looker = Looker()
            self._opened.append(self.looker.close)
            self.state = State(settings, event_fd=self.awaiting.event_fd, look_fd=self.looker.event_fd)
            self.actors = Actors(self.state)
            self.awaiting.ctl = self.actors.reaper.ctl
            self.inbox = Inbox(settings)
            self._opened.append(self.inbox.close)
            queues = provider.open(settings.workers, settings.queue_depth, self.inbox.words, settings.peers)
            self._opened.append(provider.close)
            for worker, polled in enumerate(queues):
                self.state.poll_from(worker, polled)
            self.state.worker_rows["trouble_fd"] = provider.trouble_fd
            self._bells = Bells(self.state, provider.descriptors, spins=provider.spins)
            self._opened.append(self._bells.close)
            jit.prewarm()
            self.actors.set_turn()
        except BaseException:
            self._close_parts()
            raise

    def start(self, name: str, look: Callable[[], None]) -> None:
        """Start the threads of the engine called `name`. `look`: see `Looker.start`."""
        self.actors.start(name)
        self.looker.start(name, look)

    def end_idle(self, ctl: int) -> None:
        """Let the started threads leave; nothing was ever submitted. `ctl`: of the calling thread."""
        self.actors.end_idle(ctl)
        self.looker.stop()

    def stop(self, ctl: int) -> list[str]:
        """Wait for the threads to leave; workers were told to stop. Return names of workers that hang in the NIC."""
        hanging = self.actors.join(ctl, self.provider.hang_up)
        self.looker.stop()
        self.awaiting.release()
        return hanging

    def close(self) -> None:
        """Close the wire and the eventfds; all threads have left. Peers get 1 s to confirm what is in doubt.

        A close that an exception of a signal handler interrupts is taken up by the next.
        """
        self.provider.settle(SETTLE_S)
        self._close_parts()

    def _close_parts(self) -> None:
        while self._opened:
            self._opened[-1]()
            self._opened.pop()

    def release(self, blocks: Iterable[Block]) -> None:
        """Free the memory. `blocks`: of the callers."""
        self.state.release([*blocks, *self.actors.blocks])
        self.inbox.release()

    def drop_caches(self, blocks: Iterable[Block]) -> None:
        """Free the slots that callers and workers keep for themselves."""
        for block in [*blocks, *self.actors.workers]:
            thread_cache.drop(block.ctl)
