"""The same batches cause the same work, exactly, in the real engine and in the simulation.

Real threads, real time and the emulated NIC on one side; `VirtualEngine`, turned by hand, on the other. All kinds of
work but those that depend on timing (polls, doorbells, parks, wakes) must be counted equally often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from mooncache import Engine
from mooncache.errors import Status
from mooncache.kernels import calls, submit, waits
from mooncache.kernels.enums import Kind, Opcode, Policy, Store
from mooncache.kernels.pump import Pump, pump
from mooncache.kernels.reclaim.dispatch import reap
from mooncache.kernels.settings import Settings
from mooncache.providers.inprocess.emulated import Emulated, Nic
from sim.config import PAIRS
from sim.costs import Prices
from sim.rank import BASE, PEER, VirtualEngine
from tests.helpers import TIMING_KINDS

ONE = (Nic(),)
UNTIMED = [kind for kind in Kind if kind not in TIMING_KINDS]
ARENA = 1 << 20
SETTINGS = {"slices": 8192, "batches": 32, "peers": 1, "cache_slices": 1000, "reaper_lot": 700, "slice_bytes": 4096}
SIZES = (1, 255, 256, 257, 3000, 257, 1)


class Requests(NamedTuple):
    """A batch by offsets into both arenas; int64[n] each, one value holding for all."""

    source: np.ndarray
    target: np.ndarray
    length: np.ndarray


def scattered(slices: int) -> Requests:
    """Requests of one slice each, none adjacent."""
    offsets = 128 * np.arange(slices, dtype=np.int64)
    return Requests(offsets, offsets, np.full(1, 64, np.int64))


def untimed(counts: np.ndarray) -> dict[str, int]:
    return {kind.name: int(counts[kind]) for kind in UNTIMED}


# ------------------------------------------------------------------------------ both worlds
@contextmanager
def real_engine(pair: str, move_bytes: bool, nics: Sequence[Nic]) -> Iterator[tuple[Engine, str, int, int]]:
    """An engine, its peer's name, and where the arenas of both begin."""
    store, policy = pair.split("/")
    nics = [replace(nic, move_bytes=move_bytes) for nic in nics]
    with (
        Engine(provider=Emulated(*nics), store=store, policy=policy, **SETTINGS) as here,
        Engine(provider=Emulated(*nics)) as there,
    ):
        arenas = np.zeros((2, ARENA), np.uint8)
        local, remote = here.register(arenas[0]), there.register(arenas[1])
        yield here, there.name, local.address, remote.address


def counts_of(engine: Engine) -> dict[str, int]:
    """After the engine is closed: what the reaper and epochs had still to free is freed then."""
    engine.close()
    return {kind.name: engine.stats().counts[kind.name.lower()] for kind in UNTIMED}


def in_reality(pair: str, batches: Sequence[Requests], move_bytes: bool, nics: Sequence[Nic] = ONE) -> dict[str, int]:
    """By the Python API: write, wait, close."""
    with real_engine(pair, move_bytes, nics) as (engine, peer, local, remote):
        for source, target, length in batches:
            operands = source + local, target + remote, length
            n = max(o.size for o in operands)
            batch = engine.write(peer, *(int(o[0]) if o.size < n else o for o in operands))
            batch.wait()
            assert not len(batch.failures)
            batch.close()
        return counts_of(engine)


def by_kernels(pair: str, batches: Sequence[Requests]) -> dict[str, int]:
    """The real engine again, by the two halves of a submit that the simulation uses."""
    with real_engine(pair, move_bytes=True, nics=ONE) as (engine, peer, local, remote):
        index = engine.connect(peer).index
        for source, target, length in batches:
            operands = (source + local, target + remote, length)
            handle = submit.prepare(engine.ctl, index, Opcode.WRITE.value, 0, *operands)
            assert handle > 0
            assert submit.publish(engine.ctl, handle) == Status.OK
            while waits.wait(engine.ctl, handle, 10**10) != Status.OK:
                pass
            assert calls.close(engine.ctl, handle, False) == Status.OK
        return counts_of(engine)


def virtual_engine(pair: str, nics: Sequence[Nic]) -> VirtualEngine:
    store, policy = pair.split("/")
    settings = Settings(store=Store[store.upper()], policy=Policy[policy.upper()], **SETTINGS)
    prices = Prices(dict.fromkeys(Kind, 10.0), dict.fromkeys(Kind, 1.0))
    return VirtualEngine(settings, [replace(nic, move_bytes=False) for nic in nics], prices, threads=1)


def in_simulation(pair: str, batches: Sequence[Requests], nics: Sequence[Nic] = ONE) -> dict[str, int]:
    """In virtual time, one batch after the other; the reaper and epochs get their turn after each."""
    engine = virtual_engine(pair, nics)
    (caller,) = engine.callers
    engine.worker.row["horizon"] = (1 << 62) - 1
    for source, target, length in batches:
        operands = (source + BASE, target + BASE, length)
        handle = int(submit.prepare(caller.ctl, PEER, Opcode.WRITE.value, 0, *operands))
        assert handle > 0
        assert submit.publish(caller.ctl, handle) == Status.OK
        assert pump(engine.worker.ctl) == Pump.FINISHED
        assert engine.row(handle)["remaining"] == 0
        assert calls.close(caller.ctl, handle, False) == Status.OK
        assert pump(engine.worker.ctl) == Pump.IDLE
        while reap(engine.reaper.ctl) > 0:
            pass
    return untimed(engine.counts)


# ------------------------------------------------------------------------------ tests
@pytest.mark.parametrize("move_bytes", [False, True], ids=["wire only", "moving bytes"])
@pytest.mark.parametrize("pair", PAIRS)
def test_counts_of_scattered_slices_are_equal(pair: str, move_bytes: bool) -> None:
    """Sizes around a chunk and far beyond; the later ones take what a thread's cache has kept of the earlier."""
    batches = [scattered(n) for n in SIZES]
    real = in_reality(pair, batches, move_bytes)
    assert real == in_simulation(pair, batches)
    assert real["SLICES_FILLED"] == real["COMPLETED"] == real["REQUESTS"] == sum(SIZES)
    assert real["BATCHES_CLOSED"] == len(SIZES)
    if pair == "heap/thread_cache":
        assert real["HEAP_REUSED"] > 1000


@pytest.mark.parametrize("pair", PAIRS)
def test_counts_of_coalesced_and_cut_requests_are_equal(pair: str) -> None:
    """Runs adjacent at both ends become one slice, long requests several, and a short tail joins the last."""
    runs = np.arange(600, dtype=np.int64)
    adjacent = Requests(64 * runs, 64 * runs, np.full(1, 64, np.int64))
    pairs_of_two = Requests(64 * runs + 64 * (runs // 2), 64 * runs + 64 * (runs // 2), np.full(1, 64, np.int64))
    one_side_only = Requests(64 * runs, 128 * runs, np.full(1, 64, np.int64))
    long_ones = np.array([1, 4096, 4097, 5120, 5121, 8192, 20_000, 100_000], np.int64)
    starts = np.concatenate([[0], np.cumsum(long_ones[:-1] + 7)])
    cut = Requests(starts, starts[::-1].copy(), long_ones)
    cut = cut._replace(target=starts)
    whole = Requests(np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, ARENA, np.int64))
    batches = [adjacent, pairs_of_two, one_side_only, cut, whole]
    simulated = in_simulation(pair, batches)
    assert simulated == by_kernels(pair, batches) == in_reality(pair, batches, move_bytes=True)
    # 600 x 64 B in cuts of 4,096; 300 pairs; 600; each long one in such cuts, tails up to 1,024 folded in; 1 MiB
    slices = 10 + 300 + 600 + (1 + 1 + 1 + 1 + 2 + 2 + 5 + 25) + 256
    assert simulated["SLICES_FILLED"] == simulated["WORK_REQUESTS"] == slices
    assert simulated["REQUESTS"] == 600 * 3 + 8 + 1


@pytest.mark.parametrize("pair", PAIRS)
def test_counts_over_two_rails_with_a_completion_every_sixteen_work_requests_are_equal(pair: str) -> None:
    """Scattered, and side by side at the target, where four slices share a work request."""
    nics = [Nic(signal=16, gathers=4, bits_per_s=200 * 10**9), Nic(signal=16, gathers=4, bits_per_s=100 * 10**9)]
    runs = np.arange(1000, dtype=np.int64)
    batches = [scattered(n) for n in SIZES] + [Requests(128 * runs, 64 * runs, np.full(1, 64, np.int64))]
    real = in_reality(pair, batches, True, nics)
    assert real == in_simulation(pair, batches, nics)
    assert real["COMPLETED"] == sum(SIZES) + 1000
    # Each chunk of 256 slots ends a work request, so that the last of its 64 is full, and 1,000 are 250.
    assert real["WORK_REQUESTS"] == sum(SIZES) + 250
    # By chains of 128: one of 16 asks for a completion, and the last.
    assert real["COMPLETIONS"] == sum(n // 128 * 8 + -(-(n % 128) // 16) for n in SIZES) + 8 + 8


def test_random_requests_are_counted_equally() -> None:
    """Lengths, gaps and runs by chance; the default pair, since what policies count has its own tests."""
    draw = np.random.Generator(np.random.Philox(key=[3, 1]))
    batches = []
    for _ in range(20):
        n = int(draw.integers(1, 200))
        length = draw.integers(1, 6000, n) * draw.integers(0, 2, n) + draw.integers(1, 64, n)
        gap = draw.integers(0, 2, n) * 8
        start = np.cumsum(length + gap) - length
        keep = start + length <= ARENA
        batches.append(Requests(start[keep], start[keep], length[keep]))
    assert in_simulation("pool/bulk", batches) == by_kernels("pool/bulk", batches)
