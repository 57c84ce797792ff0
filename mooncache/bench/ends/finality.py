"""One process of `mooncache bench finality`: an engine with pages, which does what each line of stdin asks for.

The initiator writes pages of one value; once its batch says that its own pages are free, it fills them with another,
REUSED. The target fills its pages with CANARY as soon as they are known to be safe; whatever differs later landed late.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import numpy as np

from mooncache import Batch, Engine, Quiesced, TransferFailed, TransportError
from mooncache.bench.harness.process import serve

WRITTEN, REUSED, CANARY = 1, 2, 255
SETTLE_S = 60.0


class End:
    """One end: an engine, its pages, and the batch under way."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.batch: Batch | None = None

    def open(self, provider: str, nbytes: int) -> dict[str, Any]:
        """Open the engine; return its address, and that of its pages."""
        self.provider, self.nbytes = provider, nbytes
        self.engine = engine = Engine(provider=provider, slices=1 << 16, batches=64)
        self.pages = engine.allocate(nbytes) if provider == "shm" else np.zeros(nbytes, np.uint8)
        self.region = engine.register(self.pages)
        self.fill(CANARY)
        return {"name": engine.name, "address": engine.address, "base": self.region.address}

    def fill(self, value: int) -> None:
        """Give all pages one value."""
        self.pages[:] = value

    def connect(self, peer: str, base: int) -> None:
        """Move a byte and wait for it, so that a connection stands even if the last case ended the peer's."""
        assert self.engine is not None
        while True:
            with self.engine.write(peer, self.region.address, base, 1) as batch, suppress(TransferFailed):
                batch.wait(60)
                return

    def write(self, peer: str, base: int, block: int, timeout: float | None) -> None:
        """Submit one write of all pages to a peer's pages, block by block."""
        assert self.engine is not None
        self.fill(WRITTEN)
        at = np.arange(0, self.nbytes, block, dtype=np.int64)
        self.batch = self.engine.write(peer, self.region.address + at, base + at, block, timeout=timeout)

    def end(self, how: str) -> dict[str, Any]:
        """End the batch early, wait until this engine's pages are free, and reuse them at once."""
        assert self.batch is not None
        since = time.perf_counter()
        if how == "cancel":
            self.batch.cancel()
        elif how == "close":
            self.batch.close()
        outcome = self.outcome() if how != "close" else "closed"
        done = time.perf_counter() - since
        while self.batch.quiesced is Quiesced.NO:
            time.sleep(1e-4)
        self.fill(REUSED)
        return {"outcome": outcome, "seconds": done}

    def outcome(self) -> str:
        """Return how the batch ended: ARRIVED, or the name of the first failure's status."""
        assert self.batch is not None
        try:
            self.batch.wait(60)
        except TransferFailed as failed:
            return failed.failures[0].status.name
        return "ARRIVED"

    def settle(self) -> str:
        """Wait until the batch is final at both ends; return what `quiesced` says."""
        assert self.batch is not None
        self.batch.wait_quiesced(SETTLE_S)
        said = self.batch.quiesced.name
        self.batch = None
        return said

    def fence(self, peer: str) -> dict[str, Any]:
        """Fence a peer, and give the pages another value at once."""
        assert self.engine is not None
        since = time.perf_counter()
        try:
            ended = self.engine.fence(peer)
        except TransportError as error:
            return {"seconds": time.perf_counter() - since, "refused": str(error)}
        seconds = time.perf_counter() - since
        self.fill(CANARY)
        return {"seconds": seconds, "ended": ended}

    def late(self) -> dict[str, int]:
        """Count the bytes that are not the canary: in pages as they were written, and in pages in use again."""
        changed = self.pages[self.pages != CANARY]
        return {"written": int((changed != REUSED).sum()), "reused": int((changed == REUSED).sum())}


def main() -> None:
    """Answer commands until stdin ends."""
    end = End()
    serve({name: getattr(end, name) for name in ("open", "fill", "connect", "write", "end", "settle", "fence", "late")})
