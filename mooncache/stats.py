"""The work and the holdings of an engine: the counters of its actors, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mooncache.kernels.enums import Kind, Store, words_of
from mooncache.kernels.state import Block, State
from mooncache.limits import CHUNK_SLICES

NS_PER_S = 1e9


@dataclass(frozen=True)
class Stats:
    """A look at an engine. Each figure is exact, but they are read one after another, the batches first.

    Attributes:
        counts: work done since the engine opened, by kind (`enums.Kind`, lower case).
        capacity_slices, free_slices: slots of the pool; a batch holds whole chunks of 256.
        high_water_slices: most slots ever in use at once.
        open_batches: batches that hold a row: running, done and not closed, detached, or waiting for the reaper.
        worker_busy_s: seconds each worker had something to do.
        worker_freeing_s: of those, seconds each spent freeing slices.
        caller_freeing_s, reaper_freeing_s: seconds callers and the reaper spent freeing slices.
        unsettled_slices: slices sent on connections that ended, of which it is not known yet that none lands any more:
            the peer's pages they are for are not safe.
        trouble: what is wrong in the background, a sentence each: a thread that failed and was started again, a store
            of names that cannot be asked or holds what is no record. Empty when all is well. Each was logged once.
    """

    counts: dict[str, int]
    capacity_slices: int
    free_slices: int
    high_water_slices: int
    open_batches: int
    worker_busy_s: tuple[float, ...]
    worker_freeing_s: tuple[float, ...]
    caller_freeing_s: float
    reaper_freeing_s: float
    trouble: tuple[str, ...]
    unsettled_slices: int


def collect(
    state: State, callers: Sequence[Block], workers: Sequence[Block], reaper: Block, trouble: tuple[str, ...],
    unsettled: int,
) -> Stats:  # fmt: skip
    """Add up the figures of an engine with these actors."""
    open_batches = state.open_batches
    blocks = [*callers, *workers, reaper]
    # What a thread keeps for itself under thread_cache on the pool is free, though only for that thread.
    kept = sum(b.row["cache_count"] for b in blocks) if state.settings.store == Store.POOL else 0
    return Stats(
        counts=words_of(Kind, sum((b.counters for b in blocks), np.zeros(len(Kind), np.int64))),
        capacity_slices=state.settings.chunks * CHUNK_SLICES,
        free_slices=state.free_slices + kept,
        high_water_slices=state.high_water_slices,
        open_batches=open_batches,
        worker_busy_s=tuple(_seconds(b, "time_busy") for b in workers),
        worker_freeing_s=tuple(_seconds(b, "time_freeing") for b in workers),
        caller_freeing_s=sum(_seconds(b, "time_freeing") for b in callers),
        reaper_freeing_s=_seconds(reaper, "time_freeing"),
        trouble=trouble,
        unsettled_slices=unsettled,
    )


def _seconds(block: Block, field: str) -> float:
    return block.row[field] / NS_PER_S
