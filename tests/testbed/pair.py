"""Two guests joined by links: the left one runs the tests, the right one does what they ask for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack

from tests.testbed import interpreter, network
from tests.testbed.guest import Guest
from tests.testbed.kernel import Kernel
from tests.testbed.single import terminal


def run(kernel: Kernel, command: Sequence[str], limit: int) -> int:
    """Boot both, run the command on the left, and return its exit status."""
    here = {
        "MOONCACHE_TEST_RDMA_DEVICE": network.RAILS[0].device,
        "MOONCACHE_TEST_PEER": f"{network.CONTROL.address('right')}:{network.PORT}",
    }
    scripts = {"left": shlex.join(command) + "\n", "right": "exec python -m tests.testbed.agent\n"}
    variables = interpreter.environment() | terminal() | here
    cables = network.Cables()
    with ExitStack() as stack:
        stack.callback(cables.close)
        guests = {}
        for side in network.SIDES:
            guests[side] = stack.enter_context(
                Guest(
                    side, kernel, network.script(side) + scripts[side], variables, memory="3G", cpus=2, limit=limit,
                    prefix=f"{side:<5} | ", devices=cables.devices(side), descriptors=cables.ends(side),
                )
            )  # fmt: skip
        cables.close()
        return guests["left"].wait(limit)
