"""Copies that are not gone on with once a word has changed, whatever interrupts them."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from mooncache.kernels import restartable
from mooncache.kernels.arrays import address_of, function_address
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.linux import IOVEC
from mooncache.kernels.restartable import CHANGED, PIECE_BYTES, R_OFFSET, R_RESTARTS, copy_while, writev_while
from tests.helpers import until

EXPECTED, OTHER = 7, 9
LENGTHS = [0, 1, 7, 8, 63, 64, 100, 511, 512, 513, 4096, 5000, 16384, 16385, PIECE_BYTES, PIECE_BYTES + 1, 300_001]


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def copying(target, source, length, word, expected, row):
    return copy_while(target, source, length, word, expected, row)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def writing(syscall, errno_location, pid, local, remote, n, word, expected, row):
    return writev_while(syscall, errno_location, pid, local, remote, n, word, expected, row)


def by_copy(target: int, source: int, length: int, word: int, expected: int, row: np.ndarray) -> bool:
    return bool(copying(target, source, length, word, expected, address_of(row)))


def by_writev(target: int, source: int, length: int, word: int, expected: int, row: np.ndarray) -> bool:
    """One system call for each piece, of this process into itself."""
    for at in range(0, length, PIECE_BYTES):
        piece = min(PIECE_BYTES, length - at)
        local, remote = np.array([source + at, piece]), np.array([target + at, piece])
        assert local.nbytes == IOVEC.itemsize
        moved = writing(
            function_address("syscall"), function_address("__errno_location"), os.getpid(), address_of(local),
            address_of(remote), 1, word, expected, address_of(row),
        )  # fmt: skip
        if moved == CHANGED:
            return False
        assert moved == piece, os.strerror(-moved)
    return True


BY_BANKS = 16384, 40_000
WAYS = {"copy": by_copy, "writev": by_writev}


@pytest.fixture(params=["restartable", "restartable by banks", "plain", "plain by banks"])
def row(request) -> np.ndarray:
    made = restartable.row(*(BY_BANKS if request.param.endswith("banks") else ()))
    if request.param.startswith("plain"):
        made[R_OFFSET] = 0
    elif not restartable.restarts(made):
        pytest.skip("this libc, system or CPU has no restartable sequences")
    return made


@pytest.mark.parametrize("way", WAYS)
def test_all_bytes_and_no_others_are_copied(row, way):
    chance = np.random.default_rng(5)
    source = chance.integers(0, 256, 400_000, dtype=np.uint8)
    word = np.array([EXPECTED])
    for length in LENGTHS:
        for _ in range(4):
            at, to = (int(chance.integers(0, 130)) for _ in range(2))
            target = np.full(source.size, 255, np.uint8)
            expected = target.copy()
            expected[to : to + length] = source[at : at + length]
            assert WAYS[way](address_of(target) + to, address_of(source) + at, length, address_of(word), EXPECTED, row)
            assert (target == expected).all(), (length, at, to)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_copied_when_the_word_differs(row, way):
    source, target, word = np.ones(300_000, np.uint8), np.zeros(300_000, np.uint8), np.array([OTHER])
    assert not WAYS[way](address_of(target), address_of(source), source.size, address_of(word), EXPECTED, row)
    assert not target.any()


def test_a_failure_of_the_system_is_told_from_a_change(row):
    word, pair = np.array([EXPECTED]), np.array([0, 64])
    calls = function_address("syscall"), function_address("__errno_location")
    at = address_of(pair)
    assert writing(*calls, os.getpid(), at, at, 1, address_of(word), EXPECTED, address_of(row)) == -14  # EFAULT


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_in_the_middle_costs_nothing_but_time(way):
    row = interruptible()
    chance = np.random.default_rng(6)
    source = chance.integers(0, 256, 4 << 20, dtype=np.uint8)
    target, word = np.zeros_like(source), np.array([EXPECTED])
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        while row[R_RESTARTS] < (20 if way == "copy" else 1):
            target[:] = 0
            assert WAYS[way](address_of(target), address_of(source), source.size, address_of(word), EXPECTED, row)
            assert (target == source).all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interruptible() -> np.ndarray:
    row = restartable.row()
    if not restartable.restarts(row):
        pytest.skip("this libc, system or CPU has no restartable sequences")
    return row


def is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_was_stopped_in_a_copy_does_not_go_on_with_it(way):
    """It copies again and again; it is stopped somewhere, the word changes, and then it goes on."""
    size, row = 4 << 20, interruptible()
    shared = np.frombuffer(mmap.mmap(-1, size + 4096), np.uint8)
    target, words = shared[:size], shared[size:].view(np.int64)
    source = np.full(size, 1, np.uint8)
    pid = os.fork()
    if pid == 0:
        copy_for_ever(WAYS[way], target, source, words, row)
    try:
        for round_ in range(1, 60):
            words[0] = round_
            wait_for(words, 1, round_)
            for _ in range(round_ % 7 * 300):
                pass
            os.kill(pid, signal.SIGSTOP)
            until(lambda: is_stopped(pid), "the child, stopped")
            words[0] = -round_
            target[:] = 255
            os.kill(pid, signal.SIGCONT)
            wait_for(words, 2, round_)
            assert (target == 255).all()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wait_for(words: np.ndarray, index: int, round_: int) -> None:
    until(lambda: words[index] == round_, f"round {round_} of the child")


def copy_for_ever(way: Callable[..., bool], target, source, words, row) -> None:
    """Of the child: copy while words[0] is the round's number; words[1] says that it does, words[2] that it ended."""
    round_ = 1
    try:
        while True:
            if words[0] != round_:
                continue
            words[1] = round_
            while way(address_of(target), address_of(source), source.size, address_of(words), round_, row):
                pass
            words[2] = round_
            round_ += 1
    finally:
        os._exit(1)
