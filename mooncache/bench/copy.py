"""`mooncache bench copy`: which way of copying is fastest on this machine, for blocks of each size.

    memcpy    libc's
    lines     past the caches, one cache line after the other
    banks     past the caches, of four pages at a time one line each

Blocks lie scattered in shared memory far larger than the caches; ways take turns, and all bytes are checked after each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import typer

from mooncache import copy_ways
from mooncache.bench.harness import blocks
from mooncache.bench.harness.blocks import Copying, Way
from mooncache.bench.harness.measure import SEED, FingerprintError, median
from mooncache.bench.harness.options import JSON
from mooncache.bench.harness.report import answer, progress, provenance, show_table
from mooncache.copy_ways import NONE, Banks
from mooncache.errors import UsageError
from mooncache.kernels.arrays import address_of
from mooncache.limits import KiB
from mooncache.segments import allocate
from mooncache.sizes import spell

SIZES = (512, 1 * KiB, 4 * KiB, 8 * KiB, 16 * KiB, 24 * KiB, 32 * KiB, 48 * KiB, 64 * KiB)
"""The last is the longest piece that an engine copies at once."""

TOTAL_BYTES = 128 << 20
REPEATS = 9
WORTH = 0.95
"""Banks are taken where they take less than this part of the time by lines, lest noise decides."""


def measure(size: int, repeats: int, seeds: count[int]) -> dict[str, Any]:
    """Copy blocks of one size by every way in turn; return its row of the report."""
    n = TOTAL_BYTES // size
    ours, theirs = (allocate(blocks.span(n, size)) for _ in range(2))
    sources, targets = (
        address_of(buffer) + offsets for buffer, offsets in zip((ours, theirs), blocks.places(n, size), strict=True)
    )
    copying = Copying(targets, sources, size, threads=1)
    took: dict[Way, list[float]] = {way: [] for way in Way}
    for turn in range(repeats):
        for at in range(len(Way)):
            way, seed = Way((turn + at) % len(Way)), next(seeds)
            blocks.fill(address_of(sources), n, size, seed)
            took[way].append(copying.timed(way))
            wrong = blocks.count_wrong(address_of(targets), n, size, seed)
            if wrong:
                raise FingerprintError(
                    f"expected {n} blocks of {spell(size)} to be copied by {way.name}, {wrong} were not"
                )
    copying.close()
    seconds = {way: median(samples) for way, samples in took.items()}
    row: dict[str, Any] = {"block_bytes": size, "blocks": n}
    row |= {f"{way.name.lower()}_ns_per_block": round(s / n * 1e9, 1) for way, s in seconds.items()}
    return row | {
        "gigabytes_per_s": round(n * size / min(seconds.values()) / 1e9, 2),
        "fastest": min(seconds, key=seconds.__getitem__).name.lower(),
    }


def by_banks(rows: Sequence[dict[str, Any]]) -> Banks:
    """Return the lengths to copy by banks: the longest run of sizes for which they are worth it."""
    runs: list[list[int]] = [[]]
    for row in rows:
        if row["banks_ns_per_block"] < WORTH * row["lines_ns_per_block"]:
            runs[-1].append(row["block_bytes"])
        elif runs[-1]:
            runs.append([])
    run = max(runs, key=len)
    if not run:
        return NONE
    beyond = [row["block_bytes"] for row in rows if row["block_bytes"] > run[-1]]
    return Banks(run[0], beyond[0] if beyond else run[-1] + 1)


def run(sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Measure every size; the report that `--json` prints."""
    seeds = count(SEED)
    with progress("copies", len(sizes)) as bar:
        rows = []
        for size in sizes:
            rows.append(measure(size, repeats, seeds))
            bar()
    return {
        "bench": "copy",
        "results": rows,
        "by_banks": list(by_banks(rows)),
        "engines_copy_by_banks": list(copy_ways.banks()),
        "cpu": copy_ways.name(),
        "seed": SEED,
        "provenance": provenance(),
    }


def told(lengths: Sequence[int]) -> str:
    """Return lengths as people say them."""
    first, below = lengths
    return f"from {spell(first)} to below {spell(below)} by banks" if first < below else "all by lines"


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    columns = ("block", *(f"{way.name.lower()}\nns" for way in Way), "fastest", "GB/s")
    rows = [
        [
            spell(row["block_bytes"]), *(row[f"{way.name.lower()}_ns_per_block"] for way in Way), row["fastest"],
            row["gigabytes_per_s"],
        ]
        for row in report["results"]
    ]  # fmt: skip
    says = (
        f"Here it is best to copy {told(report['by_banks'])}; engines on this CPU copy "
        f"{told(report['engines_copy_by_banks'])}."
    )
    show_table("Copies of scattered blocks by one thread: medians", columns, rows, says)


def command(
    repeat: int = typer.Option(REPEATS, min=1, max=1000, help="Copies of each size by each way."),
    save: bool = typer.Option(False, "--save", help="Let engines of this user on such CPUs copy as was best here."),
    json: bool = JSON,
) -> None:
    """Measure the ways to copy blocks within a host, by size of block. Takes a minute.

    Disturbed measurements mislead: run it on a quiet machine, twice, before you --save what it says.
    """
    report = run(SIZES, repeat)
    answer(report, json, show)
    if save:
        try:
            path = copy_ways.save(Banks(*report["by_banks"]))
        except OSError as error:
            raise UsageError(
                f"bench copy --save: {error.filename or 'the file'} cannot be written: {error.strerror}"
            ) from error
        typer.echo(f"kept in {path}", err=True)
