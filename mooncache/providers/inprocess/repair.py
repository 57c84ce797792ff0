"""The mender of queue pairs that break, on wires whose peers live in the same process.

    BROKEN   its device is told to fail it, so that all of it comes back
    DRAINED  Order.RETURN: nothing of it is still on its way to the peer
    CLOSED   it is connected anew, as soon as that can be, and Order.PROBE

A thread that sleeps until a worker tells of trouble; each state is answered with one order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from mooncache import forks
from mooncache.background import Background
from mooncache.kernels import calls
from mooncache.kernels.enums import Order, QueueState
from mooncache.kernels.state import QueueRow
from mooncache.threads import Thread


class Mender:
    """A thread that gives orders about queue pairs that break.

    Args:
        fail: lets the device fail what is in flight on a queue pair, and whatever is posted to it.
        renew: connects a closed queue pair anew; False when that cannot be done now.
        background: of the provider; runs the thread.

    Attributes:
        descriptor: eventfd for workers to write to.
        lock: held while orders are given; whoever changes what `renew` would answer holds it too.
    """

    def __init__(
        self, fail: Callable[[QueueRow], None], renew: Callable[[QueueRow], bool], background: Background
    ) -> None:
        self._fail, self._renew, self._background = fail, renew, background
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC)
        self.lock = threading.Lock()
        self._rows: list[QueueRow] = []
        self._last: dict[int, Order] = {}  # by address of the row
        self._ctl = 0
        self._closing = False
        self._thread: Thread | None = None
        forks.private(self)

    def watch(self, rows: Sequence[QueueRow], ctl: int) -> None:
        """Watch these queue pairs from now on: probe those that are new, or were lost. `ctl` is used under the lock."""
        with self.lock:
            self._ctl = ctl
            for row in rows:
                if self._last.get(row.address, Order.LOSE) == Order.LOSE:
                    if row.address not in self._last:
                        self._rows.append(row)
                    self._renew(row)
                    self._give(row, Order.PROBE)
            if self._thread is None:
                self._thread = self._background.start("mooncache-mender", self._run, self._lose)

    def break_all(self, chosen: Callable[[QueueRow], bool]) -> None:
        """Order that nothing more is posted to these; their device fails them already. The caller holds `lock`."""
        for row in filter(chosen, self._rows):
            if self._last[row.address] != Order.LOSE:  # which may not be obeyed yet, and says more
                self._give(row, Order.BREAK)
        self.look_again()

    def lose(self, chosen: Callable[[QueueRow], bool]) -> None:
        """Fail what is under way on these queue pairs, whose peer is gone, and mend them no more."""
        with self.lock:
            for row in filter(chosen, self._rows):
                self._fail(row)
                self._give(row, Order.LOSE)

    def drop(self, rows: Sequence[QueueRow]) -> None:
        """Watch these queue pairs no longer. Nothing is under way on them."""
        with self.lock:
            self._rows = [row for row in self._rows if row not in rows]
            for row in rows:
                self._last.pop(row.address, None)

    def look_again(self) -> None:
        """Let the thread look at all queue pairs."""
        os.eventfd_write(self.descriptor, 1)

    def close(self) -> None:
        """End the thread. The workers must have left."""
        self._closing = True
        self._background.stop()
        if self.descriptor >= 0:
            self.look_again()
        if self._thread is not None:
            self._thread.join()
        descriptor, self.descriptor = self.descriptor, -1
        forks.drop([descriptor])

    def disown(self) -> None:
        """Close the descriptor in a forked child; see `forks.Holder`."""
        forks.drop([self.descriptor])

    def _run(self) -> None:
        while not self._closing:
            with self.lock:
                for row in self._rows:
                    self._mend(row)
            os.eventfd_read(self.descriptor)

    def _lose(self, error: Exception) -> None:
        """Fail what waits for a queue pair to be mended as PEER_GONE: the thread has failed."""
        with self.lock:
            for row in self._rows:
                if row.state in (QueueState.BROKEN, QueueState.DRAINED) and self._last[row.address] != Order.LOSE:
                    self._give(row, Order.LOSE)
                    self._last[row.address] = Order.NONE  # its peer is there: it is mended as soon as the thread can

    def _mend(self, row: QueueRow) -> None:
        state, last = row.state, self._last[row.address]
        if last == Order.LOSE:
            return
        if state == QueueState.BROKEN:
            self._fail(row)
        elif state == QueueState.DRAINED and last != Order.RETURN:
            self._give(row, Order.RETURN)
        elif state == QueueState.CLOSED and last != Order.PROBE and self._renew(row):
            self._give(row, Order.PROBE)

    def _give(self, row: QueueRow, order: Order) -> None:
        self._last[row.address] = order
        calls.order(self._ctl, row.worker, row.address, int(order))
