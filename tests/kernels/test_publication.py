"""What Python publishes, workers see in order; what it takes back, nobody uses whom it then saw at rest."""

from __future__ import annotations

import numpy as np

from mooncache.kernels.publication import publish, withdraw_key
from tests.helpers import Task
from tests.kernels import entries

N = 20_000


def test_what_was_written_before_a_word_was_published_is_seen_by_whoever_sees_the_word():
    flag, payload = np.zeros(1, np.int64), np.zeros(N, np.int64)
    reader = Task(entries.receive, flag.ctypes.data, payload.ctypes.data, N)
    for i in range(N):
        payload[i] = i + 1
        publish(flag.ctypes.data, i + 1)
    assert reader.result() == 0


def test_a_withdrawn_key_is_not_used_by_a_copier_that_was_seen_at_rest():
    """The copier enters, looks and leaves, again and again; seen outside once, it does not find the key any more."""
    key, guard, late = np.zeros(1, np.int64), np.zeros(16, np.int64), np.zeros(1, np.int64)
    copier = Task(entries.use_many, key.ctypes.data, guard.ctypes.data, late.ctypes.data)
    for n in range(1, N):
        publish(key.ctypes.data, n)
        withdraw_key(key.ctypes.data)
        assert key[0] == 0
        seen = int(guard[0])
        while seen % 2 == 1 and int(guard[0]) == seen:
            pass
        publish(late.ctypes.data, n)  # from now on nobody may find key n
    publish(key.ctypes.data, -1)
    assert copier.result() == 0
