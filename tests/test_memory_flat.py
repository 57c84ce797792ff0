"""Memory stays flat however long an engine runs: the short form of `mooncache bench`'s soak."""

from __future__ import annotations

import os

import numpy as np
import pytest

from mooncache.kernels import arrays
from tests.helpers import assert_balanced, in_threads, run_python

LAYERS, SLICES, WARM = 200, 30_000, 40
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def test_memory_is_flat_over_layers_of_30000_slices_from_two_threads(pairs):
    pair = pairs(arena=2 << 20, slices=4 * 30_208)
    offsets = np.arange(SLICES, dtype=np.int64) * 65
    source, target = pair.local.address + offsets, pair.remote.address + offsets
    resident: list[int] = []

    def layer() -> None:
        with pair.here.write(pair.peer, source, target, 64) as batch:
            batch.wait(60)

    def many(layers: int) -> None:
        for _ in range(layers):
            layer()

    for start in range(0, LAYERS, 20):
        in_threads(lambda: many(10), lambda: many(10))
        stats = pair.here.stats()  # a quiet point: both threads have ended
        assert stats.free_slices == stats.capacity_slices
        assert stats.open_batches == 0
        assert stats.counts["stale"] == 0
        if start + 20 >= WARM:
            resident.append(resident_bytes())
    np.testing.assert_array_equal(pair.source[: SLICES * 65], fingerprint(pair))
    assert max(resident) - resident[0] <= 1 << 20, resident
    pair.close()
    counts = assert_balanced(pair.here).counts
    assert counts["completed"] == LAYERS * SLICES


def fingerprint(pair) -> np.ndarray:
    """The target, with the gaps between slices, which nothing writes, taken from the source."""
    seen = pair.target[: SLICES * 65].copy().reshape(SLICES, 65)
    seen[:, 64] = pair.source[: SLICES * 65].reshape(SLICES, 65)[:, 64]
    return seen.ravel()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8])
@pytest.mark.parametrize("n", [0, 1, arrays.MAPPED_BYTES - 1, arrays.MAPPED_BYTES, 3 * arrays.MAPPED_BYTES + 1])
def test_arrays_of_an_engine_are_zeros_that_can_be_written_to_whatever_their_size(dtype, n):
    array = arrays.zeros(n, dtype)
    assert (array.dtype, array.shape) == (dtype, (n,))
    assert not array.any()
    array[:] = 1
    assert array.all()


def test_engines_that_were_closed_have_given_their_memory_back():
    script = """
import gc, os, mooncache
import numpy as np
def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def once():
    with mooncache.Engine("here", provider="loopback") as here, mooncache.Engine("there", provider="loopback") as there:
        source, target = (engine.register(np.ones(1 << 20, np.uint8)) for engine in (here, there))
        here.write("there", source.address, target.address, 1 << 20).wait(10).close()
for _ in range(3):
    once()
before = resident_bytes()
for _ in range(20):
    once()
print(resident_bytes() - before)
"""
    done = run_python(script)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 64 << 20  # one engine's slots are 160 MB
