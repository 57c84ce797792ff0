"""Filling a batch while other Python threads run: whatever they change meanwhile, the outcome is that of some order."""

import ctypes
from itertools import product

import numpy as np
import pytest

from mooncache.errors import Status
from mooncache.kernels import calls
from mooncache.kernels.enums import Opcode, Store
from mooncache.kernels.submit import ASIDE_REQUESTS, submit
from tests.helpers import Rig, assert_free_list_whole

HERE, THERE = 1 << 40, 1 << 41
N = ASIDE_REQUESTS
BYTES = N * 32
HOOK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)


class Aside:
    """A rig, and what runs in it when a submit gives the GIL up and when it takes it again."""

    def __init__(self, store: Store = Store.POOL) -> None:
        self.rig = Rig(bare=True, slices=2 * N, store=store)
        self.region = self.rig.state.regions.add(HERE, BYTES, (0,), 7)
        self.there = self.rig.remote.add(THERE, BYTES, (0,), 3)
        self.at = {"before": self.nothing, "after": self.nothing}
        self.calls: list[str] = []
        self.hooks = [HOOK(lambda _, when=when: self.call(when)) for when in self.at]
        for field, hook in zip(("save_thread", "restore_thread"), self.hooks, strict=True):
            self.rig.caller.row[field] = ctypes.cast(hook, ctypes.c_void_p).value
        offsets = np.random.default_rng(1).permutation(N) * 32
        self.operands = [np.int64(HERE) + offsets, np.int64(THERE) + offsets, np.full(N, 8, np.int64)]

    def call(self, when: str) -> int:
        self.calls.append(when)
        self.at[when]()
        return 77

    def nothing(self) -> None:
        pass

    def submit(self, n: int = N) -> int:
        peer = self.rig.state.handle(0)
        return int(submit(self.rig.ctl, peer, Opcode.WRITE, 0, *(operand[:n] for operand in self.operands)))

    # what others do meanwhile
    def registers(self) -> None:
        self.rig.state.regions.add(HERE + 2 * BYTES, 64, (0,), 7)

    def unregisters(self) -> None:
        assert calls.withdraw(self.rig.ctl, np.array([self.region])) == 0
        self.rig.state.regions.recycle(self.region)

    def peer_registers(self) -> None:
        self.rig.remote.replace([*self.rig.remote.ranges(), (THERE + 2 * BYTES, 64, self.rig.remote.reserve())])

    def peer_unregisters(self) -> None:
        self.rig.remote.refuse(self.there)
        self.rig.remote.replace([])

    def forgets_the_peer(self) -> None:
        self.rig.state.disconnect(0)

    def stops(self) -> None:
        calls.stop(self.rig.ctl)

    def spoils_operands(self) -> None:
        self.operands[0][N // 2] = 5


@pytest.mark.parametrize("store", list(Store), ids=lambda s: s.name.lower())
@pytest.mark.parametrize(
    ("when", "what", "status"),
    [
        *((when, what, Status.OK) for when, what in product(
            ("before", "after"), ("nothing", "registers", "peer_registers"))),
        *((when, what, status) for when, (what, status) in product(("before", "after"), {
            "unregisters": Status.SOURCE_NOT_REGISTERED, "peer_unregisters": Status.TARGET_NOT_REGISTERED,
            "forgets_the_peer": Status.STALE_PEER, "stops": Status.CLOSED,
        }.items())),
        ("before", "spoils_operands", Status.SOURCE_NOT_REGISTERED),
        ("after", "spoils_operands", Status.OK),  # they were copied
    ],
)  # fmt: skip
def test_what_others_change_while_a_batch_is_filled(when, what, status, store):
    aside = Aside(store)
    rig, free = aside.rig, aside.rig.state.free_slices
    aside.at[when], expected = getattr(aside, what), np.sort(aside.operands[0])
    handle = aside.submit()
    assert aside.calls == ["before", "after"]
    assert rig.state.shared["filling"] == 0
    if status == Status.OK:
        assert handle >= 0
        assert rig.batch(handle)["slices"] == N
        assert rig.state.free_slices == free - N
        np.testing.assert_array_equal(np.sort(rig.array("slice_source")[: 2 * N])[-N:], expected)
        assert rig.counts["batches_submitted"] == 1
    else:
        assert handle == -status
        assert rig.state.free_slices == free
        assert rig.counts["batches_submitted"] == 0
        assert rig.counts["heap_allocated"] == rig.counts["heap_freed"]
        assert_free_list_whole(rig.state)


def test_a_small_batch_is_filled_with_the_gil_held():
    aside = Aside()
    assert aside.submit(N - 1) >= 0
    assert aside.calls == []


def test_a_refusal_names_the_request_and_changes_nothing():
    aside = Aside()
    aside.operands[1][N - 7] = THERE - 1
    assert aside.submit() == -Status.TARGET_NOT_REGISTERED
    assert calls.refused_request(aside.rig.ctl) == N - 7
    assert_free_list_whole(aside.rig.state)
