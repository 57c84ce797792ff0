from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest

from mooncache.providers.rdma import nic

PAGES = 64


def resident(address: int, pages: int) -> int:
    """How many of these pages are in memory."""
    present = np.zeros(pages, np.uint8)
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(address, pages * mmap.PAGESIZE, present.ctypes.data) == 0
    return int((present & 1).sum())


@pytest.fixture
def memory() -> np.ndarray:
    """Pages that nobody has touched yet."""
    memory = mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


@pytest.mark.parametrize("writable", [True, False])
def test_all_pages_of_a_range_are_faulted_in(
    memory: np.ndarray, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    monkeypatch.setattr(nic, "PIECE_BYTES", 4 * mmap.PAGESIZE)
    address = memory.ctypes.data
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(address), mmap.PAGESIZE, nic.MADV_POPULATE_READ):
        pytest.skip("this kernel cannot (Linux 5.14)")
    nic.populate(address + 10 * mmap.PAGESIZE + 1, 20 * mmap.PAGESIZE - 1, writable, threads=3)
    assert resident(address + 10 * mmap.PAGESIZE, 20) == 20
    assert resident(address, PAGES) == 21  # and the first, where the kernel was asked what it can


def test_a_range_that_is_not_mapped_is_left_to_the_registration() -> None:
    nic.populate(0x1000, 1 << 20, True, threads=1)
