"""What `write` and `read` take, and how they refuse the rest."""

from __future__ import annotations

import numpy as np
import pytest

from mooncache import (
    UsageError,
)
from mooncache.operands import as_arrays
from tests.helpers import assert_balanced, unchanged


# ------------------------------------------------------------------------------ operands
def test_scalars_and_arrays_mix(pair):
    pair.here.write(pair.peer, pair.local.address, pair.remote.address + np.arange(4, dtype=np.int64) * 100, 9).wait(20)
    for i in range(4):
        np.testing.assert_array_equal(pair.target[i * 100 : i * 100 + 9], pair.source[:9])


@pytest.mark.parametrize("make", [int, np.int64, np.uint64, np.intp], ids=lambda m: m.__name__)
def test_integers_of_numpy_are_integers(pair, make):
    batch = pair.here.write(pair.peer, make(pair.local.address), make(pair.remote.address), make(33)).wait(20)
    assert (batch.requests, batch.slices) == (1, 1)
    np.testing.assert_array_equal(pair.target[:33], pair.source[:33])


def test_unsigned_arrays_are_taken_as_they_are(pair):
    offsets = np.arange(3, dtype=np.uint64) * 50
    source, target = np.uint64(pair.local.address) + offsets, np.uint64(pair.remote.address) + offsets
    pair.here.write(pair.peer, source, target, np.full(3, 20, np.uint64)).wait(20)
    np.testing.assert_array_equal(pair.target[100:120], pair.source[100:120])


def readonly(array):
    array.setflags(write=False)
    return array


# Ways in which the same addresses come out of a message, a file or a calculation.
HELD = {
    "a message": lambda a: np.frombuffer(a.tobytes(), np.int64),
    "behind an odd header": lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(np.int64),
    "unaligned and writable": lambda a: np.frombuffer(bytearray(b"x" + a.tobytes()), np.uint8)[1:].view(np.int64),
    "marked read-only": lambda a: readonly(a.copy()),
    "unsigned, read-only": lambda a: readonly(a.astype(np.uint64)),
    "a subclass": lambda a: a.view(np.recarray),
    "one, broadcast": lambda a: np.broadcast_to(a[:1], 1),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("notify", [None, b"note"])
def test_addresses_are_taken_however_numpy_holds_them(pair, held, notify):
    offsets = np.arange(1 if held == "one, broadcast" else 3, dtype=np.int64) * 100
    sources, targets = HELD[held](pair.local.address + offsets), HELD[held](pair.remote.address + offsets)
    lengths = HELD[held](np.full(len(offsets), 50, np.int64))
    pair.here.write(pair.peer, sources, targets, lengths, notify=notify).wait(20)
    for offset in offsets:
        np.testing.assert_array_equal(pair.target[offset : offset + 50], pair.source[offset : offset + 50])


def test_read_only_addresses_are_not_copied():
    held = readonly(np.arange(1 << 16, dtype=np.int64))
    (taken,) = as_arrays(held)
    assert np.shares_memory(taken, held)
    assert taken.flags.carray
    address = taken.ctypes.data
    del held
    assert taken[-1] == (1 << 16) - 1  # the memory lives as long as what was made of it
    assert taken.ctypes.data == address


def test_the_arrays_may_be_changed_as_soon_as_the_call_is_back(gated):
    offsets = np.arange(5, dtype=np.int64) * 100
    source, target = gated.local.address + offsets, gated.remote.address + offsets
    batch = gated.here.write(gated.peer, source, target, 50)
    source[:] = target[:] = 0
    gated.here.provider.open_gate()
    batch.wait(20)
    np.testing.assert_array_equal(gated.target[400:450], gated.source[400:450])


def test_empty_arrays_give_a_finished_batch(pair):
    empty = np.zeros(0, np.int64)
    for operands in [(empty, empty, empty), (empty, 5, 7), (5, 5, empty)]:
        batch = pair.here.write(pair.peer, *operands)
        assert batch.done
        assert batch.quiesced
        assert (batch.requests, batch.slices, batch.failures) == (0, 0, ())
        assert batch.wait() is batch
        batch.close()
    pair.close()
    assert_balanced(pair.here)


INT64 = "expected an int64 array of one contiguous dimension"
BAD_OPERANDS = {
    "unequal sizes": (lambda p: (arange(p.local, 3), arange(p.remote, 4), 8), r"arrays of equal length, got \(3,\)"),
    "one against many": (lambda p: (arange(p.local, 3), arange(p.remote, 3), np.full(1, 8)), "arrays of equal length"),
    "int32": (lambda p: (arange(p.local, 3), arange(p.remote, 3), np.full(3, 8, np.int32)), f"{INT64}, got int32"),
    "float64": (lambda p: (arange(p.local, 3).astype(float), arange(p.remote, 3), 8), f"{INT64}, got float64"),
    "two dimensions": (lambda p: (arange(p.local, 4).reshape(2, 2), arange(p.remote, 4), 8), rf"{INT64}.*\(2, 2\)"),
    "no dimension": (lambda p: (np.array(p.local.address), p.remote.address, 8), INT64),
    "strided": (lambda p: (arange(p.local, 6)[::2], arange(p.remote, 3), 8), f"{INT64}.*ascontiguousarray"),
    "masked": (lambda p: (np.ma.array(arange(p.local, 3)), arange(p.remote, 3), 8), "got a masked one"),
    "another byte order": (lambda p: (arange(p.local, 3).astype(">i8"), arange(p.remote, 3), 8), f"{INT64}, got >i8"),
    "objects": (lambda p: (arange(p.local, 3).astype(object), arange(p.remote, 3), 8), f"{INT64}, got object"),
    "a list": (lambda p: ([p.local.address], p.remote.address, 8), "expected an int64 array or an integer, got list"),
    "a float": (lambda p: (p.local.address, p.remote.address, 8.0), "got float"),
    "a bool": (lambda p: (p.local.address, p.remote.address, True), "got bool"),
    "None": (lambda p: (p.local.address, None, 8), "got NoneType"),
    "too big": (lambda p: (1 << 63, p.remote.address, 8), r"below 2\*\*63, got 9223372036854775808"),
    "too big unsigned": (lambda p: (np.uint64(1 << 63), p.remote.address, 8), r"below 2\*\*63"),
    "too small": (lambda p: (p.local.address, -(1 << 63) - 1, 8), r"below 2\*\*63"),
    "zero length": (lambda p: (p.local.address, p.remote.address, 0), "request 0: expected a length from 1 to .*got 0"),
    "negative length": (
        lambda p: (arange(p.local, 3), arange(p.remote, 3), np.array([8, 8, -7])),
        "request 2: expected a length from 1 to .*got -7",
    ),
    "length scalar for all": (lambda p: (arange(p.local, 3), arange(p.remote, 3), -1), "request 0: .*got -1"),
    "source not registered": (
        lambda p: (p.source.ctypes.data + p.source.nbytes, p.remote.address, 8),
        r"request 0: the source range \[0x[0-9a-f]+, \+8\) is not inside this engine's registered regions: nearest",
    ),
    "source runs out": (lambda p: (p.local.address + p.local.length - 7, p.remote.address, 8), "request 0: the source"),
    "source 0": (lambda p: (0, p.remote.address, 8), "the source range"),
    "negative source": (lambda p: (-1, p.remote.address, 8), "the source range"),
    "unsigned wrap": (lambda p: (np.full(1, (1 << 64) - 9, np.uint64), p.remote.address, 8), "the source range"),
    "target not registered": (
        lambda p: (p.local.address, p.local.address, 8),
        r"request 0: the target range .*peer 'there-\d+' has not registered all of it: nearest of 1",
    ),
    "target of one of many": (
        lambda p: (arange(p.local, 3), p.remote.address + np.array([0, p.remote.length - 4, 30]), 8),
        "request 1: the target range",
    ),
    "length beyond all": (lambda p: (p.local.address, p.remote.address, 1 << 41), r"request 0: expected a length"),
}


def arange(region, n):
    return region.address + np.arange(n, dtype=np.int64) * 100


@pytest.mark.parametrize("name", BAD_OPERANDS)
def test_a_bad_call_says_what_was_expected_and_what_came_and_changes_nothing(pair, name):
    operands, message = BAD_OPERANDS[name]
    pair.write(0, length=8).wait(20).close()
    before = unchanged(pair)
    with pytest.raises(UsageError, match=message):
        pair.here.write(pair.peer, *operands(pair))
    assert unchanged(pair) == before
    pair.write(100, length=8).wait(20).close()
    np.testing.assert_array_equal(pair.target[100:108], pair.source[100:108])


def test_a_bad_read_names_its_ends_the_right_way_round(pair):
    with pytest.raises(UsageError, match=r"the target range .* is not inside this engine's registered regions"):
        pair.here.read(pair.peer, pair.remote.address, 17, 8)
    with pytest.raises(UsageError, match=r"the source range .*: peer .* has not registered all of it"):
        pair.here.read(pair.peer, 17, pair.local.address, 8)
    only = pair.there.register(np.zeros(64, np.uint8), access="write")
    with pytest.raises(UsageError, match="does not permit reading"):
        pair.here.read(pair.peer, only.address, pair.local.address, 8)


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), "1", True])
def test_a_timeout_that_is_no_number_of_seconds_is_refused_and_nothing_submitted(engines, timeout):
    here, there = engines("here"), engines("there")
    local, remote = here.register(np.zeros(8, np.uint8)), there.register(np.zeros(8, np.uint8))
    with pytest.raises(UsageError, match="timeout in seconds"):
        here.write("there", local.address, remote.address, 8, timeout=timeout)
    assert here.stats().counts["batches_submitted"] == 0
    with here.write("there", local.address, remote.address, 8) as batch:
        with pytest.raises(UsageError, match="timeout in seconds"):
            batch.wait(timeout)
        batch.wait(20)
