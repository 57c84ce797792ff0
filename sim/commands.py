"""The simulator's commands; `mooncache` finds them by entry point."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mooncache.errors import UsageError
from mooncache.kernels import jit
from sim import report, shipped
from sim.brief import BRIEF, Brief, shared_out
from sim.compare import conclude
from sim.config import Change, Scenario, load_scenario
from sim.costs import load_calibration
from sim.kernels import compile_all
from sim.runs import Plan, run_all, side_by_side
from sim.told import Told

WIDTH = 80  # columns, where the output is no terminal


def compare(
    scenario: Annotated[
        str | None, typer.Argument(help="A YAML file, or tp4_layerwise, model_8k or conversation_trace.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Prompts on this model: llama-3.1-70b, deepseek-v3, ...")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallelism: ranks with an engine each.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TOKENS", help="Length of a prompt: 12500, 8k (8,192).")] = None,
    page: Annotated[int | None, typer.Option(min=1, help="Tokens in a page of the KV cache.")] = None,
    nics: Annotated[
        str | None, typer.Option(metavar="NxRATE", help="NICs of the machine, shared out over the ranks: 4x400Gbps.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any key, as nic.latency=5us.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Replay this request trace (Mooncake JSONL).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the first replication.")] = None,
    replications: Annotated[
        int | None, typer.Option(min=1, help="Repeats under other seeds; default: as many as it takes.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Simulations side by side; default: one a core.")] = None,
    results: Annotated[Path, typer.Option(help="Folder for result.json, summary.md and the chart.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compare slice stores and reclaim policies on one scenario: where should finished slices be deleted?

    Without a scenario, --model and the options beside it change model_8k: 8 requests of half-cached prompts.

    Examples:

    \b
      mooncache compare tp4_layerwise
      mooncache compare tp4_layerwise --set nic.rate=200Gbps
      mooncache compare --model llama-3.1-70b --tp 4 --prompt 8k --nics 4x400Gbps
      mooncache compare conversation_trace --trace conversation_trace.jsonl
      mooncache compare my.yaml --json
    """
    path = shipped.find(scenario or BRIEF)
    asked_for: list[str | Change] = [*Brief(model, tp, prompt, page).changes(alone=scenario is None)]
    if nics is not None:
        asked_for += shared_out(nics, load_scenario(path, asked_for).workload.ranks)
    asked_for += changes or ()
    if seed is not None:
        asked_for.append(Change(f"--seed {seed}", "seed", seed))
    if replications is not None:
        asked_for.append(Change(f"--replications {replications}", "replications", replications))
    asked = load_scenario(path, asked_for)
    if trace is not None:
        kind = asked.workload.kind
        if kind != "trace":
            raise UsageError(
                f"{path}: --trace needs a scenario whose workload.kind is trace, this one is a {kind}; "
                "conversation_trace is one"
            )
        asked = load_scenario(path, [*asked_for, Change(f"--trace {trace}", "workload.path", str(trace.resolve()))])
    _answer(asked, processes, results, as_json)


def demo(
    results: Annotated[Path, typer.Option(help="Folder for result.json, summary.md and the chart.")] = Path("results"),
) -> None:
    """Reproduce the incident and explain it, as `compare tp4_layerwise` does."""
    _answer(load_scenario(shipped.find("tp4_layerwise")), None, results, False)


def _answer(asked: Scenario, processes: int | None, results: Path, as_json: bool) -> None:
    """Compare, print the answer, and write the results."""
    _check_writable(results)
    load_calibration(asked.calibration)
    plan = Plan(asked)
    started = time.perf_counter()
    with side_by_side(processes) as mapped, Told(quiet=as_json) as told:
        compile_all(mapped, lambda done, all_: told.say("compiling kernels, once, for a minute or so", done, all_))
        compiled = time.perf_counter()
        for run in run_all(plan, mapped):
            told.say("simulating", sum(map(len, plan.runs.values())), plan.known, run.job.pair.replace("/", " + "))
    seconds = time.perf_counter() - compiled
    found = conclude(asked, [run for runs in plan.runs.values() for run in runs])
    speed = found.slices / seconds
    manifest = {
        "slices_per_second": round(speed),
        "seconds": round(seconds, 3),
        "compile_seconds": round(compiled - started, 3),
        "slices_simulated": found.simulated,
    }
    folder = report.write(found, results, manifest)
    if as_json:
        typer.echo(json.dumps({**found.result, "slices_per_second": round(speed)}))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    report.print_table(found, console)
    one_by_one = f"{found.slices:,} slices in {seconds:.1f} s, {found.simulated:,} of them simulated one by one"
    console.print(
        f"\n[dim]{one_by_one}.[/dim]\nWritten: {folder}/summary.md and chart.png", highlight=False, soft_wrap=True
    )


def _check_writable(folder: Path) -> None:
    """Refuse a folder that results cannot be written to, before the work; leaves nothing behind."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"--results {folder}: expected a folder that can be written to, came {error}") from None


def calibrate(
    output: Annotated[Path, typer.Option(help="File to write; name it as `calibration:` in a scenario.")] = Path(
        "calibration.json"
    ),
    name: Annotated[str, typer.Option(help="How reports call it.")] = "this machine",
) -> None:
    """Measure what the engine's work costs on this machine, for the simulation."""
    from sim.calibrate import calibrate as measure

    console = Console(stderr=True)
    jit.prewarm()
    calibration = measure(name, lambda part: console.print(f"measuring: {part}"))
    output.write_text(calibration.model_dump_json(indent=1) + "\n")
    console.print(f"wrote {output}", highlight=False)
