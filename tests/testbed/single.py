"""One guest with one RDMA device over its loopback interface."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from tests.testbed import BedError, interpreter
from tests.testbed.guest import Guest
from tests.testbed.kernel import Kernel

DEVICE = "rxe0"

SCRIPT = """\
{{ modprobe rdma_rxe && rdma link add {device} type rxe netdev lo; }} || exit 1
{command}
"""


def run(kernel: Kernel, command: Sequence[str], limit: int) -> int:
    """Boot, run the command in the checkout with `DEVICE` there, and return its exit status."""
    variables = interpreter.environment() | terminal() | {"MOONCACHE_TEST_RDMA_DEVICE": DEVICE}
    script = SCRIPT.format(device=DEVICE, command=shlex.join(command))
    with Guest("single", kernel, script, variables, memory="4G", cpus=2, limit=limit) as guest:
        return guest.wait(limit)


def terminal() -> dict[str, str]:
    """What the guest has to be told of the terminal that its output ends up in."""
    told = {"COLUMNS": str(shutil.get_terminal_size((120, 24)).columns), "LANG": "C.UTF-8"}
    return told | ({"PY_COLORS": "1"} if sys.stdout.isatty() else {})


def run_here(command: Sequence[str], device: str) -> None:
    """Become the command, for a device that this machine has itself."""
    if not os.path.exists(f"/sys/class/infiniband/{device}"):
        raise BedError(
            f"MOONCACHE_TEST_RDMA_DEVICE={device}, and this machine has no such device (see `ibv_devices`): name one "
            "that it has, or unset the variable to run in a guest with Soft-RoCE"
        )
    folders = filter(None, [interpreter.pyverbs(), os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    os.execvp(command[0], list(command))
