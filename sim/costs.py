"""The cost of each kind of work: calibration files, and the price lists that turn virtual clocks.

A calibration file holds tables measured by `mooncache calibrate` with the real kernels and the real malloc. Nothing is
fitted: a cost is looked up by the number of slices in a layer and, on the heap, by who else uses the allocator, and
interpolated linearly between measured points. Outside its table a cost is refused, not guessed.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from mooncache.errors import UsageError
from mooncache.kernels.enums import KINDS, Kind
from mooncache.kernels.reclaim.policies import traits_of
from mooncache.kernels.reclaim.traits import FreesIn
from sim.config import Scenario
from sim.errors import ConfigError, Problem

PS_PER_NS = 1000
SHIPPED = "shipped.json"
ALLOCATOR = {  # how malloc and free are priced, by the thread that frees
    FreesIn.NOBODY: "fresh",
    FreesIn.CALLER: "same",
    FreesIn.WORKER: "contended",
    FreesIn.REAPER: "contended",
}
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]

TABLES: dict[str, str] = {
    "submit_call": "a submit of one slice, from Python",
    "fill": "one more slice in a submit, pool",
    "doorbell": "one more post_send of the same work requests",
    "work_request": "one work request built and posted",
    "poll": "a poll that finds nothing",
    "completion": "one completion polled and applied",
    "batch": "a worker's work for a batch besides its slices",
    "close_call": "a close of a one-slice batch, from Python",
    "free_slice": "one slice freed singly, pool",
    "free_chunk": "one chunk of 256 freed with its chain",
    "allocate_fresh": "one slice object from malloc, nothing ever freed",
    "allocate_same": "one slice object from malloc, freed by the same thread before",
    "allocate_contended": "one slice object from malloc while another thread frees",
    "free_same": "one slice object to free, by the thread that allocated it",
    "free_contended": "one slice object to free while another thread allocates",
    "reuse": "one slice object out of the thread's cache",
    "keep": "one slice object into the thread's cache",
    "wake": "from a batch's end until its sleeping waiter runs",
}
"""Every table of a calibration file, and what one unit of it is."""


class _Strict(BaseModel, extra="forbid", frozen=True):
    """One mapping of a calibration file."""


class Point(_Strict):
    """One measurement: the mean of its repeats without the outer 5 % at either end, and their spread; ns per unit."""

    slices: int = Field(ge=1)  # in the batch
    pairs: int = Field(default=1, ge=1)  # submitter and worker pairs on one malloc arena
    ns: Positive
    p5: Positive
    p95: Positive
    repeats: int = Field(ge=1)


class Machine(_Strict):
    """The machine on which the tables were measured; a profile lacking any of these is not accepted."""

    cpu: str
    cores: int
    kernel: str
    libc: str
    python: str
    numba: str
    numpy: str


class Calibration(_Strict):
    """A calibration file."""

    format: int = Field(ge=1, le=1)
    name: str
    measured: str  # date, ISO 8601
    machine: Machine
    tables: dict[str, list[Point]]

    def ns(self, table: str, slices: int, pairs: int = 1) -> float:
        """Return the cost of one unit, ns: linear between the two nearest measured points in each axis.

        Raises: UsageError when `pairs` lies outside the table. Below the smallest and above the largest number of
        slices the nearest point holds: the cost of a slice changes with the cache its batch fits in, and levels off.
        """
        points = self.tables[table]
        measured = sorted({point.pairs for point in points})
        if len(measured) == 1:
            pairs = measured[0]
        if not measured[0] <= pairs <= measured[-1]:
            raise UsageError(
                f"calibration {self.name!r}: table {table!r} was measured with {measured[0]} to {measured[-1]} threads "
                f"on one malloc arena, came {pairs}; set engine.arenas to own, or calibrate with more"
            )
        rows = []
        for each in measured:
            row = sorted((point.slices, point.ns) for point in points if point.pairs == each)
            rows.append(float(np.interp(slices, [n for n, _ in row], [ns for _, ns in row])))
        return float(np.interp(pairs, measured, rows))


def load_calibration(where: str) -> Calibration:
    """Read the calibration at a path, or the shipped one. Raises: ConfigError naming what is missing or wrong."""
    if where == "shipped":
        text, place = resources.files("sim").joinpath("calibrations", SHIPPED).read_text(), f"shipped {SHIPPED}"
    else:
        try:
            text, place = Path(where).read_text("utf-8"), where
        except OSError as error:
            message = f"expected a calibration file, came {error.strerror}; `mooncache calibrate` makes one"
            raise ConfigError(Problem(where, "calibration", message)) from None
        except ValueError as error:  # not UTF-8, or a path that cannot be one
            message = f"expected a calibration file in UTF-8, came {error}; `mooncache calibrate` makes one"
            raise ConfigError(Problem(where, "calibration", message)) from None
    try:
        calibration = Calibration.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(Problem(place, key, f"expected a calibration file: {first['msg']}")) from None
    missing = [name for name in TABLES if not calibration.tables.get(name)]
    if missing:
        message = f"expected tables {', '.join(missing)}, came none; `mooncache calibrate` measures them"
        raise ConfigError(Problem(place, "tables", message))
    return calibration


def digest(calibration: Calibration) -> str:
    """Return a short hash that names a calibration in results."""
    return hashlib.blake2b(calibration.model_dump_json().encode(), digest_size=6).hexdigest()


class Prices:
    """The cost of `account(kind, n)`: `fixed[kind] + n * each[kind]`, int64[KINDS] picoseconds."""

    def __init__(self, fixed: dict[Kind, float], each: dict[Kind, float]) -> None:
        self.fixed, self.each = np.zeros(KINDS, np.int64), np.zeros(KINDS, np.int64)
        for array, prices in ((self.fixed, fixed), (self.each, each)):
            for kind, ns in prices.items():
                array[kind] = round(ns * PS_PER_NS)


def prices(calibration: Calibration, scenario: Scenario, policy: str, slices: int) -> Prices:
    """Make the price list of one policy, for layers of about `slices` slices.

    The allocator's price depends on who uses it at the same time: a policy that frees in another thread than the one
    that allocates (worker, reaper) fights for the arena's lock; one that frees in the submitting thread does not; one
    that never frees takes fresh pages. With `engine.arenas: shared` all ranks fight for one arena.
    """

    def ns(table: str, pairs: int = 1) -> float:
        return calibration.ns(table, slices, pairs)

    pairs = scenario.workload.ranks if scenario.engine.arenas == "shared" else 1
    how = ALLOCATOR[traits_of(policy).frees_in]
    return Prices(
        fixed={
            Kind.BATCHES_SUBMITTED: ns("submit_call"),
            Kind.DOORBELLS: ns("doorbell"),
            Kind.POLLS: ns("poll"),
            Kind.BATCHES_FINISHED: ns("batch"),
            Kind.BATCHES_CLOSED: ns("close_call"),
        },
        each={
            Kind.SLICES_FILLED: ns("fill"),
            Kind.WORK_REQUESTS: ns("work_request"),
            Kind.COMPLETIONS: ns("completion"),
            Kind.SLICES_FREED: ns("free_slice"),
            Kind.CHUNKS_FREED: ns("free_chunk"),
            Kind.HEAP_ALLOCATED: ns(f"allocate_{how}", pairs),
            Kind.HEAP_FREED: ns(f"free_{'same' if how == 'fresh' else how}", pairs),
            Kind.HEAP_REUSED: ns("reuse"),
            Kind.HEAP_CACHED: ns("keep"),
        },
    )
