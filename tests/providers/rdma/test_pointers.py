"""pyverbs objects without a device: their C struct is one of ours, and has to be found in them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mooncache.errors import TransportError
from mooncache.kernels.records.verbs import IBV_CONTEXT, IBV_CQ, IBV_QP
from mooncache.providers.rdma import pointers
from mooncache.providers.rdma.library import Verbs, load

OBJECT_WORD = 40  # where the classes below hold their pointer, in rdma-core 44 and 59

Instance = Callable[[Any, int], Any]


@pytest.fixture
def verbs() -> Verbs:
    try:
        return load()
    except TransportError as error:
        pytest.skip(str(error))


@pytest.fixture
def struct() -> Callable[..., int]:
    """Makes C structs: 32-bit words by offset, the others zero."""
    kept = []

    def make(size: int, **halves: int) -> int:
        array = np.zeros(size // 4, np.uint32)
        for name, value in halves.items():
            array[getattr(pointers, name) // 4] = value
        kept.append(array)
        return array.ctypes.data

    return make


@pytest.fixture
def instance() -> Iterator[Instance]:
    """Makes pyverbs objects around C structs, and empties them before pyverbs would give the structs back."""
    made = []

    def make(cls: Any, struct: int) -> Any:
        made.append(cls.__new__(cls))
        put(id(made[-1]) + OBJECT_WORD, struct)
        return made[-1]

    yield make
    for one in made:
        put(id(one) + OBJECT_WORD, 0)


def put(address: int, value: int) -> None:
    ctypes.c_uint64.from_address(address).value = value


@pytest.fixture
def context(struct: Callable[..., int]) -> int:
    return struct(IBV_CONTEXT.itemsize, CONTEXT_CMD_FD=4242, CONTEXT_NUM_COMP_VECTORS=17)


def test_the_context_is_found(verbs: Verbs, instance: Instance, context: int) -> None:
    found = instance(verbs.Context, context)
    assert (found.cmd_fd, found.num_comp_vectors) == (4242, 17)  # pyverbs looks where the struct was put
    assert pointers.context_pointer(found) == context


def test_the_protection_domain_is_found(
    verbs: Verbs, instance: Instance, context: int, struct: Callable[..., int]
) -> None:
    pd = struct(16, PD_HANDLE=99)
    put(pd, context)
    assert pointers.pd_pointer(instance(verbs.PD, pd), context) == pd


def test_the_completion_queue_is_found(
    verbs: Verbs, instance: Instance, context: int, struct: Callable[..., int]
) -> None:
    cq = struct(IBV_CQ.itemsize, CQ_CQE=4095)
    put(cq, context)
    assert pointers.cq_pointer(instance(verbs.CQ, cq), context) == cq


def test_the_queue_pair_is_found_by_all_that_it_was_made_from(
    verbs: Verbs, instance: Instance, context: int, struct: Callable[..., int]
) -> None:
    pd, send_cq, recv_cq = struct(16), struct(IBV_CQ.itemsize), struct(IBV_CQ.itemsize)
    qp = struct(IBV_QP.itemsize, QP_NUMBER=0x123456, QP_STATE=3, QP_TYPE=2)
    for offset, value in ((0, context), (pointers.QP_PD, pd)):
        put(qp + offset, value)
    put(qp + pointers.QP_SEND_CQ, send_cq)
    put(qp + pointers.QP_RECV_CQ, recv_cq)
    found = instance(verbs.QP, qp)
    assert (found.qp_num, int(found.qp_state), int(found.qp_type)) == (0x123456, 3, 2)
    assert pointers.qp_pointer(found, context, pd, send_cq, recv_cq) == qp
    with pytest.raises(TransportError, match="expected one word of pyverbs' QP to point to its C struct, 0 do"):
        pointers.qp_pointer(found, context, pd, recv_cq, send_cq)


def test_an_object_that_fits_twice_is_refused(
    verbs: Verbs, instance: Instance, context: int, struct: Callable[..., int]
) -> None:
    twin = struct(IBV_CONTEXT.itemsize, CONTEXT_CMD_FD=4242, CONTEXT_NUM_COMP_VECTORS=17)
    found = instance(verbs.Context, context)
    spare = id(found) + OBJECT_WORD + 8
    before = pointers.word(spare)
    put(spare, twin)
    try:
        with pytest.raises(TransportError, match="2 do"):
            pointers.context_pointer(found)
    finally:
        put(spare, before)


def test_words_that_point_nowhere_are_not_followed(verbs: Verbs, instance: Instance) -> None:
    found = instance(verbs.Context, 0)
    for nowhere in (8, 1 << 46, (1 << 64) - 8):
        put(id(found) + OBJECT_WORD, nowhere)
        with pytest.raises(TransportError, match="0 do"):
            pointers._find(found, nowhere.__eq__, IBV_CONTEXT.itemsize)


def test_operations_are_read_from_the_context(context: int) -> None:
    put(context + IBV_CONTEXT.fields["post_send"][1], 1)
    put(context + IBV_CONTEXT.fields["poll_cq"][1], 2)
    put(context + IBV_CONTEXT.fields["req_notify_cq"][1], 3)
    put(context + IBV_CONTEXT.fields["post_recv"][1], 4)
    assert pointers.operations(context) == (1, 2, 3, 4)
