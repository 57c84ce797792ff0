"""The C structs behind pyverbs objects are found by evidence instead of by trust.

A pyverbs object holds the address of its struct in a word that differs by class and version. Every word of the object
is tried; what one points to is taken only if it agrees with everything that pyverbs tells publicly about the object,
and only if nothing else does:

    Context      cmd_fd and num_comp_vectors
    PD           its context, and its handle
    CQ           its context, and cqe
    CompChannel  its context, and a descriptor of completion events
    QP           its context, PD, both CQs, its number, state and type

No word is followed before /proc/self/maps says that its target may be read. Offsets were compared with the C compiler's
for rdma-core 44 and 59, LP64 Linux.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from mooncache.errors import TransportError
from mooncache.kernels.records.verbs import IBV_CONTEXT, IBV_CQ, IBV_QP

CONTEXT_CMD_FD, CONTEXT_ASYNC_FD, CONTEXT_NUM_COMP_VECTORS = 264, 268, 272
PD_HANDLE, PD_BYTES = 8, 16
CHANNEL_FD, CHANNEL_BYTES = 8, 16  # struct ibv_comp_channel
CQ_CQE = 28
QP_PD, QP_SEND_CQ, QP_RECV_CQ, QP_NUMBER, QP_STATE, QP_TYPE = 16, 24, 32, 52, 56, 60
MR_LKEY, MR_RKEY = 36, 40

OBJECT_HEADER_BYTES = 16  # reference count and type of a Python object
EVENTS = "anon_inode:[infinibandevent]"  # what /proc/self/fd shows for a descriptor of completion events


class Operations(NamedTuple):
    """The addresses of a device's functions in its user-space driver."""

    post_send: int
    poll_cq: int
    req_notify_cq: int
    post_recv: int


def word(address: int) -> int:
    """Read the 64-bit word at an address."""
    return ctypes.c_uint64.from_address(address).value


def half(address: int) -> int:
    """Read the 32-bit word at an address."""
    return ctypes.c_uint32.from_address(address).value


def context_pointer(context: Any) -> int:
    """Find the `ibv_context` of a pyverbs Context. Raises TransportError when the evidence is not unique."""

    def fits(p: int) -> bool:
        return (half(p + CONTEXT_CMD_FD), half(p + CONTEXT_NUM_COMP_VECTORS)) == (
            context.cmd_fd,
            context.num_comp_vectors,
        )

    return _find(context, fits, IBV_CONTEXT.itemsize)


def pd_pointer(pd: Any, context: int) -> int:
    """Find the `ibv_pd` of a pyverbs PD whose `ibv_context` is at `context`. Raises TransportError."""
    return _find(pd, lambda p: word(p) == context and half(p + PD_HANDLE) == pd.handle, PD_BYTES)


def channel_pointer(channel: Any, context: int) -> int:
    """Find the `ibv_comp_channel` of a pyverbs CompChannel. Raises TransportError."""

    def fits(p: int) -> bool:
        return word(p) == context and _is_events(half(p + CHANNEL_FD))

    return _find(channel, fits, CHANNEL_BYTES)


def cq_pointer(cq: Any, context: int) -> int:
    """Find the `ibv_cq` of a pyverbs CQ. Raises TransportError."""
    return _find(cq, lambda p: word(p) == context and half(p + CQ_CQE) == cq.cqe, IBV_CQ.itemsize)


def qp_pointer(qp: Any, context: int, pd: int, send_cq: int, recv_cq: int) -> int:
    """Find the `ibv_qp` of a pyverbs QP, made from the structs at the other addresses. Raises TransportError."""

    def fits(p: int) -> bool:
        made_from = (word(p), word(p + QP_PD), word(p + QP_SEND_CQ), word(p + QP_RECV_CQ))
        is_now = (half(p + QP_NUMBER), half(p + QP_STATE), half(p + QP_TYPE))
        return made_from == (context, pd, send_cq, recv_cq) and is_now == (
            qp.qp_num,
            int(qp.qp_state),
            int(qp.qp_type),
        )

    return _find(qp, fits, IBV_QP.itemsize)


def operations(context: int) -> Operations:
    """Read the functions in the `ops` of the `ibv_context` at this address."""
    return Operations(*(word(context + int(IBV_CONTEXT.fields[name][1])) for name in Operations._fields))  # type: ignore[index]


def _find(instance: Any, fits: Callable[[int], bool], struct_bytes: int) -> int:
    readable = _readable()
    start, end = id(instance) + OBJECT_HEADER_BYTES, id(instance) + type(instance).__basicsize__
    found = {
        pointer
        for pointer in map(word, range(start, end, 8))
        if pointer % 8 == 0
        and any(low <= pointer and pointer + struct_bytes <= high for low, high in readable)
        and fits(pointer)
    }
    if len(found) != 1:
        raise TransportError(
            f"expected one word of pyverbs' {type(instance).__name__} to point to its C struct, {len(found)} do: this "
            "pyverbs is laid out in a way that Mooncache does not know. Use one of rdma-core 44 to 59, and report it"
        )
    return found.pop()


def _readable() -> list[tuple[int, int]]:
    ranges = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            where, permissions = line.split(maxsplit=2)[:2]
            if permissions[0] == "r":
                low, high = where.split("-")
                ranges.append((int(low, 16), int(high, 16)))
    return ranges


def _is_events(descriptor: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == EVENTS
    except OSError:
        return False
