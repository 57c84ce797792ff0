"""`mooncache bench rdma` measures the engine over an RDMA device, against perftest on the same device in the same run.

    ours     [ initiator ] --- port, one queue pair ---> [ target ]      Mooncache: two processes
    theirs   [ client    ] --- port, one queue pair ---> [ server ]      ib_write_bw, ib_read_bw, ib_write_lat

Both take turns, with the same sizes, queue depth, completions (one for so many work requests), MTU, reads under way at
once, and patience of the NIC. Both ends are on this host: the NIC turns the packets round, so it reads and writes this
host's memory at the same time.

A write that is waited for goes there and back. So its reference is twice the typical time of `ib_write_lat`, which
states half of a ping-pong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from itertools import count
from typing import Any, TypeVar

import typer

from mooncache.bench.ends.rdma import BATCH_CHAINS, PLACES, TIMEOUT, slices_of
from mooncache.bench.harness import perftest
from mooncache.bench.harness.measure import SEED, FingerprintError, expect, median, quantile
from mooncache.bench.harness.options import JSON, names
from mooncache.bench.harness.process import PATIENCE_S, Process, ProcessError
from mooncache.bench.harness.report import answer, progress, provenance, show_table
from mooncache.errors import UsageError
from mooncache.kernels import jit
from mooncache.limits import CHAIN, SLICE_BYTES
from mooncache.providers.rdma.ports import Choice, choose
from mooncache.sizes import size_of, spell

TESTS = {"write": "ib_write_bw", "read": "ib_read_bw", "latency": "ib_write_lat"}
SIZES = ("64KiB", "4KiB")  # a slice at its longest, and a page of few tokens
ITERATIONS, MOST_ITERATIONS = 20_000, 1_000_000  # 64 KiB at 400 Gbit/s: 26 ms
ONE_IN = 10  # of so many iterations one is made for the latency: they cost a round trip each
REPEATS = 5
DEPTH, MOST_DEPTH = 128, 8192  # perftest's default
SIGNAL = 16  # the provider's; perftest's 100 does not divide a chain
LATENCY = (64,)  # bytes: one cache line, which both sides copy into the work request where the NIC allows it
ATTEMPTS = 8  # perftest times the processor's clock at its start; on a busy virtual machine it may get 0 for that
START_S = 600.0  # for a process to load and open: a second, but minutes in an emulated guest on a busy machine
ETHERNET = "Ethernet"

Found = TypeVar("Found")


class Measured(str, Enum):
    """The tests of this bench."""

    WRITE = "write"
    READ = "read"
    LATENCY = "latency"


@dataclass(frozen=True)
class Plan:
    """The settings that are the same for all that is measured in a run."""

    iterations: int
    repeats: int
    depth: int
    signal: int

    @property
    def chain(self) -> int:
        """The work requests behind one doorbell of ours; see `Settings.chain_length`."""
        return min(CHAIN, self.depth // 2)

    @property
    def batch(self) -> int:
        """The slices of one batch."""
        return BATCH_CHAINS * self.chain

    @property
    def operations(self) -> int:
        """The number of writes that are waited for one by one."""
        return max(perftest.FEWEST, self.iterations // ONE_IN)

    @property
    def places(self) -> int:
        """The number of blocks that a stream moves over and over."""
        return min(PLACES, self.iterations)

    @property
    def counts(self) -> dict[str, int]:
        """The counts that a stream must have: doorbells and completions, each chain ending in one."""
        chains, rest = divmod(self.iterations, self.chain)
        completions = chains * -(-self.chain // self.signal) + -(-rest // self.signal)
        whole = {"work_requests": self.iterations, "completed": self.iterations, "completions": completions}
        return whole | {"doorbells": chains + (rest > 0), "failed": 0, "retried": 0, "stale": 0}


# ------------------------------------------------------------------------------ one port
class Ours:
    """Two processes with an engine each, on one port."""

    def __init__(self, choice: Choice, plan: Plan, largest: int, stack: ExitStack) -> None:
        self.plan = plan
        self._processes = {
            role: stack.enter_context(Process("mooncache.bench.ends.rdma")) for role in ("target", "initiator")
        }
        how = {
            "port": choice.port.name, "gid_index": choice.gid.index, "depth": plan.depth, "signal": plan.signal,
            "block": largest, "slices": slices_of(plan.iterations, plan.batch),
        }  # fmt: skip
        target = self._ask("target", START_S, do="open", **how)
        self.found: dict[str, Any] = self._ask("initiator", START_S, do="open", target=target, **how)

    def _ask(self, role: str, patience: float = PATIENCE_S, **command: Any) -> Any:
        self._processes[role].tell(role=role, **command)
        return self._processes[role].answer(patience)

    def stream(self, op: str, block: int, seed: int) -> tuple[float, dict[str, int]]:
        """Move one sample, checked where it arrived and by its counts; return seconds, and the counts."""
        sender, receiver = ("initiator", "target") if op == "write" else ("target", "initiator")
        which = {"seed": seed, "block": block, "places": self.plan.places}
        self._ask(sender, do="fill", **which)
        sizes = {"iterations": self.plan.iterations, "batch": self.plan.batch}
        sample = self._ask("initiator", do="stream", op=op, block=block, **sizes)
        self._verify(receiver, which)
        counts: dict[str, int] = sample["counts"]
        for kind, expected in self.plan.counts.items():
            expect(f"{op}s of {spell(block)}: {kind}", counts[kind], expected)
        return sample["ns"] / 1e9, counts

    def each(self, block: int, seed: int) -> list[float]:
        """Write one by one, each waited for and checked where it arrived; return the seconds of each."""
        which = {"seed": seed, "block": block, "places": min(PLACES, self.plan.operations)}
        self._ask("initiator", do="fill", **which)
        took = self._ask("initiator", do="each", block=block, operations=self.plan.operations)
        self._verify("target", which)
        return [ns / 1e9 for ns in took]

    def _verify(self, receiver: str, which: dict[str, int]) -> None:
        if wrong := self._ask(receiver, do="count_wrong", **which):
            raise FingerprintError(f"expected {which['places']} blocks to arrive unchanged, {wrong} did not")

    def close(self) -> None:
        """Close both engines, the one that posts first."""
        for role in ("initiator", "target"):
            self._ask(role, do="close")


class Theirs:
    """perftest on one port. `why` holds, by test, the reason for which it gives no figures."""

    def __init__(self, choice: Choice, plan: Plan, found: dict[str, Any]) -> None:
        self._choice, self._plan, self._found = choice, plan, found
        self.why: dict[str, str] = {}

    def command(self, test: str, block: int) -> list[str]:
        """Return a test's command line, at either end."""
        (port, gid), plan = self._choice, self._plan
        words = [
            TESTS[test], "-F", "-d", port.device, "-i", port.number, "-s", block, "-m", self._found["mtu"],
            "-u", TIMEOUT, "-n", plan.operations if test == "latency" else plan.iterations,
        ]  # fmt: skip
        if port.link_layer == ETHERNET:
            words += ["-x", gid.index]
        if test != "latency":
            words += ["-t", plan.depth, "-Q", plan.signal, "-N"]  # -N: no clock at each of them, only for the average
        if test == "read":
            words += ["-o", self._found["rd_atomic"]]
        return [str(word) for word in words]

    def _figures(self, test: str, block: int, read: Callable[[str], Found]) -> Found | None:
        """Run a test once; return None, and note `why`, if it has no figures: then it is not tried again."""
        if test not in self.why and not perftest.installed(TESTS[test]):
            self.why[test] = perftest.CURE
        for left in reversed(range(ATTEMPTS)):
            if test in self.why:
                break
            try:
                return read(perftest.run(self.command(test, block)))
            except ProcessError as error:
                if not left or not isinstance(error, perftest.NoFigures):
                    self.why[test] = str(error)
        return None

    def stream(self, test: str, block: int) -> perftest.Bandwidth | None:
        """Run the bandwidth test once."""
        return self._figures(test, block, perftest.read_bandwidth)

    def each(self, block: int) -> perftest.Latency | None:
        """Run the latency test once."""
        return self._figures("latency", block, perftest.read_latency)


# ------------------------------------------------------------------------------ rows
def stream(ours: Ours, theirs: Theirs, test: str, block: int, seeds: Iterator[int]) -> dict[str, Any]:
    """Measure bandwidth and message rate of one size; return its row of the report."""
    plan = ours.plan
    ours.stream(test, block, next(seeds))  # uncounted: pages are touched, clocks and caches warm up
    seconds, references = [], []
    counts: dict[str, int] = {}
    for _ in range(plan.repeats):
        took, counts = ours.stream(test, block, next(seeds))
        seconds.append(took)
        references.append(theirs.stream(test, block))
    rate = plan.iterations / median(seconds)
    found = [one.messages_per_s for one in references if one is not None]
    reference = median(found) if found else None
    return {
        "block_bytes": block,
        "iterations": plan.iterations,
        "seconds_p50": round(median(seconds), 9),
        "seconds_min": round(min(seconds), 9),
        "seconds_max": round(max(seconds), 9),
        "messages_per_s": round(rate, 1),
        "gigabytes_per_s": round(rate * block / 1e9, 6),
        "reference_messages_per_s": None if reference is None else round(reference, 1),
        "reference_gigabytes_per_s": None if reference is None else round(reference * block / 1e9, 6),
        "reference_repeats": len(found),
        "ratio": None if reference is None else round(rate / reference, 3),
        "verified_bytes": (plan.repeats + 1) * plan.places * block,
        **{kind: counts[kind] for kind in ("work_requests", "doorbells", "completions", "polls")},
    }


def each(ours: Ours, theirs: Theirs, block: int, seeds: Iterator[int]) -> dict[str, Any]:
    """Measure the time of a write that is waited for; return its row of the report."""
    plan = ours.plan
    ours.each(block, next(seeds))  # uncounted, as above
    took: list[float] = []
    references = []
    for _ in range(plan.repeats):
        took += ours.each(block, next(seeds))
        references.append(theirs.each(block))
    found = [one for one in references if one is not None]
    typical = 2 * median([one.typical for one in found]) if found else None
    return {
        "block_bytes": block,
        "iterations": plan.operations,
        "seconds_p50": round(median(took), 9),
        "seconds_p99": round(quantile(took, 0.99), 9),
        "reference_seconds_p50": None if typical is None else round(typical, 9),
        "reference_seconds_p99": round(2 * median([one.p99 for one in found]), 9) if found else None,
        "reference_repeats": len(found),
        "ratio": round(median(took) / typical, 3) if typical else None,
        "verified_bytes": (plan.repeats + 1) * min(PLACES, plan.operations) * block,
    }


def measure(ours: Ours, theirs: Theirs, test: str, size: int, seeds: Iterator[int]) -> dict[str, Any]:
    """Measure one test and size; return a row of the report, with the reason if there is nothing to compare it with."""
    row = each(ours, theirs, size, seeds) if test == "latency" else stream(ours, theirs, test, size, seeds)
    why = {"reference_error": theirs.why[test]} if test in theirs.why else {}
    return {"test": test, "reference": TESTS[test]} | row | {"repeats": ours.plan.repeats} | why


# ------------------------------------------------------------------------------ the bench
def run(
    devices: Sequence[str], tests: Sequence[str], sizes: Sequence[str], gid_index: int | None, plan: Plan
) -> dict[str, Any]:
    """Measure every combination on each port; return the report that `--json` prints."""
    if not 1 <= plan.signal <= max(1, plan.depth // 2):
        raise UsageError(
            f"expected --signal in 1 .. {max(1, plan.depth // 2)}, got {plan.signal}: a chain, at most half the depth, "
            "ends in a completion, so that longer gaps cannot be compared"
        )
    lengths = [size_of(size) for size in dict.fromkeys(sizes)]
    for length in lengths:
        if length > SLICE_BYTES:
            raise UsageError(f"expected --bytes of at most {spell(SLICE_BYTES)}, a slice, got {spell(length)}")
    choices = choose(list(dict.fromkeys(devices)) or None, gid_index=gid_index)
    choices = choices if devices else choices[:1]
    pairs = [(test, size) for test in tests for size in (LATENCY if test == "latency" else lengths)]
    prewarm()
    results: list[dict[str, Any]] = []
    ports: list[dict[str, Any]] = []
    with progress("rdma", len(choices) * len(pairs)) as bar:
        for choice in choices:
            with ExitStack() as stack:
                ours = Ours(choice, plan, max(*lengths, *LATENCY), stack)
                ports.append(described(choice, ours.found))
                theirs, seeds = Theirs(choice, plan, ours.found), count(SEED)
                for test, size in pairs:
                    results.append(measure(ours, theirs, test, size, seeds) | {"device": choice.port.name})
                    bar()
                ours.close()
    return {
        "bench": "rdma",
        "results": results,
        "ports": ports,
        "queue_pairs": 1,
        "depth": plan.depth,
        "signal": plan.signal,
        "chain": plan.chain,
        "perftest": perftest.version(),
        "seed": SEED,
        "provenance": provenance(),
    }


def prewarm() -> None:
    """Compile the kernels that the processes will need, here and once, unless they are compiled."""
    if jit.cold():
        import_module("mooncache.providers.rdma.provider")  # its kernels
        jit.prewarm()


def described(choice: Choice, found: dict[str, Any]) -> dict[str, Any]:
    """Return a port's settings, which both sides keep to."""
    port, gid = choice
    return {
        "device": port.name,
        "link_layer": port.link_layer,
        "gigabits_per_s": port.rate_gbps,
        "gid_index": gid.index,
        "gid": gid.address,
        "mtu": found["mtu"],
        "reads_at_once": found["rd_atomic"],
    }


# ------------------------------------------------------------------------------ for people
def show(report: dict[str, Any]) -> None:
    """Print the report for people: streams, then the latency."""
    from rich.markup import escape

    streams = [row for row in report["results"] if row["test"] != "latency"]
    singles = [row for row in report["results"] if row["test"] == "latency"]
    same = f"One queue pair, depth {report['depth']}, a completion for {report['signal']} work requests"
    for port in report["ports"]:
        same += f"; {port['device']}: MTU {port['mtu']}, {port['reads_at_once']} reads at once"
    reasons = [row["reference_error"] for row in report["results"] if "reference_error" in row]
    missing = "".join(f" {escape(why)}." for why in dict.fromkeys(reasons))
    if streams:
        says = f"{same}. Ratio: ours to perftest's, more is better. Every block was checked where it arrived.{missing}"
        show_table("Streams over RDMA: medians", *stream_table(streams), says)
    if singles:
        says = f"One write, waited for: there and back, against twice ib_write_lat's one way. Less is better.{missing}"
        show_table("One write at a time", *single_table(singles), says)


def stream_table(found: Sequence[dict[str, Any]]) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
    """Return columns and rows of the streams."""
    columns = (
        "device", "test", "block", "GB/s", "M/s", "perftest\nGB/s", "perftest\nM/s", "ratio", "work\nrequests",
        "door-\nbells", "comple-\ntions",
    )  # fmt: skip
    return columns, [
        [
            row["device"], row["test"], spell(row["block_bytes"]), row["gigabytes_per_s"], row["messages_per_s"] / 1e6,
            cell(row["reference_gigabytes_per_s"]), cell(row["reference_messages_per_s"], 1e-6), cell(row["ratio"]),
            row["work_requests"], row["doorbells"], row["completions"],
        ]
        for row in found
    ]  # fmt: skip


def single_table(found: Sequence[dict[str, Any]]) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
    """Return columns and rows of the single writes."""
    columns = ("device", "block", "p50\nµs", "p99\nµs", "perftest\np50 µs", "perftest\np99 µs", "ratio\nof p50")
    return columns, [
        [
            row["device"], spell(row["block_bytes"]), row["seconds_p50"] * 1e6, row["seconds_p99"] * 1e6,
            cell(row["reference_seconds_p50"], 1e6), cell(row["reference_seconds_p99"], 1e6), cell(row["ratio"]),
        ]
        for row in found
    ]  # fmt: skip


def cell(value: float | None, factor: float = 1.0) -> float | str:
    """Format a figure of the table, "-" where there is none."""
    return "-" if value is None else value * factor


def command(
    device: list[str] = typer.Option(
        [], help='"device" or "device:port". Repeatable: one after another. [default: the first active port]'
    ),
    test: list[Measured] = typer.Option(list(Measured), help="Repeatable."),
    size: list[str] = typer.Option(list(SIZES), "--bytes", help="Bytes of a write or read, up to 64KiB. Repeatable."),
    iterations: int = typer.Option(
        ITERATIONS,
        min=perftest.FEWEST,
        max=MOST_ITERATIONS,
        help="Work requests of a sample; a tenth of them, one by one, for the latency.",
    ),
    repeat: int = typer.Option(REPEATS, min=1, max=1000, help="Samples of each, of perftest's as well."),
    depth: int = typer.Option(
        DEPTH, min=1, max=MOST_DEPTH, help="Work requests under way at once (perftest: --tx-depth)."
    ),
    signal: int = typer.Option(SIGNAL, help="Work requests behind one completion (perftest: --cq-mod)."),
    gid_index: int | None = typer.Option(None, min=0, help="Entry of the port's GID table [default: the best]."),
    json: bool = JSON,
) -> None:
    """Measure over an RDMA device, against perftest (ib_write_bw, ib_read_bw, ib_write_lat) on it in the same run.

    Without perftest its figures are null. In a guest under emulation: --iterations 500 --repeat 3.
    """
    plan = Plan(iterations, repeat, depth, signal)
    answer(run(device, names(test), size, gid_index, plan), json, show)
