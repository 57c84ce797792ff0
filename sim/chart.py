"""The picture of a comparison: what each pair adds, how its worker spends its time, and how stalls build up."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sim.compare import Comparison
from sim.figures import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"heap": "#c44e52", "pool": "#4c72b0"}
POSTS, FREES = "#8c8c8c", "#dd8452"
LINES = ("solid", "dashed", "dotted", "dashdot")
ALIKE = 0.1  # stalls this close are one line of the picture


def draw(comparison: Comparison, path: Path) -> None:
    """Write the picture to a PNG file."""
    import matplotlib as mpl

    with mpl.rc_context({"backend": "agg"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes stand for what this machine cannot draw
        from matplotlib.figure import Figure

        rows = len(comparison.policies)
        figure = Figure(figsize=(11, 0.32 * rows + 5.2), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(0.32 * rows + 1.2, 3))
        left = figure.add_subplot(grid[0, 0])
        _added(comparison, left)
        _worker(comparison, figure.add_subplot(grid[0, 1], sharey=left))
        _stalls(comparison, figure.add_subplot(grid[1, :]))
        figure.suptitle("\n".join(textwrap.wrap(comparison.title, 110)), fontsize="medium")
        figure.savefig(path, dpi=120, metadata={"Software": None})


def _added(comparison: Comparison, axes: Axes) -> None:
    policies = comparison.policies
    bars = axes.barh(
        [p.name for p in policies],
        [p.added_ms_mean for p in policies],
        color=[COLOURS[p.store] for p in policies],
        xerr=[p.added_ms_ci95 or 0 for p in policies],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    labels = [interval(p.added_ms_mean, p.added_ms_ci95) for p in policies]
    axes.bar_label(bars, labels, padding=6, fontsize="small")
    axes.margins(x=0.35)
    axes.invert_yaxis()
    axes.set_xlabel("added to a response, ms, against pool + leak (95 % interval)")


def _worker(comparison: Comparison, axes: Axes) -> None:
    policies = comparison.policies
    names = [p.name for p in policies]
    freeing = np.array([p.worker_ns_per_slice * p.worker_free_share for p in policies])
    total = np.array([p.worker_ns_per_slice for p in policies])
    axes.barh(names, total - freeing, color=POSTS, label="post, poll, complete")
    bars = axes.barh(names, freeing, left=total - freeing, color=FREES, label="free")
    axes.bar_label(bars, [f"{ns:,.0f}" for ns in total], padding=4, fontsize="small")
    budget = comparison.budget_ns_per_slice
    axes.axvline(budget, color="black", linestyle=":", label=f"{budget:,.0f} ns: a slice's\nshare of compute")
    axes.margins(x=0.15)
    axes.tick_params(labelleft=False)
    axes.set_xlabel("worker time for a slice, ns")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")


def _stalls(comparison: Comparison, axes: Axes) -> None:
    """Draw a line for all pairs that stall alike, in the order of how long."""
    together: list[tuple[np.ndarray, list[str]]] = []
    for policy in sorted(comparison.policies, key=lambda p: -p.stall_us_p99):
        stall = comparison.stall_ms_by_layer[policy.pair]
        for other, names in together:
            if np.allclose(stall, other, rtol=ALIKE):
                names.append(policy.name)
                break
        else:
            together.append((stall, [policy.name]))
    for index, (stall, names) in enumerate(together):
        stores = {name.split(" ")[0] for name in names}
        colour = COLOURS[stores.pop()] if len(stores) == 1 else "black"
        label = ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
        axes.plot(range(1, len(stall) + 1), stall, color=colour, linestyle=LINES[index % len(LINES)], label=label,
                  marker="." if len(stall) == 1 else None)  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("layer")
    axes.set_ylabel("stall, ms, mean of all requests")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
