"""Queue pairs of shared memory by hand: what a helping worker may take out of another's ring."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from mooncache.kernels.arrays import address_of, aligned
from mooncache.kernels.records.verbs import SEND_WR
from mooncache.kernels.tables import RegionTable
from mooncache.providers.shm import copy as copying
from mooncache.providers.shm.provider import Shm
from tests.kernels import entries


@pytest.fixture
def provider():
    provider = Shm()
    provider.open(2, 64, aligned(1 << 20))
    yield provider
    provider.close()


def post(queue, n: int, remote: int) -> None:
    """Post n writes of 8 bytes as one chain."""
    wr, sge = np.zeros(n, SEND_WR), np.zeros((n, 2), np.int64)
    source = np.zeros(8, np.uint8)
    sge[:, 0], sge[:, 1] = source.ctypes.data, 8
    wr["next"][:-1] = wr.ctypes.data + SEND_WR.itemsize * np.arange(1, n)
    wr["sg_list"] = sge.ctypes.data + 16 * np.arange(n)
    wr["num_sge"] = 1
    wr["remote_addr"] = remote
    bad = np.zeros(1, np.int64)
    call = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(copying.post_send.address)
    assert call(address_of(queue.qp), wr.ctypes.data, bad.ctypes.data) == 0


def test_a_helper_takes_no_entry_under_the_number_of_an_older_one(provider):
    """100 entries went by connection; then 10 to be copied lie where entries 36 to 45 of those had been."""
    provider._add_queues("peer", provider.keys)
    queue = provider.queues_of("peer")[0]
    there = np.zeros(64, np.uint8)
    table = RegionTable("mapped memory")
    table.add(there.ctypes.data, 64, (there.ctypes.data,), 0)
    queue.row.set(maps=table.header.address, broken=0)
    queue.row.set(head=100, tail=100, sent=100)  # answered and reported; nobody had a reason to look at claims
    queue.row["claimed"] = 36
    post(queue, 10, there.ctypes.data)
    found = np.zeros(2, np.int64)
    entries.claim(queue.address, found)
    assert found.tolist() == [100, 10]
    assert queue.row["claimed"] == 110
