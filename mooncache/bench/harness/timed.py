"""An emulated NIC whose own work is timed apart from the engine's, and what an engine's fill is compared with."""

from __future__ import annotations

import numpy as np

from mooncache.kernels.account import CLOCK_MONOTONIC, NS_PER_S
from mooncache.kernels.arrays import Row, address_of, function_address, rows_of
from mooncache.kernels.atomics import call_clock_gettime, call_poll_cq, call_post_send, copy, i16, i32
from mooncache.kernels.jit import callback, kernel
from mooncache.kernels.records.base import TIMESPEC, record_at, row, where
from mooncache.kernels.records.verbs import IBV_CONTEXT, ibv_cq_at, ibv_qp_at
from mooncache.kernels.state import SLICE_DTYPES
from mooncache.providers.device import Device
from mooncache.providers.inprocess import nic
from mooncache.providers.inprocess.emulated import Emulated

TIMED = row(
    [
        ("context", IBV_CONTEXT),  # whose functions are those below
        ("post_send", np.int64),  # addresses of the NIC's own
        ("poll_cq", np.int64),
        ("clock_gettime", np.int64),
        ("timespec", TIMESPEC),  # scratch of `now`
        ("spent", np.int64),  # ns in the NIC's functions, polls that found nothing left out
    ]
)
timed_at = record_at(TIMED)


@kernel
def now(timed):
    """Read CLOCK_MONOTONIC, ns."""
    call_clock_gettime(timed.clock_gettime, CLOCK_MONOTONIC, where(timed, "timespec"))
    return timed.timespec.seconds * NS_PER_S + timed.timespec.ns


@callback("int32(int64, int64, int64)")
def post_send(qp, wr, bad_wr):
    """Let the NIC post a chain, and note how long that took."""
    timed = timed_at(ibv_qp_at(qp).context)
    begin = now(timed)
    error = call_post_send(timed.post_send, qp, wr, bad_wr)
    timed.spent += now(timed) - begin
    return np.int32(error)


@callback("int32(int64, int32, int64)")
def poll_cq(cq, entries, wc):
    """Let the NIC report completions, and note how long that took."""
    timed = timed_at(ibv_cq_at(cq).context)
    begin = now(timed)
    taken = call_poll_cq(timed.poll_cq, cq, entries, wc)
    if taken > 0:
        timed.spent += now(timed) - begin
    return np.int32(taken)


class TimedDevice(Device):
    """A device that calls an emulated NIC's functions and times them. One worker uses it."""

    def __init__(self) -> None:
        rows = rows_of(TIMED)
        self.timed, self.context = Row(rows), Row(rows["context"])
        self.timed.set(
            post_send=nic.post_send.address,
            poll_cq=nic.poll_cq.address,
            clock_gettime=function_address("clock_gettime"),
        )
        self.context.set(post_send=post_send.address, poll_cq=poll_cq.address)


class TimedEmulated(Emulated):
    """An emulated NIC of one worker that says how long its functions took."""

    device: TimedDevice

    def new_device(self) -> TimedDevice:
        """Make a device that times."""
        return TimedDevice()

    @property
    def spent_ns(self) -> int:
        """The ns that its functions have taken so far."""
        return self.device.timed["spent"]


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def fill_columns(n, sources, targets, length, source, target, lengths, first, last, local, remote, state):
    """Fill the columns of `n` slices in one pass, and nothing else: no check, no chunk, no region. The GIL is held."""
    copy(source, sources, 8 * n)
    copy(target, targets, 8 * n)
    for i in range(n):
        i32(lengths)[i], i32(first)[i], i32(last)[i] = length, i, i
    for i in range(n):
        i16(local)[i], i16(remote)[i], i16(state)[i] = 0, 0, 1
    return 0


class Columns:
    """The columns of a batch's slices, as an engine has them, to be filled by a plain loop."""

    def __init__(self, sources: np.ndarray, targets: np.ndarray, length: int) -> None:
        self._held = [sources, targets, *(np.zeros(sources.size, SLICE_DTYPES[name]) for name in FILLED)]
        places = [address_of(array) for array in self._held]
        self._operands = sources.size, *places[:2], length, *places[2:]

    def fill(self) -> None:
        """Fill them once."""
        fill_columns(*self._operands)


FILLED = (
    "slice_source", "slice_target", "slice_length", "slice_first", "slice_last", "slice_local", "slice_remote",
    "slice_state",
)  # fmt: skip
