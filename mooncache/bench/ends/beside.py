"""One process of `mooncache bench beside`: the near side, which is measured, or the far side."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import deque
from itertools import pairwise
from typing import Any

import numpy as np

from mooncache import Batch, Engine
from mooncache.bench.harness import blocks
from mooncache.bench.harness.measure import expect_counts, slots_of, wait_until_quiet
from mooncache.bench.harness.process import serve
from mooncache.kernels.arrays import address_of
from mooncache.segments import allocate

BLOCK = 4096
BATCHES = (1, 2, 4, 8, 64)  # slices of a write; the last is more than a submitter posts itself
STREAM_BLOCK, STREAM_BLOCKS = 1 << 16, 256
STREAM_UNDER_WAY = 2  # batches, so that the worker never waits for the next
PATIENCE_S = 60.0
SLEEP_S = 1e-3
SLEEPS = 100  # beside the stream alone, of each round


class Side:
    """An engine with one worker, the blocks of each size of batch, and the blocks of the stream."""

    def __init__(self, role: str, provider: str) -> None:
        slices = STREAM_UNDER_WAY * STREAM_BLOCKS + max(BATCHES)
        self.engine = Engine(f"beside-{role}-{os.getpid()}", provider=provider, slices=slots_of(slices) + 2048)
        make = allocate if provider == "shm" else lambda n: np.empty(n, np.uint8)
        at = "source" if role == "near" else "target"
        sizes = {"small": blocks.span(sum(BATCHES), BLOCK), "stream": blocks.span(STREAM_BLOCKS, STREAM_BLOCK)}
        self.buffers = {name: make(size) for name, size in sizes.items()}
        for buffer in self.buffers.values():
            self.engine.register(buffer)
        offsets = {"small": blocks.places(sum(BATCHES), BLOCK), "stream": blocks.places(STREAM_BLOCKS, STREAM_BLOCK)}
        ours = {name: pair[at == "target"] for name, pair in offsets.items()}
        self.addresses = {name: address_of(self.buffers[name]) + ours[name] for name in ours}
        self.batches = self.slices = 0
        self.streaming: Stream | None = None

    def place(self) -> dict[str, Any]:
        """Return the address of this engine and of its blocks, for the other side."""
        return {"address": self.engine.address, **{name: at.tolist() for name, at in self.addresses.items()}}

    def connect(self, there: dict[str, Any]) -> None:
        """Connect to the other side, and keep the addresses of its blocks."""
        self.peer = self.engine.connect(there["address"])
        self.there = {name: np.array(there[name], np.int64) for name in self.addresses}

    # ------------------------------------------------------------------------------ what moves
    def fill(self, name: str, seed: int) -> None:
        """Write the bytes of a round into the blocks `name`: small or stream."""
        at = self.addresses[name]
        blocks.fill(address_of(at), at.size, STREAM_BLOCK if name == "stream" else BLOCK, seed)

    def count_wrong(self, name: str, seed: int) -> int:
        """Count the blocks here that do not hold the bytes of the round."""
        at = self.addresses[name]
        return int(blocks.count_wrong(address_of(at), at.size, STREAM_BLOCK if name == "stream" else BLOCK, seed))

    def stream(self) -> None:
        """Begin to send the stream in a thread; return when it is under way."""
        self.streaming = Stream(self)
        self.streaming.under_way.wait(PATIENCE_S)

    def end_stream(self) -> dict[str, Any]:
        """End the stream; return its batches, bytes and seconds."""
        assert self.streaming is not None
        self.streaming.ends = True
        self.streaming.join(PATIENCE_S)
        batches = self.streaming.batches
        self.batches += batches
        self.slices += batches * STREAM_BLOCKS
        size = STREAM_BLOCKS * STREAM_BLOCK
        return {"batches": batches, "bytes": batches * size, "seconds": self.streaming.seconds}

    # ------------------------------------------------------------------------------ what is measured
    def measure(self, calls: int, seed: int) -> dict[str, Any]:
        """Time sleeps without writes, then sleeps and calls with writes of each size in turn; return both, ns."""
        self.fill("small", seed)
        without = Sleeper()
        while len(without.late) < SLEEPS:
            time.sleep(SLEEP_S)
        without.end()
        ends = np.cumsum([0, *BATCHES])
        operands = [(self.addresses["small"][a:b], self.there["small"][a:b], BLOCK) for a, b in pairwise(ends)]
        took: list[list[int]] = [[] for _ in BATCHES]
        beside = Sleeper()
        for _ in range(calls):
            for ns, ends_of in zip(took, operands, strict=True):
                begin = time.perf_counter_ns()
                batch = self.engine.write(self.peer, *ends_of)
                ns.append(time.perf_counter_ns() - begin)
                batch.wait(PATIENCE_S).close()
                time.sleep(SLEEP_S)
        beside.end()
        self.batches += calls * len(BATCHES)
        self.slices += calls * sum(BATCHES)
        return {"calls": took, "sleeps": {"without": without.late, "with": beside.late}}

    def check(self) -> None:
        """Raise FingerprintError unless the engine counted what it was given."""
        expect_counts(wait_until_quiet(self.engine), self.slices, self.batches, "pool", "bulk")


class Stream(threading.Thread):
    """A thread that sends the stream's blocks over and over."""

    def __init__(self, side: Side) -> None:
        super().__init__(daemon=True)
        self.side, self.ends, self.batches, self.seconds = side, False, 0, 0.0
        self.under_way = threading.Event()
        self.start()

    def run(self) -> None:
        """Send until `ends` is set."""
        side, begin = self.side, time.monotonic()
        operands = side.addresses["stream"], side.there["stream"], STREAM_BLOCK
        running: deque[Batch] = deque()
        while not self.ends or running:
            while len(running) < STREAM_UNDER_WAY and not self.ends:
                running.append(side.engine.write(side.peer, *operands))
            running.popleft().wait(PATIENCE_S).close()
            self.batches += 1
            self.under_way.set()
        self.seconds = time.monotonic() - begin


class Sleeper(threading.Thread):
    """A second Python thread, which measures how much later than asked for its sleeps end, ns."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.late: list[int] = []
        self._ended = False
        self.start()

    def run(self) -> None:
        """Sleep, and note the delay, until `end` is called."""
        while not self._ended:
            begin = time.perf_counter_ns()
            time.sleep(SLEEP_S)
            self.late.append(time.perf_counter_ns() - begin - round(SLEEP_S * 1e9))

    def end(self) -> None:
        """End the thread, and wait for it."""
        self._ended = True
        self.join(PATIENCE_S)


_sides: list[Side] = []


def open_side(role: str, provider: str) -> dict[str, Any]:
    """Make this process's side; return its addresses for the other one."""
    _sides.append(Side(role, provider))
    return _sides[0].place()


def main() -> None:
    """Answer commands until stdin ends."""
    gc.disable()
    serve(
        {
            "open": open_side,
            "connect": lambda there: _sides[0].connect(there),
            "fill_stream": lambda seed: _sides[0].fill("stream", seed),
            "stream": lambda: _sides[0].stream(),
            "end_stream": lambda: _sides[0].end_stream(),
            "measure": lambda calls, seed: _sides[0].measure(calls, seed),
            "wrong": lambda seed: _sides[0].count_wrong("small", seed),
            "wrong_stream": lambda seed: _sides[0].count_wrong("stream", seed),
            "check": lambda: _sides[0].check(),
            "close": lambda: _sides[0].engine.close(),
        }
    )
