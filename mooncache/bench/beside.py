"""`mooncache bench beside` measures what small writes cost their caller while their worker moves a stream.

    near   main thread   [ write 1 | write 2 | write 4 ... blocks, each waited for ]   what is timed is `write` alone
           thread        [ sleep 1 ms ][ sleep 1 ms ] ...                              how late it is: who has the GIL?
           worker        the stream: over tcp it comes in from `far`, by shm it goes out
    far    lends its memory, and over tcp sends the stream

A round measures sleeps beside the stream without writes, then with them. Before the rounds the same without a stream.
All that was written, and the whole stream, is checked where it arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from enum import Enum
from itertools import count
from typing import Any

import typer

from mooncache.bench.ends.beside import BATCHES, BLOCK
from mooncache.bench.harness.measure import SEED, FingerprintError, expect, quantile
from mooncache.bench.harness.options import JSON, names
from mooncache.bench.harness.process import Process
from mooncache.bench.harness.report import answer, progress, provenance, show_table
from mooncache.kernels import jit


class Provider(str, Enum):
    """The wires that carry the stream and the writes."""

    TCP = "tcp"
    SHM = "shm"


STREAMS = {"tcp": "in", "shm": "out"}  # which way keeps the near worker busy: over shm the sender does all the work
ROUNDS = 5
OPERATIONS, MOST_OPERATIONS = 3000, 100_000


class Sides:
    """The two processes of a run, and the calls that make a round of them."""

    def __init__(self, stack: ExitStack, provider: str) -> None:
        self.near, self.far = (stack.enter_context(Process("mooncache.bench.ends.beside")) for _ in range(2))
        self.stream = STREAMS[provider]
        self.sender, self.receiver = (self.far, self.near) if self.stream == "in" else (self.near, self.far)
        place = self.far.ask(do="open", role="far", provider=provider)
        own = self.near.ask(do="open", role="near", provider=provider)
        self.near.ask(do="connect", there=place)
        self.far.ask(do="connect", there=own)

    def round(self, calls: int, seed: int, *, beside: bool) -> dict[str, Any]:
        """Run one round. Raises FingerprintError unless all bytes arrived and the stream moved all the while."""
        if beside:
            self.sender.ask(do="fill_stream", seed=seed)
            self.sender.ask(do="stream")
        found: dict[str, Any] = self.near.ask(do="measure", calls=calls, seed=seed)
        if beside:
            found["stream"] = self.sender.ask(do="end_stream")
            expect("blocks of the stream that are wrong", self.receiver.ask(do="wrong_stream", seed=seed), 0)
        expect("blocks written beside the stream that are wrong", self.far.ask(do="wrong", seed=seed), 0)
        return found


def measure(provider: str, operations: int, seeds: count[int], bar: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure one provider; return its rows, and how late its sleeps ended."""
    each = -(-operations // ROUNDS)
    with ExitStack() as stack:
        sides = Sides(stack, provider)
        sides.round(each, next(seeds), beside=False)  # warms up
        quiet = [sides.round(each, next(seeds), beside=False)]
        rounds = []
        for _ in range(ROUNDS):
            rounds.append(sides.round(each, next(seeds), beside=True))
            bar()
        sides.near.ask(do="check")
        for side in (sides.near, sides.far):
            side.ask(do="close")
    if any(one["stream"]["batches"] == 0 for one in rounds):
        raise FingerprintError(f"the stream over {provider} stood still; the figures of this run mean nothing")
    calls = {n: [ns / 1e3 for one in rounds for ns in one["calls"][at]] for at, n in enumerate(BATCHES)}
    alone = {n: [ns / 1e3 for one in quiet for ns in one["calls"][at]] for at, n in enumerate(BATCHES)}
    largest = quantile(calls[BATCHES[-1]], 0.99)
    rows = [
        {
            "provider": provider,
            "stream": sides.stream,
            "slices": n,
            "block_bytes": BLOCK,
            "calls": len(calls[n]),
            "call_us_p50": round(quantile(calls[n], 0.5), 2),
            "call_us_p99": round(quantile(calls[n], 0.99), 2),
            "p99_to_largest": round(quantile(calls[n], 0.99) / largest, 3),
            "quiet_call_us_p50": round(quantile(alone[n], 0.5), 2),
            "quiet_call_us_p99": round(quantile(alone[n], 0.99), 2),
        }
        for n in BATCHES
    ]
    moved, seconds = (sum(one["stream"][what] for one in rounds) for what in ("bytes", "seconds"))
    late = {way: [ns / 1e3 for one in rounds for ns in one["sleeps"][way]] for way in ("without", "with")}
    sleeps = {
        "provider": provider,
        "stream_bytes_per_s": round(moved / seconds),
        "late_us_p99_without": round(quantile(late["without"], 0.99), 2),
        "late_us_p99_with": round(quantile(late["with"], 0.99), 2),
        "late_us_p50_without": round(quantile(late["without"], 0.5), 2),
        "late_us_p50_with": round(quantile(late["with"], 0.5), 2),
    }
    return rows, sleeps


def run(providers: Sequence[str], operations: int) -> dict[str, Any]:
    """Measure each provider; return the report that `--json` prints."""
    if jit.cold():
        jit.prewarm()
    rows, sleeps, seeds = [], [], count(SEED)
    with progress("beside a stream", len(providers) * ROUNDS) as bar:
        for name in providers:
            more, late = measure(name, operations, seeds, bar)
            rows += more
            sleeps.append(late)
    return {"bench": "beside", "results": rows, "sleeps": sleeps, "seed": SEED, "provenance": provenance()}


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    figures = "call\np50 µs", "call\np99 µs", "of the\nlargest's", "quiet\np50 µs", "quiet\np99 µs"
    rows = [
        [
            row["provider"], row["slices"], row["call_us_p50"], row["call_us_p99"], row["p99_to_largest"],
            row["quiet_call_us_p50"], row["quiet_call_us_p99"],
        ]
        for row in report["results"]
    ]  # fmt: skip
    says = " ".join(
        f"Over {one['provider']}, beside {one['stream_bytes_per_s'] / 1e9:.2f} GB/s, another Python thread's sleeps of "
        f"1 ms ended {one['late_us_p99_with']:,.0f} µs late at p99 beside these writes, "
        f"{one['late_us_p99_without']:,.0f} µs without them."
        for one in report["sleeps"]
    )
    columns = ("provider", "slices", *figures)
    show_table("The call of write() beside a stream", columns, rows, f"{says} All bytes were checked.")


def command(
    provider: list[Provider] = typer.Option(list(Provider), help="Repeatable."),
    operations: int = typer.Option(
        OPERATIONS, min=ROUNDS, max=MOST_OPERATIONS, help="Writes of each size of batch, at least one a round."
    ),
    json: bool = JSON,
) -> None:
    """Measure how long the call of a small write takes beside a stream that keeps the worker busy."""
    answer(run(names(provider), operations), json, show)
