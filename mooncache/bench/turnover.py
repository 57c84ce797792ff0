"""`mooncache bench turnover` lets peers come and go beside a steady load, and maps memory anew; nothing may grow.

One engine lives throughout. A thread of it keeps batches in flight to a peer that lives as long, in another process. In
that process other engines open, one after another, are connected to, written to and closed; and the steady peer
registers new memory, has it written to, and withdraws it. Both processes are looked at all along.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from enum import Enum
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, NamedTuple

import numpy as np
import typer

from mooncache import Batch, Engine
from mooncache.bench.harness.measure import FingerprintError, descriptors, resident_bytes
from mooncache.bench.harness.options import JSON
from mooncache.bench.harness.process import Process, serve
from mooncache.bench.harness.report import answer, progress, provenance, show_table
from mooncache.memory import Region
from mooncache.segments import allocate

BLOCK, BLOCKS = 4096, 256
SLICES = 64  # of a batch of the load
IN_FLIGHT = 2  # batches of the load
FRESH_BYTES = 1 << 20
PEERS_AT_ONCE = 16
LOOKS = 100
WARM = 0.1  # of all steps, before growth counts
PATIENCE_S = 60.0
TRIES, PAUSE_S = 50, 0.02  # a look waits so long for what peers that just ended had
MOST = {"descriptors": 0, "threads": 8, "mappings": 16, "resident_mib": 16.0}
"""Growth that counts for nothing: pools of threads fill as they are needed, and malloc keeps some."""


class Provider(str, Enum):
    """The wires to peers in another process, and the choice between them."""

    SHM = "shm"
    TCP = "tcp"
    AUTO = "auto"


INODE = 4  # where a line of /proc/self/maps has that of the file


def small(provider: str) -> Engine:
    """Open an engine that costs little to open."""
    return Engine(provider=provider, slices=4096, batches=64, peers=PEERS_AT_ONCE)


class Usage(NamedTuple):
    """The resources that a process holds."""

    descriptors: int
    threads: int
    mappings: int  # of files and of shared memory; malloc's own come and go with threads
    resident_mib: float


def look() -> Usage:
    """Return what this process holds."""
    gc.collect()
    return Usage(
        descriptors(),
        len(os.listdir("/proc/self/task")),
        sum(line.split()[INODE] != "0" for line in Path("/proc/self/maps").read_text().splitlines()),
        round(resident_bytes() / 2**20, 2),
    )


# ------------------------------------------------------------------------------ the other process
class Others:
    """The steady peer, and the peer that comes and goes."""

    def __init__(self) -> None:
        self.steady: Engine | None = None
        self.passing: Engine | None = None
        self.fresh: tuple[Region, np.ndarray] | None = None

    def open(self, provider: str) -> list[Any]:
        """Open the steady peer; return its address and that of its memory."""
        self.steady = small(provider)
        self.memory = allocate(BLOCKS * BLOCK)
        return [self.steady.address, self.steady.register(self.memory).address]

    def come(self, provider: str) -> list[Any]:
        """Open another peer with memory of one block; return the address of each."""
        self.passing = small(provider)
        self.block = allocate(BLOCK)
        return [self.passing.address, self.passing.register(self.block).address]

    def go(self) -> int:
        """Close the passing peer; return the sum of what was written to it."""
        assert self.passing is not None
        self.passing.close()
        self.passing = None
        return int(self.block.sum())

    def map(self) -> int:
        """Register new memory of the steady peer; return its address."""
        assert self.steady is not None
        memory = allocate(FRESH_BYTES)
        self.fresh = self.steady.register(memory), memory
        return self.fresh[0].address

    def unmap(self) -> int:
        """Unregister that memory; return the sum of what was written to it."""
        assert self.fresh is not None
        region, memory = self.fresh
        region.unregister()
        self.fresh = None
        return int(memory.sum())

    def look(self) -> list[float]:
        """Return what this process holds."""
        return list(look())


def main() -> None:
    """Answer commands until stdin ends: the other process."""
    others = Others()
    serve({name: getattr(others, name) for name in ("open", "come", "go", "map", "unmap", "look")})


# ------------------------------------------------------------------------------ this one
class Load:
    """A thread that keeps batches in flight to the steady peer, until `end`."""

    def __init__(self, engine: Engine, peer: str, operands: tuple[np.ndarray, np.ndarray]) -> None:
        self._engine, self._peer, self._operands = engine, peer, operands
        self._stop = threading.Event()
        self.batches, self.error = 0, ""
        self._thread = threading.Thread(target=self._run, name="mooncache-load")
        self._thread.start()

    def _run(self) -> None:
        flying: deque[Batch] = deque()
        try:
            while not self._stop.is_set():
                flying.append(self._engine.write(self._peer, *self._operands, BLOCK, timeout=PATIENCE_S))
                if len(flying) == IN_FLIGHT:
                    flying.popleft().wait(PATIENCE_S).close()
                    self.batches += 1
            for batch in flying:
                batch.wait(PATIENCE_S).close()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def end(self, batches: int) -> None:
        """End the load once so many batches are done."""
        while self.batches < batches and not self.error:
            sleep(PAUSE_S)
        self._stop.set()
        self._thread.join()


class Turnover:
    """One run."""

    def __init__(self, provider: str, engine: Engine, others: Process) -> None:
        self.provider, self.engine, self.others = provider, engine, others
        self.address, self.base = others.ask(do="open", provider=provider)
        self.data = allocate(FRESH_BYTES)
        self.data[:] = 1
        self.local = engine.register(self.data).address
        self.map_ms: list[float] = []

    def come_and_go(self) -> None:
        """Let one peer open, write to it, and let it close."""
        address, base = self.others.ask(do="come", provider=self.provider)
        self.engine.write(address, self.local, base, BLOCK, timeout=PATIENCE_S).wait(PATIENCE_S).close()
        self._expect(self.others.ask(do="go"), BLOCK)

    def map_anew(self) -> None:
        """Let the steady peer register new memory, write to it, and let it unregister the memory."""
        base = self.others.ask(do="map")
        since = perf_counter()
        self.engine.write(self.address, self.local, base, FRESH_BYTES, timeout=PATIENCE_S).wait(PATIENCE_S).close()
        self.map_ms.append((perf_counter() - since) * 1e3)
        self._expect(self.others.ask(do="unmap"), FRESH_BYTES)

    def _expect(self, found: int, wanted: int) -> None:
        if found != wanted:
            raise FingerprintError(f"{found} of {wanted} bytes arrived")

    def look(self, before: list[Usage]) -> list[Usage]:
        """Return what both processes hold; a peer that just ended may take a moment to be noticed."""
        for _ in range(TRIES):
            seen = [look(), Usage(*self.others.ask(do="look"))]
            if not before or all(now.descriptors <= then.descriptors for now, then in zip(seen, before, strict=True)):
                break
            sleep(PAUSE_S)
        return seen


def run(provider: str, peers: int, batches: int, maps: int) -> dict[str, Any]:
    """Let peers come and go; return the report that `--json` prints. `violations` is empty when nothing grew."""
    steps = max(peers, maps)
    period = max(1, steps // LOOKS)
    seen: list[tuple[int, list[Usage]]] = []
    offsets = np.random.default_rng(1).permutation(BLOCKS)[:SLICES].astype(np.int64) * BLOCK
    with (
        Process("mooncache.bench.turnover") as others,
        small(provider) as engine,
        progress("turnover", steps) as bar,
    ):
        turnover = Turnover(provider, engine, others)
        begin = perf_counter()
        load = Load(engine, turnover.address, (turnover.local + offsets % FRESH_BYTES, turnover.base + offsets))
        try:
            for step in range(1, steps + 1):
                if step * peers // steps > (step - 1) * peers // steps:
                    turnover.come_and_go()
                if step * maps // steps > (step - 1) * maps // steps:
                    turnover.map_anew()
                if step % period == 0:
                    warm = next((usage for at, usage in seen if at >= WARM * steps), [])
                    seen.append((step, turnover.look(warm)))
                    bar()
        finally:
            load.end(batches)
        seconds = perf_counter() - begin
    return report(provider, peers, maps, load, turnover.map_ms, seen, seconds)


def report(
    provider: str, peers: int, maps: int, load: Load, map_ms: list[float], seen: list[tuple[int, list[Usage]]],
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Return what `--json` prints."""
    first = next(usage for at, usage in seen if at >= min(WARM * seen[-1][0], seen[-1][0]))
    growth = {
        who: {name: round(float(now - then), 2) for name, now, then in zip(Usage._fields, last, warm, strict=True)}
        for who, last, warm in zip(("here", "there"), seen[-1][1], first, strict=True)
    }
    violations = [load.error] if load.error else []
    violations += [
        f"{name} of the process {who} grew by {figure}, at most {MOST[name]}"
        for who, figures in growth.items()
        for name, figure in figures.items()
        if figure > MOST[name]
    ]
    return {
        "bench": "turnover",
        "verdict": "violated" if violations else "ok",
        "violations": violations,
        "provider": provider,
        "peers": peers,
        "batches": load.batches,
        "maps": maps,
        "seconds": round(seconds, 1),
        "map_ms": {"p50": round(float(np.median(map_ms)), 3), "max": round(max(map_ms), 3)} if map_ms else None,
        "growth": growth,
        "seen": [[step, *map(list, usages)] for step, usages in seen],
        "provenance": provenance(),
    }


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    columns = ("provider", "peers", "batches", "maps", "process", *(name.replace("_", " ") for name in Usage._fields))
    counts = [report[name] for name in ("provider", "peers", "batches", "maps")]
    rows = [[*counts, who, *(figures[name] for name in Usage._fields)] for who, figures in report["growth"].items()]
    says = "Growth after the first tenth: nothing was kept of peers that ended, or of memory that went."
    show_table("Turnover", columns, rows, "; ".join(report["violations"]) or says)


def command(
    provider: Provider = typer.Option(Provider.SHM),
    peers: int = typer.Option(1000, min=0, help="Peers that come and go, one after another."),
    batches: int = typer.Option(10_000, min=1, help="Batches to one that stays, at least, beside all that."),
    maps: int = typer.Option(100, min=0, help="Times that one registers new memory, which is written to."),
    json: bool = JSON,
) -> None:
    """Let peers come and go beside a steady load: do descriptors, threads, mappings and memory stay flat?

    Exit status 1 if not.
    """
    if peers + maps == 0:
        raise typer.BadParameter("expected at least one peer or one map")
    report = run(provider.value, peers, batches, maps)
    answer(report, json, show)
    if report["violations"]:
        raise typer.Exit(1)
