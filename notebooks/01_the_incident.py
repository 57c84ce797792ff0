# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The incident
#
# A 70B model on four accelerators sends its KV cache to a decode machine layer by layer, while it computes. Pages of
# one token and K and V apart make 25,000 slices of 512 bytes a layer and rank, one RDMA work request each. A memory
# leak was fixed by deleting each slice in the worker that polls completions, and every response became about half a
# second slower.
#
# This notebook reproduces that, shows by which mechanism it happens, and what it takes to make it go away.

# %% tags=["parameters"]
SCENARIO = "configs/tp4_layerwise.yaml"
FAST = False  # a tenth of the layers, one replication: for checking that the notebook runs
OVERRIDES: list[str] = []

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from sim.compare import conclude
from sim.config import load_scenario
from sim.costs import load_calibration, prices
from sim.runs import Job, Plan, run_all, simulate

root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / SCENARIO).exists())
small = ["workload.layers=8", "replications=2", "workload.requests=2"] if FAST else []
scenario = load_scenario(root / SCENARIO, [*small, *OVERRIDES])
calibration = load_calibration(scenario.calibration)
print(scenario.description)
print(f"CPU costs: {calibration.name}, measured {calibration.measured} on {calibration.machine.cpu}")

# %% [markdown]
# ## What one slice costs
#
# The prices below were measured with the engine's own kernels and the real malloc. Without deletion a worker spends a
# few nanoseconds a slice. An object freed in the thread that allocated it costs a little more; one freed in *another*
# thread while the first goes on allocating fights for the arena's lock, and for cache lines that the other core touched
# last.

# %%
slices = scenario.workload.slices
tables = {
    "post": "work_request",
    "complete": "completion",
    "free, pool": "free_slice",
    "free, heap,\nsame thread": "free_same",
    "free, heap,\nother thread": "free_contended",
}
cost = {label: calibration.ns(table, slices) for label, table in tables.items()}
figure, axes = plt.subplots(figsize=(8, 3))
axes.bar(list(cost), list(cost.values()), color=["#8c8c8c", "#8c8c8c", "#4c72b0", "#c44e52", "#c44e52"])
axes.set_ylabel("ns a slice")
axes.set_title("What the worker pays")
plt.show()

# %% [markdown]
# A layer of 25,000 slices keeps the worker busy for the sum of its costs. The next layer is computed in
# `prefill.layer_time`. As long as the first is smaller, transfers hide behind compute. Deletion in the worker pushes it
# over.

# %%
layer_ms = scenario.prefill.layer_time / 1e9
without = slices * (cost["post"] + cost["complete"]) / 1e6
inline = without + slices * cost["free, heap,\nother thread"] / 1e6
print(f"a layer is computed in {layer_ms:.1f} ms")
print(f"the worker needs {without:.2f} ms for it, and {inline:.2f} ms when it also frees")

# %% [markdown]
# ## All stores and policies
#
# Same requests, same jitter, 14 pairs of slice store and reclaim policy.

# %%
runs = list(run_all(Plan(scenario)))
found = conclude(scenario, runs)
print(found.verdict)
by_name = {p.name: p for p in found.policies}
figure, axes = plt.subplots(figsize=(8, 4.5))
names = list(by_name)
added, error = zip(*((p.added_ms_mean, p.added_ms_ci95 or 0) for p in by_name.values()), strict=True)
axes.barh(names, added, xerr=error)
axes.invert_yaxis()
axes.set_xlabel("added to a response, ms (against pool + leak)")
plt.show()

# %% [markdown]
# ## How the delay builds up
#
# Stall is the time from a layer being computed to its last slice having arrived. With deletion in the worker each layer
# adds the difference between the worker's time and the layer's; with the pool every layer is sent long before the next
# one is ready.

# %%
figure, axes = plt.subplots(figsize=(8, 3.5))
for name in ("heap + inline", "heap + thread_cache", "pool + bulk"):
    axes.plot(simulate(Job(scenario, by_name[name].pair, 0)).stall[0] / 1e9, label=name)
axes.set_xlabel("layer")
axes.set_ylabel("stall, ms")
axes.legend()
plt.show()

# %% [markdown]
# ## Where the worker's time goes

# %%
figure, axes = plt.subplots(figsize=(8, 4.5))
freeing = np.array([p.worker_ns_per_slice * p.worker_free_share for p in by_name.values()])
rest = np.array([p.worker_ns_per_slice for p in by_name.values()]) - freeing
axes.barh(names, rest, color="#8c8c8c", label="post, poll, complete")
axes.barh(names, freeing, left=rest, color="#dd8452", label="freeing")
axes.axvline(
    scenario.prefill.layer_time / 1e3 / slices, color="black", linestyle=":", label="what a layer's compute leaves"
)
axes.invert_yaxis()
axes.set_xlabel("worker time per slice, ns")
axes.legend()
plt.show()

# %% [markdown]
# ## What holds whatever the figures

# %%
bulk, worst = by_name["pool + bulk"], by_name["heap + inline"]
assert by_name["heap + leak"].added_ms_mean > by_name["pool + leak"].added_ms_mean == 0
assert all(p.leaked_slices == 0 for p in found.policies if p.policy != "leak")
assert by_name["pool + leak"].leaked_slices == runs[0].slices
assert worst.worker_free_share > 0.5 > bulk.worker_free_share
assert worst.worker_ns_per_slice > 5 * bulk.worker_ns_per_slice
assert worst.response_ms_mean > bulk.response_ms_mean
assert prices(calibration, scenario, "leak", slices).each.min() >= 0
