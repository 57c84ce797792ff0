"""One process of `mooncache bench rdma`: an engine on one RDMA port, and a buffer of blocks.

    initiator   posts what is measured, times it, and counts what that took
    target      lends its memory; tells whether the right bytes came, from the sample's number alone

All samples of a size move the same PLACES blocks over and over, so that they stay in the processor's cache at both
ends, as perftest's single block does.
"""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import numpy as np

from mooncache import Engine
from mooncache.bench.harness import blocks
from mooncache.bench.harness.measure import slots_of
from mooncache.bench.harness.process import serve
from mooncache.kernels.arrays import address_of
from mooncache.segments import allocate

PLACES = 64
BATCH_CHAINS = 16  # of one batch: while it is under way the next is submitted, as layers are
TIMEOUT = 18  # a second, for perftest as well: an emulated guest may stand still for longer than the usual 67 ms
PATIENCE_S = 60.0
COUNTED = ("work_requests", "doorbells", "completions", "completed", "polls", "failed", "retried", "stale")


class Side:
    """One end: an engine on one port and its blocks. The initiator is told where the target's buffer lies."""

    def __init__(
        self, role: str, *, port: str, gid_index: int, depth: int, signal: int, block: int, slices: int,
        target: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        from mooncache.providers.rdma.provider import Rdma  # the bench itself needs neither it nor its libraries

        # One queue pair, as perftest: it is the engine that is compared, not how many queues a NIC likes.
        provider = Rdma([port], gid_index=gid_index, queue_pairs=1, signal=signal, timeout=TIMEOUT)
        self.engine = Engine(f"bench-{role}-{os.getpid()}", provider=provider, queue_depth=depth, slices=slices)
        self.role, self.target, self.nic = role, target, provider.ends[0]
        self.buffer = allocate(blocks.span(PLACES, block))
        self.engine.register(self.buffer)
        if target is not None:
            self.peer = self.engine.connect(target["address"])

    def found(self) -> dict[str, Any]:
        """Return the addresses and port settings that the other side, or the bench, has to know of this one."""
        base = address_of(self.buffer)
        return {"address": self.engine.address, "base": base, "mtu": self.nic.mtu, "rd_atomic": self.nic.rd_atomic}

    def _addresses(self, n: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the first n blocks lie here and at the target: int64[n] each."""
        here, there = blocks.places(PLACES, block)
        base = self.target["base"] if self.target is not None else address_of(self.buffer)
        local = here if self.role == "initiator" else there
        return address_of(self.buffer) + local[:n], base + there[:n]

    def fill(self, seed: int, block: int, places: int) -> None:
        """Write the bytes of sample `seed`."""
        addresses, _ = self._addresses(places, block)
        blocks.fill(address_of(addresses), places, block, seed)

    def count_wrong(self, seed: int, block: int, places: int) -> int:
        """Count the blocks here that do not hold the bytes of sample `seed`."""
        addresses, _ = self._addresses(places, block)
        return int(blocks.count_wrong(address_of(addresses), places, block, seed))

    # -------------------------------------------------------------------------- samples
    def stream(self, op: str, block: int, iterations: int, batch: int) -> dict[str, Any]:
        """Move so many blocks, in batches that are all submitted before the first is waited for."""
        local, remote = self._addresses(min(PLACES, iterations), block)
        rounds = -(-iterations // local.size)
        ends = (local, remote) if op == "write" else (remote, local)
        first, second = (np.tile(end, rounds)[:iterations] for end in ends)
        parts = [(first[at : at + batch], second[at : at + batch]) for at in range(0, iterations, batch)]
        move = self.engine.write if op == "write" else self.engine.read
        before = self.engine.stats().counts
        begin = time.monotonic_ns()
        batches = [move(self.peer, *part, block) for part in parts]
        for one in batches:
            one.wait(PATIENCE_S)
        took = time.monotonic_ns() - begin
        after = self.engine.stats().counts
        for one in batches:
            one.close()
        return {"ns": took, "counts": {kind: after[kind] - before[kind] for kind in COUNTED}}

    def each(self, block: int, operations: int) -> list[int]:
        """Write blocks one at a time, each waited for; return how long each took, ns."""
        ends = [[int(a) for a in end] for end in self._addresses(min(PLACES, operations), block)]
        turns = list(zip(*ends, strict=True))
        took = []
        for number in range(operations):
            here, there = turns[number % len(turns)]
            begin = time.monotonic_ns()
            one = self.engine.write(self.peer, here, there, block)
            one.wait(PATIENCE_S)
            took.append(time.monotonic_ns() - begin)
            one.close()
        return took

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


def slices_of(iterations: int, batch: int) -> int:
    """Return how many slots the batches of one sample occupy together."""
    return -(-iterations // batch) * slots_of(batch)


# ------------------------------------------------------------------------------ commands
_sides: dict[str, Side] = {}


def open_side(role: str, **how: Any) -> dict[str, Any]:
    """Make a side; return what the other process, or the bench, has to know of it."""
    side = _sides[role] = Side(role, **how)
    return side.found()


def close(role: str) -> None:
    """Close a side."""
    _sides.pop(role).close()


HANDLERS: dict[str, Any] = {
    "open": open_side,
    "close": close,
    "fill": lambda role, **how: _sides[role].fill(**how),
    "count_wrong": lambda role, **how: _sides[role].count_wrong(**how),
    "stream": lambda role, **how: _sides[role].stream(**how),
    "each": lambda role, **how: _sides[role].each(**how),
}


def main() -> None:
    """Answer commands until stdin ends."""
    gc.disable()
    serve(HANDLERS)
