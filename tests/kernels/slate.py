"""A rig whose NIC is the test: what is posted is written down, and answered as the test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mooncache.descriptor import Keys
from mooncache.errors import Status
from mooncache.kernels import calls
from mooncache.kernels.arrays import address_of
from mooncache.kernels.enums import Order, QueueState
from mooncache.kernels.state import CompletionQueue, QueuePair
from mooncache.kernels.verbs import SEND_SIGNALED, WcStatus
from mooncache.providers.inprocess.base import InProcessProvider
from tests.helpers import Rig
from tests.kernels import entries

OK, FLUSHED = int(WcStatus.SUCCESS), int(WcStatus.WR_FLUSH_ERR)
LOG = 4096  # work requests that a queue's slate has room for
RAILS_OF_KEYS = 16


class Posted(NamedTuple):
    """One work request, as it was posted."""

    wr_id: int
    flags: int
    opcode: int
    remote: int
    rkey: int
    ranges: list[tuple[int, int, int]]  # address, length, lkey

    @property
    def signaled(self) -> bool:
        return bool(self.flags & SEND_SIGNALED)

    @property
    def sequence(self) -> int:
        return self.wr_id & 0xFFFFFFFF


class Slate(InProcessProvider):
    """A wire of several queue pairs, one a rail, each given by what its `QueuePair` differs in."""

    name = "slate"
    post_send = entries.slate_post_send
    poll_cq = entries.slate_poll_cq
    queue_record, port_record, entry = entries.QUEUE, entries.PORT, entries.LOG

    def __init__(self, *rails: Mapping[str, Any], cq_entries: int = 1 << 20) -> None:
        super().__init__()
        self.options = rails or ({},)
        self.rails = len(self.options)
        self.cq_entries = cq_entries
        self.registered = 0

    def open(self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = 8) -> list[list[CompletionQueue]]:
        made = super().open(workers, LOG, inbox, peers)
        self.queue_depth = queue_depth
        self.answers = np.zeros((self.rails, 4 * LOG, 2), np.int64)
        for port, answers in zip(self.lists, self.answers, strict=True):
            port.row["answers"] = address_of(answers)
        used = 1 + max(options.get("cq", rail) for rail, options in enumerate(self.options))
        return [[cq._replace(entries=self.cq_entries) for cq in cqs[:used]] for cqs in made]

    def register(self, address: int, length: int, access: int) -> Keys:
        """Keys that differ from NIC to NIC and from end to end."""
        self.registered += 2
        first = RAILS_OF_KEYS * self.registered
        return Keys(
            tuple(range(first, first + self.rails)),
            tuple(range(first + RAILS_OF_KEYS, first + RAILS_OF_KEYS + self.rails)),
        )

    def prepare(self, queue: Any, worker: int) -> None:
        """Nothing besides."""

    def pair_of(self, queue: Any, peer: Any) -> QueuePair:
        rail = queue.rail
        options = {"cq": rail, "lkeys": rail, "rkeys": self.rails - 1 - rail, "depth": self.queue_depth}
        return queue.pair._replace(**{**options, **self.options[rail]})

    def refuse(self, rail: int, at: int, errno: int, times: int = 1) -> None:
        """Refuse the work request that would be number `at` of its queue, so many times."""
        self.queues[0][rail].row.set(refuse_at=at, refuse_errno=errno, refuse_times=times)


class SlateRig(Rig):
    """A rig on a slate, whose queue pairs are ready. The test answers by itself, or lets an honest NIC do it.

    An honest NIC answers in order, says nothing of unsignaled successes, and flushes what is behind an error on a queue
    that breaks, until that is connected anew.
    """

    def __init__(self, *rails: Mapping[str, Any], cq_entries: int = 1 << 20, **settings: Any) -> None:
        super().__init__(Slate(*rails, cq_entries=cq_entries), **settings)
        self.served = [0] * len(self.rows)  # work requests that the honest NIC has seen to the end
        self.broken = [False] * len(self.rows)
        for rail, row in enumerate(self.rows):
            if row.pair.breaks:
                self.order(rail, Order.PROBE)
        self.turn()
        self.serve()
        self.turn()
        assert all(row.state == QueueState.READY for row in self.rows)

    # ------------------------------------------------------------------------------ what was posted
    def posted(self, rail: int = 0, since: int = 0) -> list[Posted]:
        """All work requests of a queue, from number `since` on."""
        queue = self.provider.queues[0][rail]
        head = queue.row["head"]
        assert head <= LOG, "the slate is full"
        return [
            Posted(
                *(int(e[field]) for field in ("id", "flags", "opcode", "remote", "key")),
                [(int(r["addr"]), int(r["length"]), int(r["lkey"])) for r in e["ranges"][: e["count"]]],
            )
            for e in queue.ring[since:head]
        ]

    @property
    def totals(self) -> list[int]:
        """How many work requests each queue got."""
        return [queue.row["head"] for queue in self.provider.queues[0]]

    # ------------------------------------------------------------------------------ answers
    def answer(self, wr_id: int, status: int = OK, rail: int = 0) -> None:
        """Append a completion to the queue's completion queue."""
        cq = self.rows[rail].pair.cq
        row = self.provider.lists[cq].row
        self.provider.answers[cq][row["answered"]] = wr_id, status
        row["answered"] += 1

    def waiting(self, cq: int = 0) -> int:
        """Completions that nobody has taken yet."""
        row = self.provider.lists[cq].row
        return row["answered"] - row["taken"]

    def serve(self, rail: int | None = None, fail: Callable[[Posted], int] = lambda _: OK, most: int = LOG) -> None:
        """Be an honest NIC for up to `most` work requests of a queue, or of each; `fail` says how each ends."""
        for r in range(len(self.rows)) if rail is None else [rail]:
            for posted in self.posted(r, self.served[r])[:most]:
                status = FLUSHED if self.broken[r] else fail(posted)
                if status != OK and self.rows[r].pair.breaks:
                    self.broken[r] = True
                if status != OK or posted.signaled:
                    self.answer(posted.wr_id, status, r)
                self.served[r] += 1

    # ------------------------------------------------------------------------------ who owns the connections
    def order(self, rail: int, order: Order) -> None:
        calls.order(self.ctl, 0, self.rows[rail].address, int(order))

    def mend(self) -> None:
        """Do about broken queues what their owner does."""
        for rail, row in enumerate(self.rows):
            if row.state == QueueState.BROKEN:
                self.broken[rail] = True
            elif row.state == QueueState.DRAINED:
                self.order(rail, Order.RETURN)
            elif row.state == QueueState.CLOSED and row.pair.breaks:
                self.broken[rail] = False
                self.order(rail, Order.PROBE)

    def finish(self, *handles: int, fail: Callable[[Posted], int] = lambda _: OK) -> None:
        """Turn the worker, the NIC and the owner until these batches are finished."""
        for _ in range(1000):
            self.turn()
            if all(calls.status(self.ctl, handle) != Status.NOT_FINISHED for handle in handles):
                return
            self.serve(fail=fail)
            self.mend()
        raise AssertionError(f"never finished: {self.rows}, {self.counts}")

    # ------------------------------------------------------------------------------ what came of it
    def failures(self, handle: int, requests: int) -> dict[int, Status]:
        request, why = np.zeros(requests, np.int64), np.zeros(requests, np.int64)
        n = calls.failures(self.ctl, handle, request, why, np.zeros((requests, 3), np.int64))
        assert n >= 0
        return {int(r): Status(int(w)) for r, w in zip(request[:n], why[:n], strict=True)}

    def states(self, handle: int, slices: int) -> list[int]:
        """Of the batch's first slices; they are in one chunk."""
        first = int(self.batch(handle)["first"]) * 256
        return [int(s) for s in self.array("slice_state")[first : first + slices]]

    def word(self, field: str, rail: int = 0) -> int:
        """A word of a queue's row."""
        return self.rows[rail].row[field]
