"""`python -m sim.malloc_bench SLICES PAIRS` times slice objects through malloc and free in a fresh process.

fresh      each of PAIRS threads allocates, nothing is freed
same       each of PAIRS threads allocates a layer, then frees it itself
contended  PAIRS pairs: one thread allocates a layer while its partner frees the layer before

Prints JSON: table -> ns per slice of each layer. With MALLOC_ARENA_MAX=1 in the environment all threads share an arena.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from typing import Any

import numpy as np

from mooncache.kernels.account import clock
from mooncache.kernels.arrays import address_of
from mooncache.kernels.atomics import i64, pause
from mooncache.kernels.enums import Store
from mooncache.kernels.heap import delete_object, new_object
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import acquire, address, cell_at, release
from mooncache.kernels.records.control import control_at
from mooncache.kernels.settings import Settings
from mooncache.kernels.state import Block, State

SKIPPED = 3  # layers before the heap has its size
ALLOCATED, FREED = 0, 8  # words of a pair's board: layers done, on a cache line each


@kernel
def allocate_layer(ctl, objects, n):
    """Make `n` objects; return ns."""
    start = clock(ctl)
    for i in range(n):
        objects[i] = new_object(ctl)
    return clock(ctl) - start


@kernel
def free_layer(ctl, objects, n):
    """Free `n` objects; return ns."""
    start = clock(ctl)
    for i in range(n):
        delete_object(ctl, objects[i])
    return clock(ctl) - start


@kernel("int64(int64, int64, int64, int64, int64, int64)", nogil=True)
def allocate_ahead(ctl, board, objects, n, times, layers):
    """Allocate layer after layer into two buffers in turn, at most one ahead of the partner."""
    ctl = control_at(ctl)
    for k in range(layers):
        while acquire(cell_at(board, FREED), "value") < k - 1:
            pause()
        i64(times)[k] = allocate_layer(ctl, i64(address(cell_at(objects, k % 2 * n))), n)
        release(cell_at(board, ALLOCATED), "value", k + 1)
    return 0


@kernel("int64(int64, int64, int64, int64, int64, int64)", nogil=True)
def free_behind(ctl, board, objects, n, times, layers):
    """Free each layer as soon as it is allocated."""
    ctl = control_at(ctl)
    for k in range(layers):
        while acquire(cell_at(board, ALLOCATED), "value") < k + 1:
            pause()
        i64(times)[k] = free_layer(ctl, i64(address(cell_at(objects, k % 2 * n))), n)
        release(cell_at(board, FREED), "value", k + 1)
    return 0


@kernel("int64(int64, int64, int64, int64, int64, int64)", nogil=True)
def alternate(ctl, freeing, objects, n, times, layers):
    """Allocate and free layers in one thread; times: int64[2, layers]."""
    ctl = control_at(ctl)
    for k in range(layers):
        i64(times)[k] = allocate_layer(ctl, i64(objects), n)
        if freeing != 0:
            i64(times)[layers + k] = free_layer(ctl, i64(objects), n)
        else:
            objects = address(cell_at(objects, n))
    return 0


def run(threads: list[threading.Thread]) -> None:
    """Start all, each on the next core in turn, and wait for all. A pair that shared a core would never contend."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    for i, thread in enumerate(threads):
        os.sched_setaffinity(0, {cores[i % len(cores)]})  # a thread starts where its parent is bound
        thread.start()
    os.sched_setaffinity(0, before)
    for thread in threads:
        thread.join()


def per_slice(times: np.ndarray, n: int) -> list[float]:
    """Return ns per slice of each layer that counts."""
    return [round(float(v) / n, 2) for v in times[..., SKIPPED:].ravel()]


def measure(n: int, pairs: int, layers: int) -> dict[str, list[float]]:
    """Measure all three patterns, each on its own objects."""
    state = State(Settings(store=Store.HEAP, slices=256))
    blocks = [Block(state) for _ in range(2 * pairs)]
    found: dict[str, list[float]] = {}

    def threads(kernel_: Any, arguments: list[tuple[int, ...]], of: list[Block]) -> list[threading.Thread]:
        return [threading.Thread(target=kernel_, args=(b.ctl, *a, layers)) for b, a in zip(of, arguments, strict=True)]

    objects, times = np.zeros((pairs, 2 * n), np.int64), np.zeros((2, pairs, layers), np.int64)
    boards = np.zeros((pairs, 16), np.int64)
    kernels = (allocate_ahead, free_behind)
    for k in kernels:
        k.ready()
    alternate.ready()
    sides = [
        threads(
            k,
            [(address_of(boards[p]), address_of(objects[p]), n, address_of(times[side, p])) for p in range(pairs)],
            blocks[side::2],
        )
        for side, k in enumerate(kernels)
    ]
    run([thread for pair in zip(*sides, strict=True) for thread in pair])
    found["allocate_contended"], found["free_contended"] = per_slice(times[0], n), per_slice(times[1], n)
    own = np.zeros((pairs, 2, layers), np.int64)
    run(threads(alternate, [(1, address_of(objects[p]), n, address_of(own[p])) for p in range(pairs)], blocks[:pairs]))
    found["allocate_same"], found["free_same"] = per_slice(own[:, 0], n), per_slice(own[:, 1], n)
    kept = np.zeros((pairs, layers * n), np.int64)
    ctypes.CDLL(None).malloc_trim(0)
    run(threads(alternate, [(0, address_of(kept[p]), n, address_of(own[p])) for p in range(pairs)], blocks[:pairs]))
    found["allocate_fresh"] = per_slice(own[:, 0], n)
    return found


if __name__ == "__main__":
    slices, pairs = int(sys.argv[1]), int(sys.argv[2])
    print(json.dumps(measure(slices, pairs, layers=int(np.clip(1_500_000 // slices, 12, 60)))))
