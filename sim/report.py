"""What a comparison looks like: a table in the terminal, and a folder with result.json, summary.md and a chart."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sim.compare import Comparison, PolicyResult

COLUMNS = (
    ("store + policy", "which kind of slice, and where it is deleted"),
    ("added ms", "to a response, against leak on the same store; 95 % interval over replications"),
    ("stall ms p50", "from a layer computed to its last slice arrived, median"),
    ("stall ms p99", "the same, 99th percentile"),
    ("worker ns/slice", "busy time of the transfer worker"),
    ("of it freeing", "share of that spent on deletion"),
    ("close us", "caller's time in close, mean"),
    ("slices alive", "most in one rank"),
    ("slices leaked", "never freed, in one replication"),
)


def _count(n: int) -> str:
    """A count in four characters or so."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def _interval(mean: float, half_width: float | None) -> str:
    return f"{mean:,.1f}" if half_width is None else f"{mean:,.1f} ±{half_width:,.1f}"


def row(policy: PolicyResult) -> list[str]:
    """One line of the table, as text."""
    return [
        f"{policy.store} + {policy.policy}",
        _interval(policy.added_ms_mean, policy.added_ms_ci95),
        f"{policy.stall_us_p50 / 1000:,.2f}",
        f"{policy.stall_us_p99 / 1000:,.2f}",
        f"{policy.worker_ns_per_slice:,.1f}",
        f"{policy.worker_free_share:.0%}",
        f"{policy.close_us_mean:,.1f}",
        _count(policy.pool_high_water_slices),
        _count(policy.leaked_slices) if policy.leaked_slices else "-",
    ]


def print_table(comparison: Comparison, console: Console) -> None:
    """The table, the notes and the verdict."""
    scenario = comparison.scenario
    title = scenario.description or scenario.name
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, (heading, _) in enumerate(COLUMNS):
        words = heading.rsplit(" ", 1) if index else [heading]
        table.add_column("\n".join(words), justify="right" if index else "left", no_wrap=True)
    worst = max(policy.added_ms_mean for policy in comparison.policies)
    for policy in comparison.policies:
        bad = policy.added_ms_mean > 1 and policy.added_ms_mean > worst / 2
        table.add_row(*row(policy), style="red" if bad else "")
    console.print(table)
    for note in comparison.notes:
        console.print(f"[dim]- {note}[/dim]", highlight=False)
    console.print(f"\n[bold]{comparison.verdict}[/bold]", highlight=False)


def ratio(policy: PolicyResult) -> str:
    """Response time as a multiple of pool + bulk's, paired by replication, with its interval and p value."""
    if policy.response_ratio is None:
        return "-"
    if policy.response_ratio_ci95 is None or policy.response_p_value is None:
        return f"{policy.response_ratio:.3f}"
    low, high = policy.response_ratio_ci95
    return f"{policy.response_ratio:.3f} ({low:.3f} to {high:.3f}; p = {policy.response_p_value:.2g})"


def markdown(comparison: Comparison) -> str:
    """summary.md."""
    titles = [*(title for title, _ in COLUMNS), "response ratio"]
    lines = [
        f"# {comparison.scenario.name}",
        "",
        comparison.scenario.description,
        "",
        f"**{comparison.verdict}**",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *("| " + " | ".join([*row(policy), ratio(policy)]) + " |" for policy in comparison.policies),
        "",
        *(f"- {title}: {meaning}" for title, meaning in COLUMNS[1:]),
        "- response ratio: mean response time as a multiple of pool + bulk's, paired by replication; 95 % interval, "
        "and p value corrected for the number of pairs (Holm)",
        *(f"- {note}" for note in comparison.notes),
        f"- seed {comparison.scenario.seed}, {comparison.scenario.replications} replications, "
        f"{comparison.slices:,} slices simulated ({comparison.scenario.mode} mode)",
        "",
        "![added response time by store and policy](chart.png)",
        "",
    ]
    return "\n".join(lines)


def chart(policies: Sequence[PolicyResult], path: Path, title: str) -> None:
    """Two bar charts: added response time, and the worker's time per slice by cause."""
    import matplotlib as mpl

    with mpl.rc_context({"backend": "agg"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes stand for what this machine cannot draw
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 0.32 * len(policies) + 1.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        names = [f"{p.store} + {p.policy}" for p in policies]
        colours = ["#c44e52" if p.store == "heap" else "#4c72b0" for p in policies]
        left.barh(names, [p.added_ms_mean for p in policies], color=colours,
                  xerr=[p.added_ms_ci95 or 0 for p in policies])  # fmt: skip
        left.set_xlabel("added to a response, ms")
        left.invert_yaxis()
        freeing = [p.worker_ns_per_slice * p.worker_free_share for p in policies]
        other = [p.worker_ns_per_slice - f for p, f in zip(policies, freeing, strict=True)]
        right.barh(names, other, color="#8c8c8c", label="post, poll, complete")
        right.barh(names, freeing, left=other, color="#dd8452", label="freeing")
        right.set_xlabel("worker time per slice, ns")
        right.legend(loc="lower right")
        figure.suptitle(title)
        figure.savefig(path, dpi=120, metadata={"Software": None})


def write(comparison: Comparison, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write the run's folder; returns it. result.json depends on the question alone, manifest.json on the run."""
    target = folder / comparison.run_name
    target.mkdir(parents=True, exist_ok=True)
    for name, content in (("result.json", comparison.result), ("manifest.json", manifest)):
        (target / name).write_text(json.dumps(content, indent=2) + "\n")
    (target / "summary.md").write_text(markdown(comparison))
    chart(comparison.policies, target / "chart.png", comparison.scenario.description or comparison.scenario.name)
    return target
