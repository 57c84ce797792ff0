"""The checks of `mooncache doctor`: one file a subject, in the order of the report."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from mooncache.cli.checks import (
    cache,
    clock,
    cpu,
    engines,
    files,
    gpu,
    memory,
    names,
    numa,
    processes,
    rdma,
    sockets,
    system,
)
from mooncache.cli.checks.base import ROOT, Finding, attempt
from mooncache.kernels import jit


def examine(need: str, root: Path = ROOT) -> list[Finding]:
    """Run all checks; return their findings about this machine.

    Args:
        need: auto, tcp, shm or rdma: the wire that has to work, whose lack is an error.
        root: where /sys, /proc and /dev are.
    """
    allowed = os.sched_getaffinity(0)
    ports, no_ports = attempt("rdma", lambda: rdma.found_ports(root))
    gpus, no_gpus = attempt("gpu", lambda: gpu.gpus(root))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return [
        *system.system(root),
        *system.python(),
        *cache.cache(jit.place(), jit.cold()),
        *cpu.cores(allowed, root),
        *cpu.frequency(allowed, root),
        *numa.numa(allowed, {port.device: port.numa for port in ports}, {each.name: each.node for each in gpus}, root),
        *clock.clock(clock.read_ns(), root),
        *files.descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        *memory.locked(need, locked, root),
        *memory.huge(root),
        *memory.shareable(need),
        *processes.process_memory(root=root),
        *sockets.sockets(root),
        *(no_ports or rdma.ports(need, ports, root)),
        *rdma.access(need, ports, root),
        *rdma.library(need, ports),
        *(no_gpus or gpu.peer_memory(gpus, root)),
        *names.names(),
        *engines.engines(root),
    ]
