"""`mooncache bench placement` runs the incident for real: how much worker time goes into freeing slices?

Each rank is an engine, its peer and a Python thread of its own, which sends layer after layer over an
emulated 400 Gb/s NIC with few layers in flight, as a layer-wise prefill does. Who frees shows in the engines'
own clocks. These run on while a thread waits for a core: where ranks outnumber cores, compare shares and wall
times, not sums. All submits of the process share one GIL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from time import perf_counter
from typing import Any

import typer

from mooncache import Batch, Engine
from mooncache.bench.harness.measure import (
    SEED,
    Traffic,
    expect_counts,
    median,
    no_collections,
    scattered,
    slots_of,
    wait_until_quiet,
)
from mooncache.bench.harness.options import JSON, POLICIES, STORES
from mooncache.bench.harness.report import answer, progress, provenance, show_table
from mooncache.errors import UsageError
from mooncache.limits import CACHE_SLICES
from mooncache.providers.inprocess.emulated import Emulated, Nic

PAIRS = ("heap+inline", "pool+bulk")
SLICE_BYTES = 512
IN_FLIGHT = 2  # layers: while one is on the wire the next is submitted
ROUNDS, QUICK_LAYERS = 3, 10
FIELDS = ("seconds", "worker_busy_s", "worker_freeing_s", "caller_freeing_s", "reaper_freeing_s")


def send(engine: Engine, sink: str, traffic: Traffic, layers: int, start: Barrier) -> None:
    """Submit, wait for and close one rank's layers, one after the other."""
    flying: deque[Batch] = deque()
    start.wait()
    for _ in range(layers):
        if len(flying) == IN_FLIGHT:
            flying.popleft().wait().close()
        flying.append(engine.write(sink, *traffic.operands))
    while flying:
        flying.popleft().wait().close()


def once(store: str, policy: str, layers: int, ranks: int, traffic: Traffic) -> dict[str, float]:
    """Run all ranks' transfers under one pair; return the times of the round, summed over the ranks."""
    batches = layers if policy == "leak" else 2 * IN_FLIGHT
    slots = batches * slots_of(int(traffic.source.size)) + CACHE_SLICES
    nic = Nic(move_bytes=False)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(ranks, "mooncache-rank"))
        engines = [
            stack.enter_context(Engine(provider=Emulated(nic), store=store, policy=policy, slices=slots, peers=1))
            for _ in range(ranks)
        ]
        sinks = [stack.enter_context(Engine(provider=Emulated(nic), slices=1, peers=1)) for _ in range(ranks)]
        for engine, sink in zip(engines, sinks, strict=True):
            engine.register(traffic.source_buffer)
            sink.register(traffic.target_buffer)
            engine.connect(sink.name)
        stack.enter_context(no_collections())
        start = Barrier(ranks + 1)
        runs = [
            pool.submit(send, engine, sink.name, traffic, layers, start)
            for engine, sink in zip(engines, sinks, strict=True)
        ]
        start.wait()
        begin = perf_counter()
        for running in runs:
            running.result()
        seconds = perf_counter() - begin
        stats = [wait_until_quiet(engine) for engine in engines]
    for rank in stats:
        expect_counts(rank, layers * int(traffic.source.size), layers, store, policy)
    return {
        "seconds": seconds,
        "worker_busy_s": sum(sum(rank.worker_busy_s) for rank in stats),
        "worker_freeing_s": sum(sum(rank.worker_freeing_s) for rank in stats),
        "caller_freeing_s": sum(rank.caller_freeing_s for rank in stats),
        "reaper_freeing_s": sum(rank.reaper_freeing_s for rank in stats),
    }


def pair_of(name: str) -> tuple[str, str]:
    """Read a pair: `"heap + inline"` -> `("heap", "inline")`. Raises UsageError for names that do not exist."""
    store, _, policy = name.replace(" ", "").partition("+")
    if store not in STORES or policy not in POLICIES:
        stores, policies = ", ".join(STORES), ", ".join(POLICIES)
        raise UsageError(f"expected --pair STORE+POLICY of {stores} and {policies}, got {name!r}")
    return store, policy


def run(layers: int, slices: int, ranks: int, names: Sequence[str], quick: bool) -> dict[str, Any]:
    """Measure each pair, in rounds; return the report that `--json` prints."""
    pairs = [pair_of(name) for name in dict.fromkeys(names)]
    rounds = 1 if quick else ROUNDS
    layers = min(layers, QUICK_LAYERS) if quick else layers
    traffic = scattered(slices, SLICE_BYTES)
    taken: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs}
    with progress("placement", rounds * len(pairs)) as bar:
        for _ in range(rounds):
            for pair in pairs:
                taken[pair].append(once(*pair, layers, ranks, traffic))
                bar()
    return {
        "bench": "placement",
        "results": [row(*pair, taken[pair]) for pair in pairs],
        "layers": layers,
        "slices": slices,
        "ranks": ranks,
        "rounds": rounds,
        "seed": SEED,
        "provenance": provenance(),
    }


def row(store: str, policy: str, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the pair's row of the report: medians over the rounds."""
    values = {name: round(median([one[name] for one in rounds]), 4) for name in FIELDS}
    share = median([one["worker_freeing_s"] / one["worker_busy_s"] for one in rounds])
    return {"store": store, "policy": policy, **values, "worker_free_share": round(share, 4)}


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    columns = (
        "store", "policy", "wall\ns", "workers\nbusy s", "workers\nfreeing s", "callers\nfreeing s",
        "reapers\nfreeing s", "freeing share\nof workers",
    )  # fmt: skip
    rows = [[*list(row.values())[:-1], f"{row['worker_free_share']:.1%}"] for row in report["results"]]
    slow, fast = (pick(report["results"], key=lambda row: row["seconds"]) for pick in (max, min))
    says = (
        f"{slow['store']} + {slow['policy']} needs {slow['seconds'] / fast['seconds']:.2f} times as long as "
        f"{fast['store']} + {fast['policy']}; its workers free slices for "
        f"{slow['worker_free_share']:.0%} of their time."
    )
    title = f"{report['ranks']} ranks x {report['layers']} layers x {report['slices']:,} slices, sums over ranks"
    show_table(title, columns, rows, says)


def command(
    layers: int = typer.Option(80, min=1, help="Batches of each rank."),
    slices: int = typer.Option(25_000, min=1, max=1_000_000, help="Slices of a batch."),
    ranks: int = typer.Option(4, min=1, max=64, help="Engines that send, each with its own thread."),
    pair: list[str] = typer.Option(list(PAIRS), help="store+policy. Repeatable."),
    quick: bool = typer.Option(False, "--quick", help="At most 10 layers, one round instead of three."),
    json: bool = JSON,
) -> None:
    """Run the incident with the real engine on an emulated NIC: how much of a worker's time goes into freeing?"""
    answer(run(layers, slices, ranks, pair, quick), json, show)
