"""One process of a transfer bench: half of a pair, or both halves where the wire stays within a process.

    initiator   its wire, a buffer of blocks, its half of the reference; times what it does
    target      likewise, at the other end; tells whether the right bytes came, from the sample's number alone

The reference moves the same blocks in the same order between the same buffers: by plain sockets, or by copies, where
the target's memory can be mapped by the initiator.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from typing import Any

import numpy as np

from mooncache.bench.harness import blocks, sockets
from mooncache.bench.harness.measure import descriptors, resident_bytes
from mooncache.bench.harness.process import serve
from mooncache.bench.harness.wires import Case, Plan, open_wire
from mooncache.errors import UsageError
from mooncache.kernels.arrays import address_of
from mooncache.segments import allocate

QUIET_POINTS = 100  # looks at both processes' memory and descriptors over the layers of a sample


# ------------------------------------------------------------------------------ the reference's two halves
class PlainSockets:
    """One TCP connection between the same pages that the wire moves."""

    def __init__(self, side: Side) -> None:
        self.blocks = sockets.Blocks(side.buffer, side.offsets, side.case.block)
        self.initiates = side.target is not None
        self.sends = self.initiates == (side.case.op == "write")
        self.listener = None if side.target else sockets.listening()
        self.socket = sockets.connected(side.target["reference"]) if side.target else None

    @property
    def place(self) -> int:
        """The target's port."""
        assert self.listener is not None
        return int(self.listener.getsockname()[1])

    def move(self) -> None:
        """Do this side's part of one batch; the initiator waits until all of it has arrived."""
        self.blocks.exchange(self._connected(), self.sends, self.initiates)

    def move_one(self, at: int) -> None:
        """Do this side's part of moving one block."""
        self.blocks.exchange(self._connected(), self.sends, self.initiates, at)

    def _connected(self) -> socket.socket:
        if self.socket is None:
            assert self.listener is not None
            self.socket = self.listener.accept()[0]
        return self.socket

    def close(self) -> None:
        """Close both sockets."""
        for plain in (self.socket, self.listener):
            if plain is not None:
                plain.close()


class PlainCopy:
    """Threads of the initiator, as many as the wire has workers, that copy from or into the target's mapped memory.

    They copy in the way that is fastest for these blocks on this machine.
    """

    def __init__(self, side: Side) -> None:
        self.place = blocks.place_of(side.buffer)
        self.mapped: blocks.Mapped | None = None
        if side.target is not None:
            self.mapped = blocks.Mapped(side.target["reference"], side.buffer.nbytes)
            ends = side.addresses, self.mapped.address + side.offsets_of_target
            targets, sources = ends if side.case.op == "read" else ends[::-1]
            self.copying = blocks.Copying(targets, sources, side.case.block, side.case.workers)

    def move(self) -> None:
        """Copy one batch."""
        self.copying.copy()

    def move_one(self, at: int) -> None:
        """Copy one block."""
        raise UsageError("single operations are compared with a ping-pong over sockets")

    def close(self) -> None:
        """Unmap the target's memory."""
        if self.mapped is not None:
            self.copying.close()
            self.mapped.close()


REFERENCES: dict[str, type[PlainSockets] | type[PlainCopy]] = {"plain socket": PlainSockets, "plain copy": PlainCopy}


# ------------------------------------------------------------------------------ one side
class Side:
    """Half a pair: its end of the wire, its buffer, and its half of the reference.

    `target` is what the initiator has been told of the target, None there. Memory is ordinary for TCP, else such as
    another process can map.
    """

    def __init__(self, role: str, case: Case, reference: str, target: dict[str, Any] | None = None) -> None:
        self.role, self.case, self.target = role, case, target
        self.moved_batches = self.moved_blocks = 0
        own, self.offsets_of_target = blocks.places(case.slices, case.block)
        self.offsets = own if role == "initiator" else self.offsets_of_target
        size = blocks.span(case.slices, case.block)
        self.buffer = np.empty(size, np.uint8) if case.transport == "tcp" else allocate(size)
        self.addresses = address_of(self.buffer) + self.offsets
        self.wire = open_wire(case, role)
        self.wire.register(self.buffer)
        if target is not None:
            self.wire.connect(target["address"])
            self.wire.plan(case.op, Plan(self.addresses, target["base"] + self.offsets_of_target, case.block))
        self.reference = REFERENCES[reference](self)

    def found(self) -> dict[str, Any]:
        """Return the addresses and the port that the initiator has to know of this target."""
        base, place = address_of(self.buffer), self.reference.place
        return {"address": self.wire.address, "base": base, "reference": place, "pid": os.getpid()}

    def fill(self, seed: int) -> None:
        """Write the bytes of sample `seed`."""
        blocks.fill(address_of(self.addresses), self.addresses.size, self.case.block, seed)

    def count_wrong(self, seed: int) -> int:
        """Count the blocks here that do not hold the bytes of sample `seed`."""
        return int(blocks.count_wrong(address_of(self.addresses), self.addresses.size, self.case.block, seed))

    # -------------------------------------------------------------------------- samples
    def transfer(self, start: int) -> dict[str, Any]:
        """Move the sample over the wire from monotonic time `start` on; return when that began and ended, ns."""
        looks = []
        period = max(1, self.case.layers // QUIET_POINTS)
        begin = wait_until(start)
        for layer in range(1, self.case.layers + 1):
            self.wire.transfer()
            end = time.monotonic_ns()
            self.wire.release()
            if self.case.layers > 1 and layer % period == 0:
                looks.append(self._look())
        self.moved_batches += self.case.layers
        self.moved_blocks += self.case.layers * self.case.slices
        return {"begin": begin, "end": end, "looks": looks}

    def _look(self) -> list[int]:
        """Return resident bytes and open descriptors of the initiator, then of the target."""
        assert self.target is not None
        return [
            figure for pid in (os.getpid(), self.target["pid"]) for figure in (resident_bytes(pid), descriptors(pid))
        ]

    def refer(self, start: int) -> dict[str, Any]:
        """Move the sample by the reference; return when that began and ended, ns. Only the initiator's times count."""
        begin = wait_until(start)
        for _ in range(self.case.layers):
            self.reference.move()
        return {"begin": begin, "end": time.monotonic_ns()}

    # -------------------------------------------------------------------------- one at a time
    def each(self, what: str, count: int, start: int, core: int) -> list[int]:
        """Move blocks one at a time, each waited for; return how long each took, ns.

        This thread stays on one core meanwhile. The engine's threads, started before, run where Linux likes.
        """
        wire, n, took = what == "wire", self.case.slices, []
        move = self.wire.transfer_one if wire else self.reference.move_one
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})
        wait_until(start)
        for number in range(count):
            begin = time.monotonic_ns()
            move(number % n)
            took.append(time.monotonic_ns() - begin)
            if wire:
                self.wire.release()
        os.sched_setaffinity(0, before)
        if wire:
            self.moved_batches += count
            self.moved_blocks += count
        return took

    # -------------------------------------------------------------------------- the end
    def check(self) -> None:
        """Raise FingerprintError unless the wire counted what it was given."""
        self.wire.check(self.moved_batches, self.moved_blocks)

    def close(self) -> None:
        """Close the wire and the reference."""
        self.wire.close()
        self.reference.close()


def wait_until(start: int) -> int:
    """Sleep until a monotonic time, ns, on which processes can agree; return the time it is then."""
    while (left := start - time.monotonic_ns()) > 0:
        time.sleep(left / 1e9)
    return time.monotonic_ns()


# ------------------------------------------------------------------------------ commands
_sides: dict[str, Side] = {}


def open_side(
    role: str, case: dict[str, Any], reference: str, target: dict[str, Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Make a side; return what the other process, or the bench, has to know of it."""
    side = _sides[role] = Side(role, Case(**case), reference, target)
    return side.found() if target is None else {"transport": side.wire.transport}


def close(role: str) -> None:
    """Close a side."""
    _sides.pop(role).close()
    gc.collect()  # an engine and its regions hold each other, and these the buffers


def main() -> None:
    """Answer commands until stdin ends."""
    gc.disable()
    serve(
        {
            "open": open_side,
            "close": close,
            "fill": lambda role, seed: _sides[role].fill(seed),
            "count_wrong": lambda role, seed: _sides[role].count_wrong(seed),
            "transfer": lambda role, start: _sides[role].transfer(start),
            "refer": lambda role, start: _sides[role].refer(start),
            "each": lambda role, **how: _sides[role].each(**how),
            "check": lambda role: _sides[role].check(),
        }
    )
