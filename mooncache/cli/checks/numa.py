"""NUMA nodes: the nodes of NICs, of GPUs and of this process's cores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mooncache.cli.checks.base import ROOT, Finding, check, listed
from mooncache.cores import cpus_of

FAR = "bytes and doorbells cross the link between the nodes"


@check("numa")
def numa(allowed: set[int], nics: Mapping[str, int], gpus: Mapping[str, int], root: Path = ROOT) -> Iterator[Finding]:
    """Check whether NICs, GPUs and cores that work together are on one node.

    Args:
        allowed: the cores that this process may use.
        nics: RDMA devices, and gpus: GPUs, each with its node, -1 where it is not known.
    """
    nodes = root / "sys/devices/system/node"
    numbers = sorted(cpus_of(nodes / "online"))
    cores = {node: cpus_of(nodes / f"node{node}/cpulist") for node in numbers}
    if len(numbers) < 2:
        yield Finding("numa", "ok", "one node: everything is near" if numbers else "this kernel knows no nodes")
        return
    own = [node for node in numbers if cores[node] & allowed]
    parts = [f"{name} on {node_name(node)}" for name, node in {**nics, **gpus}.items()]
    yield Finding("numa", "ok", "; ".join([f"{len(numbers)} nodes", f"cores of {nodes_named(own)}", *parts]))
    for name, node in nics.items():
        if node in cores and node not in own:
            text = f"{name} is on node {node}, but this process may use cores of {nodes_named(own)} only: {FAR}"
            yield Finding("numa", "warning", text, f"shell: numactl --cpunodebind={node} --membind={node} COMMAND")
    for name, node in gpus.items():
        if node in cores and nics and node not in nics.values():
            yield Finding("numa", "warning", f"{name} is on node {node}, where no RDMA device is: {FAR}")


def node_name(node: int) -> str:
    """Format a node for a sentence."""
    return f"node {node}" if node >= 0 else "an unknown node"


def nodes_named(nodes: list[int]) -> str:
    """Format several nodes for a sentence."""
    return f"node{'s' if len(nodes) > 1 else ''} {listed([str(node) for node in nodes])}"
