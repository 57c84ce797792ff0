"""`mooncache bench post` measures what a worker pays for a slice: work requests, chains, posting and completions.

    per round   | post: all chains that the queue has room for | poll: until all of them are answered |
                                                      ^ one reading of the clock each ^

The provider is a stub: its `post_send` walks the chain and remembers the ids that a completion is asked for, its
`poll_cq` reports those. Both are part of the figures, since a NIC's driver walks the chain as well; what it does
besides is not. The worker is turned by hand in the thread that submitted, so it finds the slices in its own cache.

The reference is pyverbs: the objects that it needs for the same slices, in the same run, without a device.

    ratio = pyverbs_ns_per_slice / (ns_per_work_request + ns_per_completion)

Both sides ask for equally many completions. `ns_per_completion` is per work request answered, not per entry polled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

import numpy as np
import typer

from mooncache.bench.harness.measure import Traffic, expect, median, no_collections, scattered, slots_of
from mooncache.bench.harness.options import JSON
from mooncache.bench.harness.report import answer, progress, provenance, show_table
from mooncache.errors import Status, TransportError
from mooncache.kernels import calls
from mooncache.kernels.account import clock
from mooncache.kernels.arrays import WORD, Row, address_of, aligned, power_of_two
from mooncache.kernels.atomics import i64
from mooncache.kernels.complete import poll
from mooncache.kernels.enums import Access, Kind, Opcode, Slice, words_of
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.pump import post, take
from mooncache.kernels.records.base import behind, missing, record_at, row
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.verbs import ibv_cq_at, ibv_qp_at, send_wr_at, wc_at
from mooncache.kernels.settings import Settings
from mooncache.kernels.state import Block, CompletionQueue, QueuePair, State
from mooncache.kernels.submit import submit
from mooncache.kernels.tables import RegionTable
from mooncache.kernels.verbs import SEND_SIGNALED, WcStatus
from mooncache.kernels.worker import worker_row
from mooncache.limits import CHAIN, SLICES_GATHERED
from mooncache.providers.device import Device
from mooncache.providers.rdma.objects import build_and_drop

SLICES = 30_000
SIGNALS = (16, 1)  # work requests a completion; what is on top of the report is the first's
SLICE_BYTES = 512
REPEATS = 100
WARM_UP = 3
OBJECTS = CHAIN  # slices that pyverbs makes objects of in each repeat: as long as the kernels take for their batch,
# so that other processes get into as many of one's samples as of the other's
LKEYS, RKEYS = (11, 12), (21, 22)  # of the lower and the upper half of each buffer
POST, POLL = 0, 1
STUB = row(
    [
        ("head", np.int64),  # ids remembered
        ("tail", np.int64),  # ids reported
        ("mask", np.int64),
        ("requests", np.int64),  # posted
        ("chains", np.int64),  # likewise
    ]
)  # behind it int64[mask + 1], the ids
stub_at = record_at(STUB)


# ------------------------------------------------------------------------------ kernels
@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Remember the ids in this chain that a completion is asked for."""
    stub, wr = stub_at(ibv_qp_at(qp).qp_context), send_wr_at(wr)
    ids, head, mask, requests = i64(behind(stub)), stub.head, stub.mask, np.int64(0)
    while not missing(wr):
        if wr.send_flags & SEND_SIGNALED != 0:
            ids[head & mask] = wr.wr_id
            head += 1
        requests += 1
        wr = send_wr_at(wr.next)
    stub.head = head
    stub.requests += requests
    stub.chains += 1
    return np.int32(0)


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Report the remembered ids, in order."""
    stub = stub_at(ibv_cq_at(cq).cq_context)
    ids, tail, mask = i64(behind(stub)), stub.tail, stub.mask
    n = min(np.int64(entries), stub.head - tail)
    for i in range(n):
        one = wc_at(wc, i)
        one.wr_id = ids[(tail + i) & mask]
        one.status = WcStatus.SUCCESS
    stub.tail = tail + n
    return np.int32(n)


@kernel("int64(int64, int64)", nogil=True)
def work_off(ctl, times):
    """Work until all is answered or nothing moves; add ns of posting and of polling to int64[2] at `times`.

    Returns the rounds it took.
    """
    ctl = control_at(ctl)
    index, spent = ctl.actor, i64(times)
    worker = worker_row(ctl, index)
    take(ctl, worker, index)
    rounds, moved = np.int64(0), np.int64(1)
    since = clock(ctl)
    while moved > 0 and (worker.queued > 0 or worker.outstanding > 0):
        moved = post(ctl, worker, index)
        posted = clock(ctl)
        taken = np.int64(1)
        while taken > 0 and worker.outstanding > 0:
            taken = poll(ctl, worker)
            moved += taken
        polled = clock(ctl)
        spent[POST] += posted - since
        spent[POLL] += polled - posted
        since = polled
        rounds += 1
    return rounds


# ------------------------------------------------------------------------------ the rig
class Stub:
    """A device that does nothing but remember what was posted."""

    def __init__(self, depth: int) -> None:
        entries = power_of_two(depth)
        header = STUB.itemsize // WORD
        self.row = Row(aligned(header + entries)[:header].view(STUB))
        self.row["mask"] = entries - 1
        self.device = Device(post_send, poll_cq)
        self.qp = self.device.queue_pair(self.row.address)
        self.cq = self.device.completion_queue(self.row.address)


@dataclass
class Rig:
    """One engine's memory without threads, over a stub, and the times of its worker's stages, ns."""

    signal: int
    traffic: Traffic
    post: list[float] = field(default_factory=list)
    poll: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = Settings(slices=2 * slots_of(self.slices), batches=4, peers=1, signal=self.signal)
        self.chain = settings.chain_length
        self.state, self.remote = State(settings), RegionTable("the peer")
        self.caller, self.worker = Block(self.state), Block(self.state, 0)
        self.stub = Stub(settings.queue_depth)
        self.state.poll_from(0, [CompletionQueue(address_of(self.stub.cq))])
        pair = QueuePair(address_of(self.stub.qp), settings.queue_depth, gathers=SLICES_GATHERED)
        self.state.connect(0, self.remote, [[pair]])
        for table, buffer, keys in (
            (self.state.regions, self.traffic.source_buffer, LKEYS),
            (self.remote, self.traffic.target_buffer, RKEYS),
        ):
            for half, key in zip(halves(buffer), keys, strict=True):
                table.add(*half, (key,), Access.READ | Access.WRITE)
        self.states = next(
            a for a in self.state.arrays if a.size and address_of(a) == self.state.template["slice_state"]
        )
        self.length = np.full(1, self.traffic.length, np.int64)
        self.lives = 0

    @property
    def slices(self) -> int:
        """The slices of its batch."""
        return int(self.traffic.source.size)

    def live(self, counted: bool) -> None:
        """Submit, post, poll, check and close one batch."""
        times = np.zeros(2, np.int64)
        self.states[:] = Slice.FREE
        handle = submit(self.caller.ctl, 0, Opcode.WRITE, 0, self.traffic.source, self.traffic.target, self.length)
        expect("submit refused with", min(handle, 0), 0)
        work_off(self.worker.ctl, address_of(times))
        self.lives += 1
        self.check(handle)
        expect("status of close", calls.close(self.caller.ctl, handle, True), Status.OK)
        if counted:
            self.post.append(times[POST] / self.slices)
            self.poll.append(times[POLL] / self.slices)

    def check(self, handle: int) -> None:
        """Raise FingerprintError unless all of the batch was posted as it should be, and answered."""
        expect("status of the batch", calls.status(self.caller.ctl, handle), Status.OK)
        expect("slices done", int(np.count_nonzero(self.states == Slice.DONE)), self.slices)
        for what, came in self.fingerprint.items():
            expect(f"{what} with a completion every {self.signal}", came, self.lives * self.expected[what])
        self.check_last_chain()

    @property
    def expected(self) -> dict[str, int]:
        """The fingerprint of one batch."""
        doorbells, completions = counts_of(self.slices, self.chain, self.signal)
        return {
            "work_requests": self.slices,
            "doorbells": doorbells,
            "completions": completions,
            "completed": self.slices,
            "posted_to_the_stub": self.slices,
            "chains_at_the_stub": doorbells,
            "reported_by_the_stub": completions,
        }

    @property
    def fingerprint(self) -> dict[str, int]:
        """The counts of the engine and of the stub, for all batches together."""
        counts = words_of(Kind, self.caller.counters + self.worker.counters)
        stub = {
            "posted_to_the_stub": "requests",
            "chains_at_the_stub": "chains",
            "reported_by_the_stub": "tail",
        }
        return {what: counts[what] for what in ("work_requests", "doorbells", "completions", "completed")} | {
            what: self.stub.row[at] for what, at in stub.items()
        }

    def check_last_chain(self) -> None:
        """Compare the work requests of the last chain, which still lie there, with the requests they are for."""
        n = self.slices % self.chain or self.chain
        wrs, ranges = self.worker.work_requests[:n], self.worker.gathers[:n]
        source, target = self.traffic.source[-n:], self.traffic.target[-n:]
        asked = (np.arange(1, n + 1) % self.signal == 0) | (np.arange(1, n + 1) == n)
        lkeys, rkeys = (
            keys_of(self.traffic.source_buffer, source, LKEYS),
            keys_of(self.traffic.target_buffer, target, RKEYS),
        )
        for what, came, wanted in (
            ("ids", wrs["wr_id"] - wrs["wr_id"][0], np.arange(n)),
            ("gather lists", wrs["sg_list"], address_of(ranges) + 16 * np.arange(n)),
            ("ranges", wrs["num_sge"], np.ones(n)),
            ("opcodes", wrs["opcode"], np.full(n, Opcode.WRITE)),
            ("flags", wrs["send_flags"], SEND_SIGNALED * asked),
            ("remote addresses", wrs["remote_addr"], target),
            ("remote keys", wrs["rkey"], rkeys),
            ("local addresses", ranges["addr"], source),
            ("lengths", ranges["length"], np.full(n, self.traffic.length)),
            ("local keys", ranges["lkey"], lkeys),
        ):
            expect(f"{what} of the last chain that differ", int(np.count_nonzero(came != wanted)), 0)


def counts_of(slices: int, chain: int, signal: int) -> tuple[int, int]:
    """Return (doorbells, completions) of a batch: chains are full but the last, and each ends in a completion."""
    full, rest = divmod(slices, chain)
    return full + (rest > 0), full * -(-chain // signal) + -(-rest // signal)


def halves(buffer: np.ndarray) -> list[tuple[int, int]]:
    """Return (address, length) of the lower and the upper half of one of the buffers; no request lies in both."""
    middle = buffer.size // 2
    return [(address_of(buffer), middle), (address_of(buffer) + middle, buffer.size - middle)]


def keys_of(buffer: np.ndarray, places: np.ndarray, keys: tuple[int, int]) -> np.ndarray:
    """Return the key of the half that each address lies in."""
    return np.where(places < address_of(buffer) + buffer.size // 2, *keys)


# ------------------------------------------------------------------------------ the reference
@dataclass
class Reference:
    """pyverbs' objects for some of the same slices, and the times they took, ns a slice."""

    rig: Rig
    took: list[float] = field(default_factory=list)
    missing: str | None = None  # why there is none, and what to do

    def __post_init__(self) -> None:
        traffic, n = self.rig.traffic, min(OBJECTS, self.rig.slices)
        self.slices = list(zip(traffic.source[:n].tolist(), traffic.target[:n].tolist(), strict=True))

    def live(self, counted: bool) -> None:
        """Build and drop all objects once."""
        if self.missing is not None:
            return
        chain, signal, n = self.rig.chain, self.rig.signal, len(self.slices)
        begin = perf_counter_ns()
        try:
            made = build_and_drop(self.slices, self.rig.traffic.length, chain, signal)
        except TransportError as error:
            self.missing = str(error)
            return
        took = perf_counter_ns() - begin
        expect("chains and completions of pyverbs", made, counts_of(n, chain, signal))
        if counted:
            self.took.append(took / n)


# ------------------------------------------------------------------------------ the report
def run(slices: int, repeats: int) -> dict[str, Any]:
    """Measure, and return the report that `--json` prints.

    Everything takes turns, so that a disturbance hits all alike.
    """
    traffic = scattered(slices, SLICE_BYTES)
    rigs = [Rig(signal, traffic) for signal in SIGNALS]
    references = [Reference(rig) for rig in rigs]
    with no_collections(), progress(f"{slices:,} slices", repeats) as bar:
        for number in range(-WARM_UP, repeats):
            for rig, reference in zip(rigs, references, strict=True):
                rig.live(number >= 0)
                reference.live(number >= 0)
            bar()
    results = [result(rig, reference) for rig, reference in zip(rigs, references, strict=True)]
    return {
        "bench": "post",
        "slices": slices,
        "slice_bytes": SLICE_BYTES,
        "chain": rigs[0].chain,
        "queue_depth": rigs[0].state.settings.queue_depth,
        **{key: value for key, value in results[0].items() if key != "fingerprint"},
        "repetitions": repeats,
        "pyverbs_missing": references[0].missing,
        "results": results,
        "provenance": provenance(),
    }


def result(rig: Rig, reference: Reference) -> dict[str, Any]:
    """Return one row of the report."""
    request, completion = median(rig.post), median(rig.poll)
    objects = median(reference.took) if reference.took else None
    return {
        "signal": rig.signal,
        "ns_per_work_request": round(request, 2),
        "ns_per_completion": round(completion, 2),
        "pyverbs_ns_per_slice": objects and round(objects, 1),
        "ratio": objects and round(objects / (request + completion), 1),
        "fingerprint": rig.expected,  # of each batch; `Rig.check` found it in every one
    }


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    columns = ("completion\nevery", "work request\nns", "completion\nns", "pyverbs\nns per slice", "ratio")
    keys = ("signal", "ns_per_work_request", "ns_per_completion", "pyverbs_ns_per_slice", "ratio")
    rows = [["-" if row[key] is None else row[key] for key in keys] for row in report["results"]]
    if report["pyverbs_missing"] is None:
        says = (
            f"pyverbs takes {report['ratio']:,.0f} times as long to make its objects for a slice as the worker "
            "takes to build, chain and post its work request and to apply its completion."
        )
    else:
        says = f"No figures of pyverbs: {report['pyverbs_missing']}"
    show_table(f"{report['slices']:,} slices in chains of {report['chain']}: medians", columns, rows, says)


def command(
    slices: int = typer.Option(30_000, min=1, max=1_000_000, help="Slices of a batch."),
    repeat: int = typer.Option(100, min=1, help="Batches of each kind."),
    json: bool = JSON,
) -> None:
    """Build, chain and post work requests and take their completions, over a stub, against objects of pyverbs.

    A completion is asked for every 16 work requests, and for each of them.
    """
    answer(run(slices, repeat), json, show)
