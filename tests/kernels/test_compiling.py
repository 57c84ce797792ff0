"""Threads that compile, look what is compiled, or fork meanwhile: none waits for ever."""

from __future__ import annotations

import threading
from typing import Any

import numba
import pytest
from llvmlite.binding import ffi
from numba.core.compiler_lock import global_compiler_lock

from mooncache.kernels import jit
from tests.family import Child, all_held
from tests.helpers import LIMIT, Task


class Told(jit._Lock):
    """Says when somebody is about to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def __enter__(self) -> None:
        self.asked.set()
        super().__enter__()


def test_who_compiles_one_kernel_does_not_wait_for_who_looks_whether_another_is_compiled(monkeypatch):
    one, another = jit._entries[:2]
    monkeypatch.setattr(jit, "_lock", lock := Told())
    with lock:  # as who compiles
        lock.asked.clear()
        looks = Task(lambda: one.file)
        assert lock.asked.wait(LIMIT)
        assert another.file
    assert looks.result()


def compile_one() -> Any:
    return numba.njit("int64(int64)")(lambda x: x + 1)(1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_compiles_whatever_was_being_compiled_when_it_was_forked():
    with all_held([global_compiler_lock._lock, ffi.lib._lock._lock], jit) as held:
        assert len(held) >= 3
        assert Child(compile_one).result() == 2
