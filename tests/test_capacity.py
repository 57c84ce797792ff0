"""What happens when slots, batch rows or memory run out."""

from __future__ import annotations

import logging
import threading

import pytest

from mooncache import CapacityError, transfers
from tests.helpers import Task, assert_balanced, in_threads, unchanged, until


def test_a_submit_waits_for_slots_until_another_batch_is_closed(pairs):
    pair = pairs(slices=512)
    first = pair.scattered(512).wait(20)
    second = Task(pair.scattered, 512)
    until(lambda: pair.state.shared["waiters"] == 1, "the submitter, asleep")
    assert second.running
    first.close()
    second.result().wait(20).close()


def test_a_submit_waits_for_a_batch_row_until_another_batch_is_closed(pairs):
    pair = pairs(batches=2)
    first, other = pair.scattered(1).wait(20), pair.scattered(1).wait(20)
    third = Task(pair.scattered, 1)
    until(lambda: pair.state.shared["waiters"] == 1, "the submitter, asleep")
    first.close()
    third.result().wait(20).close()
    other.close()


@pytest.mark.parametrize(
    ("settings", "n", "what"), [({"batches": 1}, 1, "batch rows"), ({"slices": 512}, 512, "slots")]
)
def test_a_submit_that_may_wait_for_ever_says_once_for_what(pairs, monkeypatch, caplog, settings, n, what):
    monkeypatch.setattr(transfers, "PATIENCE_NS", 0)
    pair = pairs(**settings)
    first = pair.scattered(n).wait(20)
    with caplog.at_level(logging.WARNING, "mooncache"):
        second = Task(pair.scattered, n)
        until(lambda: caplog.records, "the warning")
        until(lambda: pair.state.shared["waiters"] == 1, "the submitter, asleep")
        with pytest.raises(CapacityError, match=f"too few free {what}"):
            pair.scattered(n, timeout=0.3)  # which is told, and warns of nothing
        first.close()
        second.result().wait(20).close()
    (record,) = caplog.records
    assert f"too few free {what}" in record.getMessage()
    assert "1 of" in record.getMessage()


def test_many_submitters_share_a_pool_that_holds_one_batch(pairs):
    pair = pairs(slices=256)

    def run() -> int:
        for _ in range(50):
            pair.scattered(200).wait(20).close()
        return 50

    assert in_threads(run, run, run) == [50] * 3
    pair.close()
    assert assert_balanced(pair.here).counts["completed"] == 150 * 200


def test_a_submit_that_waits_for_slots_fails_at_its_deadline(pairs):
    pair = pairs(slices=512)
    with pair.scattered(300).wait(20):
        before = unchanged(pair)
        for timeout in (0, 0.01):
            with pytest.raises(CapacityError, match=r"too few free slots: .* none came back before the timeout"):
                pair.scattered(300, timeout=timeout)
        assert unchanged(pair) == before
    pair.scattered(512, timeout=20).wait(20).close()


def test_no_batch_row_before_the_deadline_is_a_capacity_error(pairs):
    pair = pairs(batches=1)
    with pair.scattered(1).wait(20), pytest.raises(CapacityError, match="too few free batch rows"):
        pair.scattered(1, timeout=0.01)


def test_a_batch_that_can_never_fit_is_refused_at_once(pairs):
    pair = pairs(slices=512)
    before = unchanged(pair)
    with pytest.raises(CapacityError, match=r"more slices than the pool has slots \(512\)"):
        pair.scattered(513)
    assert unchanged(pair) == before


def test_without_memory_for_slice_objects_a_submit_is_refused_and_gives_all_back(pairs):
    import ctypes

    pair = pairs(store="heap", slices=2048)
    pair.scattered(10).wait(20).close()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    left, made = [700], []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
    def stingy(size):
        left[0] -= 1
        if left[0] < 0:
            return None
        made.append(libc.malloc(size))
        return made[-1]

    words = pair.here._callers.blocks[threading.get_ident()].row
    honest, words["malloc"] = words["malloc"], ctypes.cast(stingy, ctypes.c_void_p).value or 0
    try:
        with pytest.raises(CapacityError, match="malloc has no more memory"):
            pair.scattered(600)
    finally:
        words["malloc"] = honest
    stats = pair.here.stats()
    assert stats.free_slices == 2048
    assert stats.open_batches == 0
    assert stats.counts["slices_filled"] == 10
    pair.scattered(2048, timeout=20).wait(20).close()
    counts = pair.here.stats().counts
    assert counts["slices_filled"] == 2058
    assert counts["heap_allocated"] == counts["heap_freed"] == 2058 + 350  # two mallocs an object
