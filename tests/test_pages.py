"""Pages are faulted in before they are used: by `register`, and when a peer maps them."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest

from mooncache import Engine, pages

PAGES = 64


def resident(address: int, pages: int) -> int:
    """How many of these pages are in memory."""
    present = np.zeros(pages, np.uint8)
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(address, pages * mmap.PAGESIZE, present.ctypes.data) == 0
    return int((present & 1).sum())


def mapped(address: int, pages: int) -> int:
    """How many of these pages are in this process's page table."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // mmap.PAGESIZE * 8)
        return int((np.frombuffer(file.read(8 * pages), np.uint64) >> np.uint64(63)).sum())


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
    monkeypatch.setattr(pages, "PIECE_BYTES", 4 * mmap.PAGESIZE)
    address = memory.ctypes.data
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(address), mmap.PAGESIZE, pages.MADV_POPULATE_READ):
        pytest.skip("this kernel cannot (Linux 5.14)")
    pages.populate(address + 10 * mmap.PAGESIZE + 1, 20 * mmap.PAGESIZE - 1, writable)
    assert resident(address + 10 * mmap.PAGESIZE, 20) == 20
    assert resident(address, PAGES) == 21  # and the first, where the kernel was asked what it can


def test_a_range_that_is_not_mapped_is_left_to_the_registration() -> None:
    pages.populate(0x1000, 1 << 20, True)


@pytest.mark.parametrize("nbytes", [5000, 3 << 20])
def test_memory_that_peers_map_is_faulted_in_at_both_ends_before_the_first_transfer(nbytes: int) -> None:
    with Engine(provider="shm") as target, Engine(provider="shm") as engine:
        memory, source = target.allocate(nbytes), engine.allocate(nbytes)
        count = -(-nbytes // mmap.PAGESIZE)
        assert resident(memory.ctypes.data, count) == 0
        target.register(memory)
        assert resident(memory.ctypes.data, count) == count
        engine.register(source)
        engine.connect(target.address)
        (mapping,) = engine.provider._shares[target.address].segments.values()
        assert mapped(mapping[1].address, count) == count
