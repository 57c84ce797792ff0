"""Atomics between threads that really run at the same time: every kernel here gives the GIL up."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import Task, in_threads, random_bytes, until
from tests.kernels import entries

N = 200_000


def word(value: int = 0) -> np.ndarray:
    return np.full(1, value, np.int64)


def test_fetch_add_of_two_threads_loses_nothing():
    cell = word()
    in_threads(*[lambda: entries.add_many(cell.ctypes.data, N)] * 2)
    assert cell[0] == 2 * N


def test_compare_and_swap_of_two_threads_loses_nothing():
    cell = word()
    in_threads(*[lambda: entries.cas_many(cell.ctypes.data, N)] * 2)
    assert cell[0] == 2 * N


def test_exchange_hands_each_token_on_once():
    cell = word()
    out = in_threads(
        lambda: entries.exchange_many(cell.ctypes.data, 1, N),
        lambda: entries.exchange_many(cell.ctypes.data, 1_000_000, N),
    )
    put_in = sum(range(1, N + 1)) + sum(range(1_000_000, 1_000_000 + N))
    assert sum(out) + cell[0] == put_in


def test_what_was_written_before_a_release_is_seen_after_the_acquire():
    flag, payload = word(), np.zeros(10 * N, np.int64)
    _, missing = in_threads(
        lambda: entries.send(flag.ctypes.data, payload.ctypes.data, 10 * N),
        lambda: entries.receive(flag.ctypes.data, payload.ctypes.data, 10 * N),
    )
    assert missing == 0


def test_a_futex_sleeper_is_woken_and_sees_the_change():
    cell = word()
    sleeper = Task(entries.sleep, entries.SYSCALL_ADDRESS, cell.ctypes.data, 0, 0)
    until(lambda: entries.wake(entries.SYSCALL_ADDRESS, cell.ctypes.data, 1) == 1, "the sleeper, asleep")
    assert sleeper.result() == 0


def test_a_futex_does_not_sleep_when_the_word_has_changed_already():
    cell = word(1)
    assert entries.sleep(entries.SYSCALL_ADDRESS, cell.ctypes.data, 0, 0) == -1


def test_a_futex_sleep_ends_by_itself_after_its_longest_time():
    cell, timespec = word(), np.array([0, 1000], np.int64)  # 1 µs
    assert entries.sleep(entries.SYSCALL_ADDRESS, cell.ctypes.data, 0, timespec.ctypes.data) == -1


def test_copy_and_fill_touch_exactly_their_bytes():
    source, target = np.arange(100, dtype=np.uint8), np.full(100, 7, np.uint8)
    entries.copy_bytes(target.ctypes.data + 3, source.ctypes.data + 50, 13)
    entries.fill(target.ctypes.data + 40, 9, 5)
    expected = np.full(100, 7, np.uint8)
    expected[3:16] = np.arange(50, 63)
    expected[40:45] = 9
    np.testing.assert_array_equal(target, expected)


@settings(max_examples=300)
@given(
    length=st.integers(0, 70_000), source=st.integers(0, 200), target=st.integers(0, 200),
    banks=st.sampled_from([(1 << 62, 0), (0, 1 << 62), (20_000, 40_000)]),
)  # fmt: skip
def test_copying_past_the_caches_copies_exactly_the_range(length, source, target, banks):
    held, into = random_bytes(70_400), np.zeros(70_400, np.uint8)
    entries.stream_copy(into.ctypes.data + target, held.ctypes.data + source, length, *banks)
    np.testing.assert_array_equal(into[target : target + length], held[source : source + length])
    assert not into[:target].any()
    assert not into[target + length :].any()
