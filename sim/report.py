"""The output of a comparison: verdict and table in the terminal, and a folder with result.json, summary and chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sim.chart import draw
from sim.compare import Comparison, PolicyResult
from sim.figures import count, figure, interval

COLUMNS = (
    ("store + policy", "which kind of slice, and where it is deleted"),
    ("resp. ms", "from a request's arrival to its first token, mean"),
    ("added ms", "to that, against the same request under pool + leak; with the 95 % interval over replications"),
    ("leak ms", "what leak on the same store adds: on the heap it pays for fresh memory instead of freeing"),
    ("stall p50 ms", "from a layer computed to its last slice arrived on the slowest rank, median"),
    ("stall p99 ms", "the same, 99th percentile"),
    ("worker ns/ slice", "busy time of the transfer worker"),
    ("of it frees", "share of that spent on deletion"),
    ("close us", "caller's time in close, mean"),
    ("most alive", "slices in one rank"),
)


def row(policy: PolicyResult) -> list[str]:
    """Format one line of the table."""
    return [
        policy.name,
        figure(policy.response_ms_mean),
        interval(policy.added_ms_mean, policy.added_ms_ci95),
        figure(policy.leak_ms_mean, 1),
        figure(policy.stall_us_p50 / 1000),
        figure(policy.stall_us_p99 / 1000),
        figure(policy.worker_ns_per_slice),
        f"{policy.worker_free_share:.0%}",
        figure(policy.close_us_mean),
        count(policy.pool_high_water_slices),
    ]


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the verdict, the warnings, the table, and what its columns mean."""
    console.print(f"[bold]{comparison.verdict}[/bold]", highlight=False)
    for warning in comparison.warnings:
        console.print(f"[yellow]Beware: {warning}.[/yellow]", highlight=False)
    table = Table(title=f"\n{comparison.title}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for index, (heading, _) in enumerate(COLUMNS):
        words = heading.split(" ") if index else [heading]
        table.add_column("\n".join(words), justify="right" if index else "left", vertical="bottom", no_wrap=True)
    worst = max(policy.added_ms_mean for policy in comparison.policies)
    for policy in comparison.policies:
        bad = policy.added_ms_mean > 1 and policy.added_ms_mean > worst / 2
        table.add_row(*row(policy), style="red" if bad else "")
    console.print(table)
    legend = "; ".join(f"[not dim]{heading}[/]: {meaning}" for heading, meaning in COLUMNS[1:])
    console.print(f"\n[dim]{legend}.[/dim]", highlight=False)
    for note in comparison.notes:
        console.print(f"[dim]- {note}[/dim]", highlight=False)


def ratio(policy: PolicyResult) -> str:
    """Format response time as a multiple of pool + bulk's, paired by replication, with its interval and p value."""
    if policy.response_ratio is None:
        return "-"
    if policy.response_ratio_ci95 is None or policy.response_p_value is None:
        return f"{policy.response_ratio:.3f}"
    low, high = policy.response_ratio_ci95
    return f"{policy.response_ratio:.3f} ({low:.3f} to {high:.3f}; p = {policy.response_p_value:.2g})"


def markdown(comparison: Comparison) -> str:
    """Return the text of summary.md."""
    titles = [*(title for title, _ in COLUMNS), "leaked", "response ratio", "replications"]
    lines = [
        f"# {comparison.scenario.name}",
        "",
        f"**{comparison.verdict}**",
        "",
        *(f"- Beware: {warning}." for warning in comparison.warnings),
        "",
        f"{comparison.title}.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *(
            "| " + " | ".join([*row(p), count(p.leaked_slices), ratio(p), str(p.replications)]) + " |"
            for p in comparison.policies
        ),
        "",
        *(f"- {title}: {meaning}" for title, meaning in COLUMNS[1:]),
        "- leaked: slices never freed, of all ranks, in one replication",
        "- response ratio: mean response time as a multiple of pool + bulk's, paired by replication; 95 % interval, "
        "and p value corrected for the number of pairs (Holm)",
        *(f"- {note}" for note in comparison.notes),
        f"- seed {comparison.scenario.seed}, {comparison.slices:,} slices ({comparison.scenario.mode} mode)",
        "",
        "![added response time and worker time by store and policy, and stall by layer](chart.png)",
        "",
    ]
    return "\n".join(lines)


def write(comparison: Comparison, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write the run's folder; return it. result.json depends on the question alone, manifest.json on the run."""
    target = folder / comparison.run_name
    target.mkdir(parents=True, exist_ok=True)
    for name, content in (("result.json", comparison.result), ("manifest.json", manifest)):
        (target / name).write_text(json.dumps(content, indent=2) + "\n")
    (target / "summary.md").write_text(markdown(comparison))
    draw(comparison, target / "chart.png")
    return target
