"""`mooncache bench`: measures this machine with the real engine. Each bench asserts that it did its work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from mooncache.cli import beside as beside_bench
from mooncache.cli import finality as finality_bench
from mooncache.cli import gil as gil_bench
from mooncache.cli import latency as latency_bench
from mooncache.cli import lifecycle as lifecycle_bench
from mooncache.cli import placement as placement_bench
from mooncache.cli import rdma as rdma_bench
from mooncache.cli import soak as soak_bench
from mooncache.cli import transfer as transfer_bench
from mooncache.cli import turnover as turnover_bench
from mooncache.cli.measure import show_json
from mooncache.errors import UsageError

bench = typer.Typer(no_args_is_help=True, help="Measure this machine with the real engine.")

JSON = typer.Option(False, "--json", help="Print one JSON object, and nothing else, on stdout.")


def show(report: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], None]) -> None:
    """Print a report for a program or for people."""
    (show_json if as_json else table)(report)


@bench.command()
def lifecycle(
    slices: list[int] = typer.Option(
        list(lifecycle_bench.SLICES),
        min=1,
        max=lifecycle_bench.MILLION,
        help="Slices of a batch. Repeatable.",
    ),
    store: list[str] = typer.Option(list(lifecycle_bench.STORES), help="pool or heap. Repeatable."),
    policy: list[str] = typer.Option(list(lifecycle_bench.POLICIES), help="Where slices are deleted. Repeatable."),
    thread: list[str] = typer.Option(
        list(lifecycle_bench.THREADS),
        help="Who closes: the submitting thread (same), or another (other). Repeatable.",
    ),
    repeat: int | None = typer.Option(
        None, min=1, help="Lives of each batch [default: 2 to 1,000, by size and policy]."
    ),
    json: bool = JSON,
) -> None:
    """Submit, complete and release: what each costs, per slice and per batch, for every place of deletion.

    Callers run on one core and workers on another, if there are two.
    """
    show(lifecycle_bench.run(slices, store, policy, thread, repeat), json, lifecycle_bench.show)


@bench.command()
def gil(
    seconds: float = typer.Option(10.0, min=0.1, help="How long to measure, both ways together."),
    json: bool = JSON,
) -> None:
    """A running transfer and its submits, without and with a busy Python thread beside them.

    Python threads run on one core and the worker on another, if there are two: it is the GIL that is measured.
    """
    show(gil_bench.run(seconds), json, gil_bench.show)


@bench.command()
def soak(
    layers: int = typer.Option(2000, min=4, help="Batches in all."),
    slices: int = typer.Option(30_000, min=1, max=1_000_000, help="Slices of a batch."),
    json: bool = JSON,
) -> None:
    """Two submitting threads, one worker, many layers: does memory stay flat, does every slot come back?

    Exit status 1 if not.
    """
    report = soak_bench.run(layers, slices)
    show(report, json, soak_bench.show)
    if report["violations"]:
        raise typer.Exit(1)


@bench.command()
def turnover(
    provider: str = typer.Option("shm", help="shm, tcp or auto."),
    peers: int = typer.Option(1000, min=0, help="Peers that come and go, one after another."),
    batches: int = typer.Option(10_000, min=1, help="Batches to one that stays, at least, beside all that."),
    maps: int = typer.Option(100, min=0, help="Times that one registers new memory, which is written to."),
    json: bool = JSON,
) -> None:
    """Peers come and go beside a steady load: do descriptors, threads, mappings and memory stay flat?

    Exit status 1 if not.
    """
    if peers + maps == 0:
        raise typer.BadParameter("expected at least one peer or one map")
    report = turnover_bench.run(provider, peers, batches, maps)
    show(report, json, turnover_bench.show)
    if report["violations"]:
        raise typer.Exit(1)


@bench.command()
def placement(
    layers: int = typer.Option(80, min=1, help="Batches of each rank."),
    slices: int = typer.Option(25_000, min=1, max=1_000_000, help="Slices of a batch."),
    ranks: int = typer.Option(4, min=1, max=64, help="Engines that send, each with its own thread."),
    pair: list[str] = typer.Option(list(placement_bench.PAIRS), help="store+policy. Repeatable."),
    quick: bool = typer.Option(False, "--quick", help="At most 10 layers, one round instead of three."),
    json: bool = JSON,
) -> None:
    """The incident with the real engine on an emulated NIC: how much of a worker's time goes into freeing?"""
    show(placement_bench.run(layers, slices, ranks, pair, quick), json, placement_bench.show)


@bench.command()
def transfer(
    provider: list[str] = typer.Option(
        list(transfer_bench.DEFAULT_PROVIDERS), help="tcp, shm, loopback or auto. Repeatable."
    ),
    op: list[str] = typer.Option([], help="write or read. Repeatable."),
    ranks: list[int] = typer.Option([], help="Pairs of processes that send at once. Repeatable."),
    workers: list[int] = typer.Option([], help="Worker threads of each engine. Repeatable."),
    slices: list[int] = typer.Option([], help="Blocks of a batch, in random order. Repeatable."),
    block: list[str] = typer.Option([], help="Bytes of a block, such as 512 or 16KiB. Repeatable."),
    layers: int = typer.Option(
        1, help="Batches of a sample, one after another. From 8 on: do memory and descriptors stay flat?"
    ),
    repeat: int = typer.Option(transfer_bench.REPEATS, help="Samples of each combination, of its reference as well."),
    against: str = typer.Option("", help="Also measure other packages: mooncake, nixl, or mooncake,nixl."),
    json: bool = JSON,
) -> None:
    """From process to process over real wires, against plain Python sockets and memcpy in the same run.

    Without --op, --ranks, --workers, --slices and --block: a standard set, in about three minutes; with any of them:
    every combination. Every byte is checked where it arrives. Exit status 1 if memory or descriptors grew.
    """
    shapes = transfer_bench.shapes(op, ranks, workers, slices, block)
    others = [name.strip() for name in against.split(",") if name.strip()]
    report = transfer_bench.run(provider, shapes, layers, repeat, others)
    show(report, json, transfer_bench.show)
    if report["violations"]:
        raise typer.Exit(1)


@bench.command()
def latency(
    provider: list[str] = typer.Option(
        list(latency_bench.DEFAULT_PROVIDERS), help="shm, tcp, loopback or auto. Repeatable."
    ),
    op: list[str] = typer.Option(["write"], help="write or read. Repeatable."),
    block: list[str] = typer.Option(list(latency_bench.BLOCKS), help="Bytes of an operation. Repeatable."),
    operations: int = typer.Option(latency_bench.OPERATIONS, help="Of each combination, of its reference as well."),
    beside_stream: bool = typer.Option(
        False, "--beside-stream", help="Instead: how long the call of a small write takes beside a stream; tcp and shm."
    ),
    json: bool = JSON,
) -> None:
    """One small operation at a time, waited for, against a ping-pong over plain Python sockets in the same run."""
    if beside_stream:
        if op != ["write"] or block != list(latency_bench.BLOCKS):
            raise UsageError("--beside-stream measures writes of blocks of 4 KiB: leave --op and --block out")
        named = provider != list(latency_bench.DEFAULT_PROVIDERS)
        show(beside_bench.run(provider if named else list(beside_bench.STREAMS), operations), json, beside_bench.show)
        return
    show(latency_bench.run(provider, op, block, operations), json, latency_bench.show)


@bench.command()
def finality(
    provider: list[str] = typer.Option(
        list(finality_bench.DEFAULT_PROVIDERS), help="tcp, shm, or rdma with a device. Repeatable."
    ),
    cases: int = typer.Option(finality_bench.CASES, help="Transfers that end early, of each provider."),
    json: bool = JSON,
) -> None:
    """Cancel, close, let time out, stop, kill and fence in the middle of transfers: does anything land afterwards?

    Exit status 1 if any byte does.
    """
    report = finality_bench.run(provider, cases)
    show(report, json, finality_bench.show)
    if any(row["late_bytes_source"] or row["late_bytes_target"] for row in report["results"]):
        raise typer.Exit(1)


@bench.command()
def post(
    slices: int = typer.Option(30_000, min=1, max=lifecycle_bench.MILLION, help="Slices of a batch."),
    repeat: int = typer.Option(100, min=1, help="Batches of each kind."),
    json: bool = JSON,
) -> None:
    """Build, chain and post work requests and take their completions, over a stub, against objects of pyverbs.

    A completion is asked for every 16 work requests, and for each of them.
    """
    from mooncache.cli import post as post_bench  # here: its kernels are compiled only for those who run it

    show(post_bench.run(slices, repeat), json, post_bench.show)


@bench.command()
def rdma(
    device: list[str] = typer.Option(
        [], help='"device" or "device:port". Repeatable: one after another. [default: the first active port]'
    ),
    test: list[str] = typer.Option(list(rdma_bench.TESTS), help="write, read or latency. Repeatable."),
    size: list[str] = typer.Option(
        list(rdma_bench.SIZES), "--bytes", help="Bytes of a write or read, up to 64KiB. Repeatable."
    ),
    iterations: int = typer.Option(
        rdma_bench.ITERATIONS, help="Work requests of a sample; a tenth of them, one by one, for the latency."
    ),
    repeat: int = typer.Option(rdma_bench.REPEATS, help="Samples of each, of perftest's as well."),
    depth: int = typer.Option(rdma_bench.DEPTH, help="Work requests under way at once (perftest: --tx-depth)."),
    signal: int = typer.Option(rdma_bench.SIGNAL, help="Work requests behind one completion (perftest: --cq-mod)."),
    gid_index: int | None = typer.Option(None, min=0, help="Entry of the port's GID table [default: the best]."),
    json: bool = JSON,
) -> None:
    """Over an RDMA device, against perftest (ib_write_bw, ib_read_bw, ib_write_lat) on it in the same run.

    Without perftest its figures are null. In a guest under emulation: --iterations 500 --repeat 3.
    """
    plan = rdma_bench.Plan(iterations, repeat, depth, signal)
    show(rdma_bench.run(device, test, size, gid_index, plan), json, rdma_bench.show)
