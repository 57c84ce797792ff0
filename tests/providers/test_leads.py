"""A queue pair of a software wire keeps all that its worker may still read, whatever it is led to meanwhile."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from mooncache.kernels.arrays import address_of
from mooncache.providers.device import Device, Queue
from mooncache.providers.inprocess.base import QUEUE
from mooncache.providers.inprocess.loopback import ENTRY
from mooncache.providers.keys import KeyTable


def test_what_a_queue_pair_was_led_to_lives_until_it_rests():
    nothing: Any = SimpleNamespace(address=0)
    own, inbox = KeyTable(), np.zeros(8, np.int64)
    queue = Queue(Device(nothing, nothing), own, 4, QUEUE, ENTRY)
    read: list[tuple[int, weakref.ref[np.ndarray]]] = []  # where a worker may be reading
    for caller in ("one", "one", "other"):  # "one" looks again at what the peer has registered
        queue.lead_to(KeyTable(), inbox, caller)
        words = next(array for array in queue.held if address_of(array) == queue.row["sender"])
        read += [(queue.row["sender"], weakref.ref(words)), (queue.row["keys"], weakref.ref(queue.held[-1]))]
        del words
    gc.collect()
    assert all(array() is not None for _, array in read)
    assert read[0][0] == read[2][0]
    queue.rest(own)
    gc.collect()
    assert cast(Any, queue.held) == []
    assert read[0][1]() is None
