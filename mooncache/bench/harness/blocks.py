"""The blocks of memory that transfer benches send: their places, their bytes, and the fastest plain copy of them.

What belongs into word w of block b is a function of (seed, b, w), so the process that received blocks can tell by
itself whether they are the right ones, in the right places, and of this sample:

    word = seed * SEEDS + b * BLOCKS + w * STEPS    (modulo 2**64, little-endian; the last one of a block may be cut)
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from time import perf_counter

import numpy as np

from mooncache.bench.harness.measure import median, scattered
from mooncache.kernels.arrays import address_of
from mooncache.kernels.atomics import copy, fence, i8, i64
from mooncache.kernels.copying import fetch_ahead, stream_copy
from mooncache.kernels.jit import kernel
from mooncache.segments import segment_of

# Odd, so that any two seeds, blocks and words differ; without structure, so that no two sums of them agree.
SEEDS, BLOCKS, STEPS = 0x6C8E944D1F5B2A63, 0x2545F4914F6CDD1D, 0x1B873593CC9E2D51


# ------------------------------------------------------------------------------ where
def places(n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of n blocks in the source and in the target buffer, as in `scattered`; int64[n] each."""
    traffic = scattered(n, length)
    return tuple(  # type: ignore[return-value]
        addresses - buffer.ctypes.data
        for buffer, addresses in ((traffic.source_buffer, traffic.source), (traffic.target_buffer, traffic.target))
    )


def span(n: int, length: int) -> int:
    """Return the bytes from the first to the end of the last of n blocks, each followed by a gap of its own size."""
    return (2 * n - 1) * length


# ------------------------------------------------------------------------------ what
@kernel("int64(int64, int64, int64, int64)", nogil=True)
def fill(addresses: int, n: int, length: int, seed: int) -> int:
    """Write the bytes of sample `seed` into n blocks at int64[n] `addresses`."""
    for b in range(n):
        address = i64(addresses)[b]
        word = seed * SEEDS + b * BLOCKS
        whole = i64(address)
        for w in range(length >> 3):
            whole[w] = word
            word += STEPS
        for tail in range(length & ~7, length):
            i8(address)[tail] = word & 255
            word >>= 8
    return 0


@kernel("int64(int64, int64, int64, int64)", nogil=True)
def count_wrong(addresses: int, n: int, length: int, seed: int) -> int:
    """Count those of n blocks that hold other bytes than sample `seed` has there."""
    wrong = 0
    for b in range(n):
        address = i64(addresses)[b]
        word = seed * SEEDS + b * BLOCKS
        whole = i64(address)
        differing = 0
        for w in range(length >> 3):
            differing |= whole[w] ^ word
            word += STEPS
        for tail in range(length & ~7, length):
            differing |= (i8(address)[tail] ^ word) & 255
            word >>= 8
        wrong += differing != 0
    return wrong


# ------------------------------------------------------------------------------ copies
class Way(IntEnum):
    """A way to copy a block. Those past the caches fetch the beginning of a block while another is copied."""

    MEMCPY = 0  # libc's
    LINES = 1  # past the caches, line by line
    BANKS = 2  # past the caches, by banks: see `kernels/copying.py`


AHEAD = 2  # blocks


@kernel("int64(int64, int64, int64, int64, int64)", nogil=True)
def copy_blocks(targets: int, sources: int, n: int, length: int, way: int) -> int:
    """Copy each block, in this thread; the bytes are visible to others when it returns."""
    for b in range(n):
        if way == Way.MEMCPY:
            copy(i64(targets)[b], i64(sources)[b], length)
        else:
            if b + AHEAD < n:
                fetch_ahead(i64(sources)[b + AHEAD], length)
            stream_copy(i64(targets)[b], i64(sources)[b], length, 0, length + 1 if way == Way.BANKS else 0)
    fence()
    return 0


class Copying:
    """Copies of the same blocks by one thread or several, in the way that is fastest for them here.

    `targets`, `sources`: int64[n] addresses. Each way is tried when this is made, so that all pages have been touched.
    """

    def __init__(self, targets: np.ndarray, sources: np.ndarray, length: int, threads: int) -> None:
        self._length, self._pool = length, ThreadPoolExecutor(threads, "mooncache-copying")
        self.parts = [
            (to, from_)
            for to, from_ in zip(np.array_split(targets, threads), np.array_split(sources, threads), strict=True)
            if to.size
        ]
        took = {way: median([self.timed(way) for _ in range(3)]) for way in Way}
        self.way = min(took, key=took.__getitem__)

    def timed(self, way: Way) -> float:
        """Copy all blocks by one way; return the seconds that it took."""
        begin = perf_counter()
        self.copy(way)
        return perf_counter() - begin

    def copy(self, way: Way | None = None) -> None:
        """Copy all blocks, by the fastest way or by another one."""
        way = self.way if way is None else way
        jobs = [
            (address_of(to), address_of(from_), to.size, self._length, int(way)) for to, from_ in self.parts
        ]  # fmt: skip
        others = [self._pool.submit(copy_blocks, *job) for job in jobs[1:]]
        copy_blocks(*jobs[0])
        for other in others:
            other.result()

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown()


class Mapped:
    """Memory that another process of the same user allocated by memfd, mapped here as well."""

    def __init__(self, place: str, size: int) -> None:
        descriptor = os.open(place, os.O_RDWR)
        try:
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self.address = address_of(np.frombuffer(self._map, np.uint8))

    def close(self) -> None:
        """Unmap the memory."""
        self._map.close()


def place_of(array: np.ndarray) -> str:
    """Return where `Mapped` finds an array made by `memory.allocate`, as long as the array lives."""
    segment = segment_of(address_of(array), array.nbytes)
    assert segment is not None
    return f"/proc/{os.getpid()}/fd/{segment.descriptor}"
