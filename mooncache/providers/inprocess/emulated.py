"""A NIC of stated rate, message rate, latency and depth: the CPU side is real, the wire is a stated assumption (`nic`).

A plan of faults, made from a seed, can delay, fail, flush and reorder. Several NICs are several rails: each has
servers, queue pairs and completion queues of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mooncache import limits
from mooncache.errors import UsageError
from mooncache.kernels.arrays import WORD, Row, address_of, aligned, function_address, rows_of
from mooncache.kernels.records.queue import WEIGHT_ONE
from mooncache.kernels.state import CompletionQueue, QueuePair, QueueRow
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.base import Provider
from mooncache.providers.device import Queue
from mooncache.providers.inprocess.base import InProcess, InProcessProvider
from mooncache.providers.inprocess.faults import PS_PER_NS, Action, Fault
from mooncache.providers.inprocess.nic import ENTRY, FRACTION_BITS, MOVE_BYTES, NIC, RANGE_BYTES, poll_cq, post_send
from mooncache.providers.inprocess.repair import Mender

PS_PER_S = 10**12


@dataclass(frozen=True)
class Nic:
    """The capacities of a NIC. Defaults: a 400 Gb/s port; ConnectX-6's 215 M messages/s rounded down; HDR-class
    latency.

    Attributes:
        faults: each of one of this NIC's work requests.
        signal: it asks engines to ask for a completion every so many work requests.
        gathers: most ranges of one work request.
        breaks: any error breaks the queue pair, which is then connected anew.
    """

    bits_per_s: int = 400 * 10**9
    messages_per_s: int = 200 * 10**6
    latency_ns: float = 2000
    move_bytes: bool = True
    faults: Sequence[Fault] = field(default=())
    signal: int = 1
    gathers: int = 1
    breaks: bool = False

    def __post_init__(self) -> None:
        if self.signal < 1 or not 1 <= self.gathers <= limits.SLICES_GATHERED:
            raise UsageError(f"a NIC has signal >= 1 and gathers 1 to {limits.SLICES_GATHERED}, got {self!r}")
        if (self.signal > 1 or self.breaks) and any(fault.action == Action.REORDER for fault in self.faults):
            raise UsageError("a completion out of order says nothing of those before it: reorder with signal=1 only, "
                             "and on a NIC that does not break")  # fmt: skip
        if self.bits_per_s <= 0 or self.messages_per_s <= 0 or self.latency_ns < 0:
            raise UsageError(f"a NIC needs a rate > 0, a message rate > 0 and a latency >= 0, got {self!r}")

    @property
    def message_ps(self) -> int:
        """Picoseconds a message takes."""
        return PS_PER_S // self.messages_per_s

    @property
    def byte_cost(self) -> int:
        """Picoseconds a byte takes on the wire, in units of 2**-FRACTION_BITS."""
        return (8 * PS_PER_S << FRACTION_BITS) // self.bits_per_s


class Rail:
    """One NIC of an engine: its record, and whether it can be reached."""

    def __init__(self, nic: Nic) -> None:
        self.nic, self.down = nic, False
        plan = sorted((fault.at, int(fault.action), fault.value) for fault in nic.faults)
        if len({at for at, _, _ in plan}) < len(plan):
            raise UsageError("a fault plan may hold one fault a work request")
        self.plan = np.array([*plan, (-1, 0, 0)], np.int64)
        self.row = Row(rows_of(NIC))
        self.row.set(
            message_ps=nic.message_ps,
            byte_cost=nic.byte_cost,
            latency=round(nic.latency_ns * PS_PER_NS),
            move=nic.move_bytes,
            gathers=nic.gathers,
            breaks=nic.breaks,
            plan=address_of(self.plan),
            plan_left=len(plan),
            clock=function_address("clock_gettime"),
            started=time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        )


class Emulated(InProcessProvider):
    """Engines of one process over emulated NICs.

    Args:
        nics: one a rail; one of the default kind when none is given.
        clocks: addresses of virtual clocks, one a worker, or none.
    """

    name = "emulated"
    post_send = post_send
    poll_cq = poll_cq
    entry = ENTRY

    def __init__(self, *nics: Nic, clocks: Sequence[int] = ()) -> None:
        super().__init__()
        if len(nics) > limits.NICS:
            raise UsageError(f"an engine has at most {limits.NICS} NICs, got {len(nics)}")
        self.nics = nics or (Nic(),)
        self.rails = len(self.nics)
        self.clocks = clocks
        self._rails = [Rail(nic) for nic in self.nics]
        self._mender: Mender | None = None
        self._by_pair: dict[int, Queue] = {}

    def open(
        self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = limits.PEERS
    ) -> list[list[CompletionQueue]]:
        """See `Provider.open`."""
        made = super().open(workers, queue_depth, inbox, peers)
        if any(nic.breaks for nic in self.nics):
            self._mender = Mender(self._fail, self._renew, self.background)
            self.trouble_fd = self._mender.descriptor
        return made

    def prepare(self, queue: Queue, worker: int) -> None:
        """Bind the queue to its NIC, and to its worker's clock when that is virtual."""
        nic = self._rails[queue.rail].row
        queue.moves = aligned((queue.row["mask"] + 1) * (MOVE_BYTES + nic["gathers"] * RANGE_BYTES) // WORD)
        queue.row.set(nic=nic.address, now=self.clocks[worker] if self.clocks else 0, moves=address_of(queue.moves))
        self._by_pair[queue.pair.address] = queue

    def pair_of(self, queue: Queue, peer: InProcess) -> QueuePair:
        """See `InProcessProvider.pair_of`. A queue's weight is its NIC's rate beside the fastest one's."""
        nic = self.nics[queue.rail]
        return queue.pair._replace(
            cq=queue.rail,
            lkeys=queue.rail,
            rkeys=queue.rail % peer.rails,
            signal=nic.signal,
            gathers=nic.gathers,
            weight=max(1, nic.bits_per_s * WEIGHT_ONE // max(other.bits_per_s for other in self.nics)),
            breaks=nic.breaks,
        )

    def start(self, peer: str, queues: Sequence[QueueRow], ctl: int) -> None:
        """See `Provider.start`."""
        if self._mender is not None:
            self._mender.watch([row for row in queues if row.pair.breaks], ctl)

    def stop(self, peer: str, queues: Sequence[QueueRow]) -> None:
        """See `Provider.stop`."""
        if self._mender is not None:
            self._mender.drop(queues)

    def disconnect(self, peer: str) -> None:
        """See `Provider.disconnect`: queue pairs that break are mended no more."""
        if self._mender is not None and peer in self.peers:
            pairs = {queue.pair.address for queue in self._queues_of(peer)}
            self._mender.lose(lambda row: row.pair.address in pairs)

    def close(self) -> None:
        """See `Provider.close`."""
        if self._mender is not None:
            self._mender.close()
            self._mender, self.trouble_fd = None, Provider.trouble_fd
        super().close()
        self._by_pair.clear()

    # ------------------------------------------------------------------------------ rails that break
    def take_down(self, rail: int) -> None:
        """Let a breaking rail reach nobody, as when its cable is pulled: its queue pairs break, probing them fails."""
        with self._breaking(rail).lock:
            self._rails[rail].down = True
            for queue in self._by_pair.values():
                if queue.rail == rail:
                    queue.row.put("broken", WcStatus.RETRY_EXC_ERR)
            self._breaking(rail).break_all(lambda row: row.pair.lkeys == rail)

    def bring_up(self, rail: int) -> None:
        """Let a rail that was taken down reach its peers again: its queue pairs are connected anew and probed."""
        with self._breaking(rail).lock:
            self._rails[rail].down = False
        self._breaking(rail).look_again()

    def _breaking(self, rail: int) -> Mender:
        if self._mender is None or not self.nics[rail].breaks:
            raise UsageError(f"only a rail whose NIC breaks, of an open engine, can be taken down; {rail} is none")
        return self._mender

    def _fail(self, row: QueueRow) -> None:
        own = self._by_pair[row.pair.address].row
        if own["broken"] == 0:
            own.put("broken", WcStatus.WR_FLUSH_ERR)

    def _renew(self, row: QueueRow) -> bool:
        queue = self._by_pair[row.pair.address]
        down = self._rails[queue.rail].down
        queue.row.put("broken", WcStatus.RETRY_EXC_ERR if down else 0)
        return not down
