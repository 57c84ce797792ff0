"""The blocks of memory that transfer benches send: their places, their bytes, and a memcpy of them.

What belongs into word w of block b is a function of (seed, b, w), so the process that received blocks can tell by
itself whether they are the right ones, in the right places, and of this sample:

    word = seed * SEEDS + b * BLOCKS + w * STEPS    (modulo 2**64, little-endian; the last one of a block may be cut)
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from mooncache.bench.harness.measure import scattered
from mooncache.kernels.arrays import address_of
from mooncache.kernels.atomics import copy, i8, i64
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


# ------------------------------------------------------------------------------ memcpy
@kernel("int64(int64, int64, int64, int64)", nogil=True)
def copy_blocks(targets: int, sources: int, n: int, length: int) -> int:
    """Copy each block by one memcpy, in this thread: the reference for everything that stays on one host."""
    for b in range(n):
        copy(i64(targets)[b], i64(sources)[b], length)
    return 0


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
