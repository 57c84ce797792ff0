"""`mooncache bench transfer`: how fast blocks get from one process into another, against the plainest way to do it.

    rank 0   [ initiator ] ----- wire -----> [ target ]      two processes a rank, all ranks started together
    rank 1   [ initiator ] ----- wire -----> [ target ]

Each sample is sent over the wire and by the reference in turn: plain Python sockets for what goes through the network
stack; for what stays in memory the fastest plain copy, by as many threads as the engine has workers. Both move the same
blocks in the same random order, differing ones in each sample, and after each sample the receiving process checks every
byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from enum import Enum
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

import typer

from mooncache.bench.harness import against as packages
from mooncache.bench.harness.blocks import span
from mooncache.bench.harness.measure import GROWTH_MIB, SEED, FingerprintError, median
from mooncache.bench.harness.options import JSON, Op, Provider, names
from mooncache.bench.harness.process import ProcessError
from mooncache.bench.harness.report import answer, between, named, progress, provenance, show_table
from mooncache.bench.harness.trial import Crew, Trial, paused
from mooncache.bench.harness.wires import Case
from mooncache.errors import UsageError
from mooncache.sizes import size_of, spell

DEFAULT_PROVIDERS = (Provider.TCP, Provider.SHM)
SLICES, BLOCKS, RANKS, DEFAULT_OPS, WORKERS = (30_000,), ("512B", "4KiB", "16KiB"), (1,), ("write",), (1,)
MOST_SLICES, MOST_RANKS, MOST_WORKERS, MOST_LAYERS = 1_000_000, 16, 16, 100_000
REPEATS, MOST_REPEATS = 5, 1000
FEWEST_LAYERS = 8  # below that there is no first quarter worth the name


class Shape(NamedTuple):
    """One shape of a transfer, whoever sends it."""

    op: str
    ranks: int
    workers: int
    slices: int
    block: str


STANDARD = (
    Shape("write", 1, 1, 30_000, "512B"),  # a layer at tensor parallelism 4, token by token: the incident's
    Shape("write", 1, 1, 30_000, "4KiB"),
    Shape("write", 1, 1, 30_000, "16KiB"),
    Shape("read", 1, 1, 30_000, "4KiB"),
    Shape("write", 1, 2, 30_000, "4KiB"),
    Shape("write", 1, 2, 30_000, "16KiB"),
    Shape("write", 1, 1, 270_000, "512B"),  # the largest production batch reported (Mooncake#826)
    Shape("write", 1, 1, 270_000, "4KiB"),
    Shape("write", 4, 1, 30_000, "4KiB"),  # TP4
    Shape("write", 1, 1, 1, "1GiB"),  # one long stream
)
"""The shapes that are measured when nothing else is asked for."""


# ------------------------------------------------------------------------------ one case
def measure(case: Case, crew: Crew, repeats: int, seeds: Iterator[int]) -> dict[str, Any]:
    """Run one case; return its row of the report.

    Another package's threads may poll all the time: its reference runs in processes of its own, the package's are
    stopped meanwhile.
    """
    other = case.provider in packages.PACKAGES
    wire = Trial(case, crew)
    plain = Trial(replace(case, provider=""), crew) if other else wire

    def referred() -> float:
        with paused(wire) if other else nullcontext():
            return plain.sample("reference", next(seeds))

    first = wire.sample("wire", next(seeds))  # apart: pages are touched, buffers and clocks warm up
    referred()
    for looks in wire.looks:
        looks.clear()
    pairs = [(wire.sample("wire", next(seeds)), referred()) for _ in range(repeats)]
    for trial in {wire, plain}:
        trial.close()
    seconds, references = zip(*pairs, strict=True)
    row = figures(wire.case, seconds) | {
        "reference": plain.reference,
        "reference_seconds_p50": round(median(references), 6),
        "ratio": round(median(seconds) / median(references), 3),
        "first_seconds": round(first, 6),
        "first_ratio": round(first / median(seconds), 3),
        "repeats": repeats,
        "verified_bytes": (repeats + 1) * case.sample_bytes // case.layers,  # each layer sends the same ones again
    }
    return row | ({"growth": wire.growth()} if case.layers >= FEWEST_LAYERS else {})


def figures(case: Case, seconds: Sequence[float]) -> dict[str, Any]:
    """Return the case, its times and its rates."""
    middle = median(seconds)
    return {
        "provider": case.provider,
        "transport": case.transport,
        "op": case.op,
        "ranks": case.ranks,
        "workers": case.workers,
        "slices": case.slices,
        "block_bytes": case.block,
        "layers": case.layers,
        "seconds_p50": round(middle, 6),
        "seconds_min": round(min(seconds), 6),
        "seconds_max": round(max(seconds), 6),
        "slices_per_s": round(case.ranks * case.layers * case.slices / middle),
        "gigabytes_per_s": round(case.sample_bytes / middle / 1e9, 3),
    }


def violations(row: dict[str, Any]) -> list[str]:
    """Return what grew in this row that should have stayed as it was."""
    bounds = {"rss_mib": (GROWTH_MIB, "MiB of resident memory"), "fds": (0, "descriptors")}
    return [
        f"{row['provider']} {row['op']}, {row['slices']} x {spell(row['block_bytes'])}: the {side} grew by "
        f"{row['growth'][f'{side}_{key}']} {what} after the first quarter of its layers, at most {most}"
        for side, (key, (most, what)) in product(("initiator", "target"), bounds.items())
        if row.get("growth", {}).get(f"{side}_{key}", 0) > most
    ]


# ------------------------------------------------------------------------------ what to run
def shapes(
    ops: Sequence[str], ranks: Sequence[int], workers: Sequence[int], slices: Sequence[int], blocks: Sequence[str]
) -> list[Shape]:
    """Return the standard shapes if nothing was asked for, else every combination."""
    if not (ops or ranks or workers or slices or blocks):
        return list(STANDARD)
    combinations = product(ops or DEFAULT_OPS, ranks or RANKS, workers or WORKERS, slices or SLICES, blocks or BLOCKS)
    return list(dict.fromkeys(Shape(*one) for one in combinations))


def cases(providers: Sequence[str], against: Sequence[str], wanted: Sequence[Shape], layers: int) -> list[Case]:
    """Return every provider and package with every shape."""
    wires = [(name, "" if name == "auto" else name) for name in providers]
    wires += [(name, transport) for name in against for transport in packages.PACKAGES[name].transports]
    found = [
        Case(*wire, shape.op, shape.ranks, shape.workers, shape.slices, size_of(shape.block), layers)
        for wire, shape in product(wires, wanted)
    ]
    for case in found:
        check_memory(case)
    return found


def check_memory(case: Case) -> None:
    """Raise UsageError for a case that this machine's memory cannot hold: both sides' buffers, gaps included.

    NumPy asks for huge pages, and gaps within one take memory as well.
    """
    needed = 2 * case.ranks * span(case.slices, case.block)
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) << 10
    if needed > available:
        raise UsageError(
            f"{case.ranks} x {case.slices} x {spell(case.block)} needs {needed / 2**30:.1f} GiB of memory, of which "
            f"{available / 2**30:.1f} are free; ask for fewer or smaller slices"
        )


def run(
    providers: Sequence[str], wanted: Sequence[Shape], layers: int, repeats: int, against: Sequence[str]
) -> dict[str, Any]:
    """Measure every combination; return the report that `--json` prints. `violations` is empty when nothing grew."""
    chosen = cases(providers, against, wanted, layers)
    results: list[dict[str, Any]] = []
    with ExitStack() as stack, progress("transfer", len(chosen)) as bar:
        crew, seeds, missing = Crew(stack), count(SEED), set()
        for case in chosen:
            if case.provider in packages.PACKAGES:
                if case.provider not in missing:
                    row = compete(case, crew, repeats, seeds)
                    results.append(row)
                    if "error" in row and "slices" not in row:
                        missing.add(case.provider)
            else:
                results.append(measure(case, crew, repeats, seeds))
            bar()
    return {
        "bench": "transfer",
        "results": results,
        "violations": [line for row in results for line in violations(row)],
        "seed": SEED,
        "provenance": provenance(),
    }


def compete(case: Case, crew: Crew, repeats: int, seeds: Iterator[int]) -> dict[str, Any]:
    """Return a row of another package, or an entry that says why there is none: not for this case, or not at all."""
    try:
        packages.prepare(case.provider)
    except ProcessError as error:
        return {"against": case.provider, "error": str(error)}
    try:
        return measure(case, crew, repeats, seeds)
    except (ProcessError, FingerprintError) as error:
        crew.dismiss(case.provider)
        shape = {"op": case.op, "ranks": case.ranks, "slices": case.slices, "block_bytes": case.block}
        return {"against": case.provider, "transport": case.transport, **shape, "error": str(error)}


# ------------------------------------------------------------------------------ for people
def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    columns = (
        "provider", "op", "ranks", "work-\ners", "slices", "block", "p50\nms", "M/s", "GB/s", "reference",
        "p50\nms", "ratio",
    )  # fmt: skip
    measured = [row for row in report["results"] if "error" not in row]
    rows = [
        [
            named(row), row["op"], row["ranks"], row["workers"], row["slices"], spell(row["block_bytes"]),
            row["seconds_p50"] * 1e3, row["slices_per_s"] / 1e6 if row["slices"] > 1 else "", row["gigabytes_per_s"],
            row["reference"].removeprefix("plain "), row["reference_seconds_p50"] * 1e3, row["ratio"],
        ]
        for row in measured
    ]  # fmt: skip
    says = [f"{row['against']} was not measured: {row['error']}." for row in report["results"] if "error" in row]
    show_table("Transfers: medians", columns, rows or [[""] * len(columns)], " ".join([sentence(measured), *says]))
    for line in report["violations"]:
        print("violated:", line)


def sentence(rows: Sequence[dict[str, Any]]) -> str:
    """Say what the ratios mean."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        ratios.setdefault((named(row), row["reference"]), []).append(row["ratio"])
    takes = [f"{name} took {between(r)} times as long as a {of}" for (name, of), r in ratios.items()]
    return f"{'; '.join(takes)}. Every byte of every sample was checked where it arrived." if takes else ""


Package = Enum("Package", {name.upper(): name for name in packages.PACKAGES}, type=str)  # type: ignore[misc]


def command(
    provider: list[Provider] = typer.Option(list(DEFAULT_PROVIDERS), help="Repeatable."),
    op: list[Op] = typer.Option([], help="Repeatable."),
    ranks: list[int] = typer.Option(
        [], min=1, max=MOST_RANKS, help="Pairs of processes that send at once. Repeatable."
    ),
    workers: list[int] = typer.Option([], min=1, max=MOST_WORKERS, help="Worker threads of each engine. Repeatable."),
    slices: list[int] = typer.Option(
        [], min=1, max=MOST_SLICES, help="Blocks of a batch, in random order. Repeatable."
    ),
    block: list[str] = typer.Option([], help="Bytes of a block, such as 512 or 16KiB. Repeatable."),
    layers: int = typer.Option(
        1,
        min=1,
        max=MOST_LAYERS,
        help="Batches of a sample, one after another. From 8 on: do memory and descriptors stay flat?",
    ),
    repeat: int = typer.Option(
        REPEATS, min=1, max=MOST_REPEATS, help="Samples of each combination, of its reference as well."
    ),
    against: list[Package] = typer.Option([], help="Also measure this package. Repeatable."),
    json: bool = JSON,
) -> None:
    """Move blocks from process to process, against plain Python sockets and plain copies in the same run.

    Without --op, --ranks, --workers, --slices and --block: a standard set, in about three minutes; with any of them:
    every combination. Every byte is checked where it arrives. Exit status 1 if memory or descriptors grew.
    """
    wanted = shapes(names(op), ranks, workers, slices, block)
    report = run(names(provider), wanted, layers, repeat, names(against))
    answer(report, json, show)
    if report["violations"]:
        raise typer.Exit(1)
