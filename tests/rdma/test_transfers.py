"""Bytes, counts and notifications over a verbs device."""

import sys

import numpy as np
import pytest

from mooncache import Engine, TransferFailed
from mooncache.errors import Status
from mooncache.limits import INBOX_NOTES, SLICES_GATHERED
from mooncache.providers.inprocess.emulated import Emulated, Nic
from tests.helpers import POLICIES, STORES, Pair, assert_balanced

WAIT = 120  # seconds; a guest under emulation is slow


@pytest.fixture(scope="module")
def pair(rdma):
    pair = Pair(rdma(), rdma(), arena=8 << 20, slices=64 * 1024)
    yield pair
    pair.close()


def spent(pair, before):
    now = pair.here.stats().counts
    return {kind: now[kind] - before[kind] for kind in now}


def scattered_pages(pair, n, seed):
    """n pages of 512 bytes to 16 KiB, in a random order at both ends: offsets and lengths."""
    stream = np.random.Generator(np.random.Philox(key=[seed, 0]))
    length = stream.choice([512, 1024, 4096, 16384], n).astype(np.int64)

    def places():
        order = stream.permutation(n)
        starts = np.zeros(n, np.int64)
        starts[order] = np.cumsum(length[order] + 64) - length[order] - 64
        assert starts.max() + 16384 < len(pair.source)
        return starts

    return places(), places(), length


@pytest.mark.parametrize("seed", range(3))
def test_every_byte_of_scattered_writes_and_reads_is_right(pair, seed):
    here, there, length = scattered_pages(pair, 500, seed)
    with pair.write(here, there, length) as batch:
        batch.wait(WAIT)
    copies = [pair.source[h : h + n].copy() for h, n in zip(here, length, strict=True)]
    for bytes_, t, n in zip(copies, there, length, strict=True):
        np.testing.assert_array_equal(pair.target[t : t + n], bytes_)
    for h, n in zip(here, length, strict=True):
        pair.source[h : h + n] = 0
    with pair.read(there, here, length) as batch:
        batch.wait(WAIT)
    for bytes_, h, n in zip(copies, here, length, strict=True):
        np.testing.assert_array_equal(pair.source[h : h + n], bytes_)


def test_a_full_pipeline_needs_few_doorbells_few_completions_and_no_object_for_a_slice(pair):
    n, chain, signal = 30_000, pair.here._settings.chain_length, pair.here.provider.signal
    offsets = np.arange(n, dtype=np.int64) * 256
    before, blocks = pair.here.stats().counts, sys.getallocatedblocks()
    batch = pair.write(offsets, length=200)
    in_flight = sys.getallocatedblocks() - blocks
    batch.wait(WAIT)
    after = sys.getallocatedblocks() - blocks
    counts = spent(pair, before)
    batch.close()
    chains = -(-n // chain)
    assert counts["work_requests"] == counts["completed"] == n
    assert counts["doorbells"] <= -(-n // 128)
    assert counts["doorbells"] == chains
    assert abs(counts["completions"] - -(-n // signal)) <= 1
    assert max(in_flight, after) < 500
    np.testing.assert_array_equal(pair.target.reshape(-1, 256)[:n, :200], pair.source.reshape(-1, 256)[:n, :200])


def test_slices_side_by_side_at_the_target_share_a_work_request(pair):
    n, order = 320, np.random.Generator(np.random.Philox(key=[5, 5])).permutation(320)
    before = pair.here.stats().counts
    with pair.write(order * 4096, np.arange(n) * 1024, 1024) as batch:
        batch.wait(WAIT)
    counts = spent(pair, before)
    assert counts["completed"] >= n - 8  # where neighbours happen to lie side by side at both ends they are one slice
    assert counts["work_requests"] <= n // SLICES_GATHERED + 8
    for i in range(n):
        at = order[i] * 4096
        np.testing.assert_array_equal(pair.target[i * 1024 : (i + 1) * 1024], pair.source[at : at + 1024])


def test_notifications_arrive_after_their_data_in_the_order_of_submission(pair):
    batches = []
    for i in range(20):
        pair.target[i * 4096] = 0
        batches.append(pair.write(i * 4096, length=4096, notify=b"%d" % i))
    seen = []
    while len(seen) < 20:
        note = pair.there.notifications().get(WAIT)
        i = int(note.message)
        assert pair.target[i * 4096] == pair.source[i * 4096]
        assert note.peer == pair.here.name
        seen.append(i)
    assert seen == list(range(20))
    for batch in batches:
        batch.wait(WAIT)
        batch.close()


@pytest.mark.parametrize("length", [1, 1500, 65_536])
def test_a_long_notification_arrives_as_it_was_sent(pair, length):
    message = np.random.Generator(np.random.Philox(length)).bytes(length)
    with pair.write(0, length=4096, notify=message) as batch:
        batch.wait(WAIT)
    assert [note.message for note in pair.there.notifications()] == [message]


def test_a_notification_longer_than_the_peer_takes_is_not_sent(rdma):
    with Engine("sender", provider=rdma()) as here, Engine("taker", provider=rdma(), note_bytes=100) as there:
        here.connect(there.address)
        for length in (112, 100):  # with what goes before it, in whole words: 112 bytes are taken
            batch = here.write(there.address, *[np.zeros(0, np.int64)] * 2, 8, notify=bytes(length))
            if length > 100:
                with pytest.raises(TransferFailed, match="INBOX_FULL"):
                    batch.wait(WAIT)
            else:
                batch.wait(WAIT)
            batch.close()
        assert [note.message for note in there.notifications()] == [bytes(100)]


def test_a_full_inbox_refuses_and_takes_again_when_it_was_fetched(pair):
    list(pair.there.notifications())
    for i in range(INBOX_NOTES // 2):  # as many as one sender may leave there
        with pair.write(np.zeros(0, np.int64), length=8, notify=b"%d" % i) as batch:
            batch.wait(WAIT)
    refused = pair.write(np.zeros(0, np.int64), length=8, notify=b"one too many")
    with pytest.raises(TransferFailed) as failed:
        refused.wait(WAIT)
    assert [failure.status for failure in failed.value.failures] == [Status.INBOX_FULL]
    refused.close()
    assert [int(note.message) for note in pair.there.notifications()] == list(range(INBOX_NOTES // 2))
    with pair.write(np.zeros(0, np.int64), length=8, notify=b"again") as batch:
        batch.wait(WAIT)
    assert [note.message for note in pair.there.notifications()] == [b"again"]


def test_everything_that_was_taken_came_back(pair):
    stats = pair.here.stats()
    assert stats.open_batches == 0
    assert stats.free_slices == stats.capacity_slices
    assert stats.counts["stale"] == 0


def counts_of(provider, other, store, policy):
    pair = Pair(provider, other, arena=1 << 20, store=store, policy=policy, queue_depth=64, chain=16, poll_lot=16)
    try:
        for n in (1, 16, 100, 300):
            with pair.write(np.arange(n) * 1024, length=600) as batch:
                batch.wait(WAIT)
    finally:
        pair.close()
    return assert_balanced(pair.here).counts


@pytest.mark.parametrize("store", STORES)
def test_every_policy_counts_the_same_work_as_on_the_emulated_nic(rdma, store):
    timing = {"polls", "parks", "wakes"}
    for policy in POLICIES:
        real = counts_of(rdma(queue_pairs=1, signal=1), rdma(), store, policy)
        emulated = counts_of(Emulated(Nic()), Emulated(Nic()), store, policy)
        probes = 1  # the empty write that opened the queue pair
        for kind in ("work_requests", "doorbells", "completions"):
            real[kind] -= probes
        assert {k: v for k, v in real.items() if k not in timing} == {
            k: v for k, v in emulated.items() if k not in timing
        }, policy
