"""`mooncache bench soak` submits many layers from two threads to one worker; nothing may grow, nothing be lost.

At a *quiet point* both threads wait for what they have in flight. Twice they look at the pool: while each
still holds a finished batch (free + live = capacity), and after both have closed it (free = capacity).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Barrier
from time import perf_counter
from typing import Any

import typer

from mooncache import Batch, Engine
from mooncache.bench.harness.measure import (
    FREE_WIRE,
    GROWTH_MIB,
    FingerprintError,
    Traffic,
    expect_counts,
    resident_bytes,
    scattered,
    slots_of,
)
from mooncache.bench.harness.options import JSON
from mooncache.bench.harness.report import answer, progress, provenance, show_table
from mooncache.errors import UsageError
from mooncache.providers.inprocess.emulated import Emulated

SUBMITTERS = 2
IN_FLIGHT = 2  # batches of each submitter
WARM_LAYERS = 100
QUIET_POINTS = 100
PATIENCE_S = 60.0
MIB = 1 << 20


class Soak:
    """The state that the submitting threads share, and what was seen at the quiet points."""

    def __init__(self, engine: Engine, sink: Engine, layers: int, traffic: Traffic) -> None:
        self.engine, self.sink, self.traffic = engine, sink.name, traffic
        self.each = layers // SUBMITTERS
        self.period = max(1, self.each // QUIET_POINTS)
        self.layers_done = 0
        self.held: list[Batch] = []
        self.samples: list[tuple[int, int]] = []  # layers done, resident bytes
        self.violations: list[str] = []
        self.holding, self.released = (
            Barrier(SUBMITTERS, self.look_holding),
            Barrier(SUBMITTERS, self.look_released),
        )

    def submitter(self) -> None:
        """Submit one thread's layers, with a quiet point every `period` of them."""
        flying: deque[Batch] = deque()
        try:
            for layer in range(1, self.each + 1):
                if len(flying) == IN_FLIGHT:
                    flying.popleft().wait(PATIENCE_S).close()
                flying.append(self.engine.write(self.sink, *self.traffic.operands, timeout=PATIENCE_S))
                if layer % self.period == 0 or layer == self.each:
                    self.quiet_point(flying, layer)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Let no thread get past its next quiet point."""
        self.holding.abort()
        self.released.abort()

    def quiet_point(self, flying: deque[Batch], layer: int) -> None:
        """Finish what is in flight, look, close the last batch, look again."""
        while len(flying) > 1:
            flying.popleft().wait(PATIENCE_S).close()
        last = flying.popleft().wait(PATIENCE_S)
        self.held.append(last)
        self.layers_done = layer * SUBMITTERS
        self.holding.wait(PATIENCE_S)
        last.close()
        self.released.wait(PATIENCE_S)

    def look_holding(self) -> None:
        """Look while both threads hold a finished batch."""
        self.expect_free(sum(slots_of(batch.slices) for batch in self.held), "finished and not closed")
        self.held.clear()

    def look_released(self) -> None:
        """Look while neither thread holds anything."""
        self.expect_free(0, "closed")
        self.samples.append((self.layers_done, resident_bytes()))

    def expect_free(self, live: int, when: str) -> None:
        """Note a violation unless free + live = capacity."""
        stats = self.engine.stats()
        if stats.free_slices + live != stats.capacity_slices:
            self.violations.append(
                f"after {self.layers_done} layers, batches {when}: {stats.free_slices} free + {live} live "
                f"slots of {stats.capacity_slices}"
            )


def run(layers: int, slices: int) -> dict[str, Any]:
    """Soak the engine; return the report that `--json` prints. `violations` is empty when all went well."""
    if layers % SUBMITTERS:
        raise UsageError(f"expected --layers to be a multiple of {SUBMITTERS}, the submitting threads, got {layers}")
    traffic = scattered(slices, 512)
    with (
        Engine(provider=Emulated(FREE_WIRE), slices=SUBMITTERS * IN_FLIGHT * slots_of(slices), peers=1) as engine,
        Engine(provider=Emulated(FREE_WIRE), slices=1, peers=1) as sink,
    ):
        engine.register(traffic.source_buffer)
        sink.register(traffic.target_buffer)
        soak = Soak(engine, sink, layers, traffic)
        begin = perf_counter()
        run_threads(soak)
        seconds = perf_counter() - begin
        stats = engine.stats()
    check_end(soak, layers, slices, stats)
    growth = growth_bytes(soak.samples, layers) / MIB
    if growth > GROWTH_MIB:
        soak.violations.append(f"resident memory grew by {growth:.2f} MiB after the first layers, at most {GROWTH_MIB}")
    return {
        "bench": "soak",
        "verdict": "violated" if soak.violations else "ok",
        "violations": soak.violations,
        "layers": layers,
        "slices": slices,
        "seconds": round(seconds, 3),
        "slices_per_second": round(layers * slices / seconds),
        "rss_growth_mib": round(growth, 3),
        "rss_mib": [[layer, round(size / MIB, 3)] for layer, size in soak.samples],
        "quiet_points": len(soak.samples),
        "capacity_slices": stats.capacity_slices,
        "free_slices": stats.free_slices,
        "stale": stats.counts["stale"],
        "provenance": provenance(),
    }


def run_threads(soak: Soak) -> None:
    """Run the submitters to their end; the first one's exception ends them all."""
    with ThreadPoolExecutor(SUBMITTERS, "mooncache-submitter") as pool, progress("soak", 1) as bar:
        runs = [pool.submit(soak.submitter) for _ in range(SUBMITTERS)]
        try:
            for ended in wait(runs, return_when=FIRST_EXCEPTION).done:
                ended.result()
        except BaseException:
            soak.abort()
            raise
        bar()


def check_end(soak: Soak, layers: int, slices: int, stats: Any) -> None:
    """Note a violation if the counts are not the work's: a stale completion applied would show in them."""
    try:
        expect_counts(stats, layers * slices, layers, "pool", "bulk")
    except FingerprintError as error:
        soak.violations.append(str(error))


def growth_bytes(samples: list[tuple[int, int]], layers: int) -> int:
    """Return how far resident memory rose above that after the first layers (half of them in a short run)."""
    warm = min(WARM_LAYERS, layers // 2)
    later = [size for layer, size in samples if layer >= warm]
    return max(later) - later[0]


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    sizes = [size for _, size in report["rss_mib"]]
    columns = (
        "layers",
        "slices",
        "seconds",
        "M slices/s",
        "memory at end\nMiB",
        "growth\nMiB",
        "stale",
        "quiet points",
    )
    row = [
        report["layers"], report["slices"], report["seconds"], report["slices_per_second"] / 1e6, sizes[-1],
        report["rss_growth_mib"], report["stale"], report["quiet_points"],
    ]  # fmt: skip
    says = "Memory stayed flat, every slot came back by every quiet point, no completion was stale."
    show_table("Soak", columns, [row], "; ".join(report["violations"]) or says)


def command(
    layers: int = typer.Option(2000, min=4, help="Batches in all."),
    slices: int = typer.Option(30_000, min=1, max=1_000_000, help="Slices of a batch."),
    json: bool = JSON,
) -> None:
    """Submit many layers from two threads to one worker: does memory stay flat, does every slot come back?

    Exit status 1 if not.
    """
    report = run(layers, slices)
    answer(report, json, show)
    if report["violations"]:
        raise typer.Exit(1)
