"""The fence that kernel tests can be run behind does end a process that steps over it."""

import signal

import pytest

from tests.helpers import run_python

STEP = """
import ctypes
import tests.fence
from mooncache.kernels.arrays import address_of
from mooncache.kernels.tables import RegionTable
from mooncache.limits import REGIONS

table = RegionTable("a peer")
for column in (table.bases, table.ends, table.slots, table.access, table.renewed, table.refused):
    word = ctypes.c_int64.from_address
    assert word(address_of(column)).value == word(address_of(column) + 8 * (REGIONS - 1)).value == 0
print("within", flush=True)
word(address_of(table.refused) + 8 * {index}).value
"""


@pytest.mark.parametrize(("fence", "index"), [("low", "-1"), ("high", "REGIONS")])
def test_a_step_over_the_fence_ends_the_process(fence, index):
    done = run_python(STEP.replace("{index}", index), FENCE=fence)
    assert done.stdout == "within\n"
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize(("fence", "index"), [("low", "0"), ("high", "(REGIONS - 1)")])
def test_and_no_other(fence, index):
    assert run_python(STEP.replace("{index}", index), FENCE=fence).returncode == 0
