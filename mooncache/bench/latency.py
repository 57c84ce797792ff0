"""`mooncache bench latency` times one small operation at a time, waited for, against a ping-pong over plain sockets.

    wire       [ write 8 bytes, wait ][ write 8 bytes, wait ] ...       each op takes the next of 64 blocks in turn
    reference  [ sendall, recv(1)    ][ sendall, recv(1)    ] ...       the same blocks, between two plain programs

Both take turns, round by round, and after each round all blocks are checked where they arrived.

The two programs are kept on two cores, as they would be on two machines. Otherwise Linux runs the ping-pong on a single
one, or not, as it happens, and there it takes a third of the time, since nobody has to be woken on another core. The
engines' own threads are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count, product
from typing import Any

import typer

from mooncache.bench.harness.measure import SEED, median, quantile
from mooncache.bench.harness.options import JSON, Op, Provider, names
from mooncache.bench.harness.report import answer, between, named, progress, provenance, show_table
from mooncache.bench.harness.trial import Crew, Trial
from mooncache.bench.harness.wires import Case
from mooncache.cores import siblings_of
from mooncache.sizes import size_of, spell

DEFAULT_PROVIDERS = (Provider.SHM, Provider.TCP, Provider.LOOPBACK)
BLOCKS = ("8", "64", "512", "4KiB", "64KiB")
PLACES = 64
OPERATIONS, MOST_OPERATIONS = 3000, 1_000_000
ROUNDS = 10
REFERENCE = "plain socket"


def two_cores() -> tuple[int, int]:
    """Return two cores of this process, not hardware threads of one if there is a choice; a single one twice."""
    first, *others = sorted(os.sched_getaffinity(0))
    siblings = siblings_of(first)
    return first, ([core for core in others if core not in siblings] or others or [first])[0]


def measure(case: Case, crew: Crew, operations: int, seeds: Iterator[int]) -> dict[str, Any]:
    """Measure one case; return its row of the report. A wire within one process has its reference in two others."""
    wire = Trial(case, crew, REFERENCE)
    plain = Trial(replace(case, provider="", transport="tcp"), crew, REFERENCE) if case.provider == "loopback" else wire
    each, cores = -(-operations // ROUNDS), two_cores()
    took: dict[str, list[float]] = {"wire": [], "reference": []}
    for number in range(-1, ROUNDS):
        for what, trial in (("wire", wire), ("reference", plain)):
            ns = trial.each(what, max(each, PLACES), next(seeds), cores)
            if number >= 0:  # the first round warms up
                took[what] += (one / 1e9 for one in ns)
    for trial in {wire, plain}:
        trial.close()
    figures = {"wire": median(took["wire"]), "reference": median(took["reference"])}
    return {
        "provider": case.provider,
        "transport": wire.case.transport,
        "op": case.op,
        "slices": 1,
        "block_bytes": case.block,
        "seconds_p50": round(figures["wire"], 9),
        "seconds_p99": round(quantile(took["wire"], 0.99), 9),
        "reference": REFERENCE,
        "reference_seconds_p50": round(figures["reference"], 9),
        "reference_seconds_p99": round(quantile(took["reference"], 0.99), 9),
        "ratio": round(figures["wire"] / figures["reference"], 3),
        "repeats": len(took["wire"]),
        "verified_bytes": (ROUNDS + 1) * PLACES * case.block,
    }


def run(providers: Sequence[str], ops: Sequence[str], blocks: Sequence[str], operations: int) -> dict[str, Any]:
    """Measure every combination; return the report that `--json` prints."""
    chosen = [
        Case(provider, "" if provider == "auto" else provider, op, 1, 1, PLACES, size, 1)
        for provider, op, size in product(providers, ops, dict.fromkeys(map(size_of, blocks)))
    ]
    with ExitStack() as stack, progress("latency", len(chosen)) as bar:
        crew, seeds = Crew(stack), count(SEED)
        results = []
        for case in chosen:
            results.append(measure(case, crew, operations, seeds))
            bar()
    return {"bench": "latency", "results": results, "seed": SEED, "provenance": provenance()}


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    columns = ("provider", "op", "block", "p50\nµs", "p99\nµs", "socket\np50 µs", "socket\np99 µs", "ratio\nof p50")
    rows = [
        [
            named(row), row["op"], spell(row["block_bytes"]), row["seconds_p50"] * 1e6, row["seconds_p99"] * 1e6,
            row["reference_seconds_p50"] * 1e6, row["reference_seconds_p99"] * 1e6, row["ratio"],
        ]
        for row in report["results"]
    ]  # fmt: skip
    ratios: dict[str, list[float]] = {}
    for row in report["results"]:
        ratios.setdefault(named(row), []).append(row["ratio"])
    takes = ", ".join(f"{between(r)} times by {name}" for name, r in ratios.items())
    says = (
        f"One operation, waited for, takes as long as a ping-pong of the same bytes over plain Python sockets {takes}. "
        "Every block was checked where it arrived."
    )
    show_table("One at a time", columns, rows, says)


def command(
    provider: list[Provider] = typer.Option(list(DEFAULT_PROVIDERS), help="Repeatable."),
    op: list[Op] = typer.Option([Op.WRITE], help="Repeatable."),
    block: list[str] = typer.Option(list(BLOCKS), help="Bytes of an operation. Repeatable."),
    operations: int = typer.Option(
        OPERATIONS, min=1, max=MOST_OPERATIONS, help="Of each combination, of its reference as well."
    ),
    json: bool = JSON,
) -> None:
    """Time one small operation at a time, waited for, against a ping-pong over plain Python sockets in the same run."""
    answer(run(names(provider), names(op), block, operations), json, show)
