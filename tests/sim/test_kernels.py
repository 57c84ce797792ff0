"""Which kernels a comparison compiles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mooncache.errors import CapacityError
from sim.kernels import KERNELS, compile_all
from sim.runs import side_by_side
from tests.helpers import environment

ALL_PAIRS = """
from mooncache.kernels import jit
from sim.config import Scenario
from sim.kernels import KERNELS
from sim.runs import Plan, run_all

shape = {"kind": "shape", "layers": 9, "ranks": 1, "slices": 600, "slice_bytes": "512B", "requests": 1,
         "arrival": {"every": "0s"}}
for mode in ("exact", "fast"):
    asked = {"name": "all", "workload": shape, "prefill": {"layer_time": "1us"}, "replications": 1, "mode": mode,
             "engine": {"pool_slices": 4096}}
    assert len(list(run_all(Plan(Scenario.model_validate(asked))))) == 14
called = {entry for entry in jit._entries if entry.compiled is not None}
assert called == set(KERNELS), [entry.__name__ for entry in called ^ set(KERNELS)]
"""


def test_those_that_are_compiled_beforehand_are_those_that_simulations_call() -> None:
    done = subprocess.run([sys.executable, "-c", ALL_PAIRS], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiling_tells_how_far_it_is_and_nothing_is_compiled_twice() -> None:
    for kernel in KERNELS:
        kernel.ready()
    told: list[tuple[int, int]] = []
    compile_all(map, lambda *step: told.append(step))
    assert told == []


def test_an_interrupt_ends_processes_at_once_and_in_silence() -> None:
    with side_by_side(2) as mapped:
        assert set(mapped(signal.getsignal, [signal.SIGINT] * 8)) == {signal.SIG_DFL}


def test_a_process_that_is_killed_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(CapacityError, match="--processes 1"), side_by_side(2) as mapped:
        list(mapped(os._exit, [1, 1, 1]))
