"""The actors of an engine beside its callers: the workers, and the reaper where the policy needs one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic_ns

from mooncache.kernels import calls, hand, pump
from mooncache.kernels.reclaim.policies import TRAITS
from mooncache.kernels.state import Block, State
from mooncache.threads import Thread

JOIN_SECONDS = 5.0
"""The time that a close leaves workers to get the NIC's last answers, before connections are broken."""


class Actors:
    """The control blocks and threads of one engine's workers and reaper.

    The threads hold the blocks, not the engine: one that is forgotten can be collected, which closes it.

    Attributes:
        workers, reaper: their control blocks.
        orders: the block of the thread that looks after connections.
        threads: of the workers, then of the reaper, if there is one.
    """

    def __init__(self, state: State) -> None:
        self._settings = state.settings
        self.workers = [Block(state, i) for i in range(state.settings.workers)]
        self.reaper, self.orders = Block(state), Block(state)
        self.threads: list[Thread] = []
        self._template = state.template

    @property
    def blocks(self) -> list[Block]:
        """All their control blocks."""
        return [*self.workers, self.reaper, self.orders]

    def set_turn(self) -> None:
        """Tell all actors, and callers yet to come, how to turn a worker. Compiles the kernel."""
        self._template["turn"] = hand.turn_once.address
        for block in self.blocks:
            block.row["turn"] = hand.turn_once.address

    def start(self, name: str) -> None:
        """Start the threads of the engine called `name`."""
        actors = [(f"worker-{i}", pump.pump, block) for i, block in enumerate(self.workers)]
        if TRAITS[self._settings.policy].needs_reaper:
            actors.append(("reaper", pump.reaper, self.reaper))
        for role, kernel, block in actors:
            self.threads.append(Thread(f"{name}-{role}", partial(kernel, block.ctl)))
            self.threads[-1].start()  # listed first: one that an exception interrupts may have started it

    def end_idle(self, ctl: int) -> None:
        """End those threads that were started; nothing was ever submitted. `ctl`: of the calling thread."""
        calls.stop(ctl)
        calls.stop_reaper(ctl)
        for thread in self.threads:
            thread.join()

    def join(self, ctl: int, hang_up: Callable[[], None]) -> list[str]:
        """Wait for the threads to leave; workers were told to stop. Returns names of workers that hang in the NIC.

        Args:
            ctl: of the calling thread.
            hang_up: breaks all connections, so that workers get their last answers.
        """
        workers, reapers = self.threads[: len(self.workers)], self.threads[len(self.workers) :]
        hanging = _join(workers, JOIN_SECONDS)
        if hanging:
            hang_up()
            hanging = _join(workers, JOIN_SECONDS / 10)
        if hanging:
            calls.abandon(ctl)
            _join(workers, JOIN_SECONDS / 10)
        calls.stop_reaper(ctl)
        _join(reapers, JOIN_SECONDS)
        return hanging


def _join(threads: list[Thread], seconds: float) -> list[str]:
    """Wait for threads to end, all together for so long; return the names of those that did not."""
    deadline = monotonic_ns() + round(seconds * 1e9)
    for thread in threads:
        thread.join(max(0.0, (deadline - monotonic_ns()) / 1e9))
    return [thread.name for thread in threads if thread.is_alive()]
