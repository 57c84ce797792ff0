"""A real RDMA device on a machine that has none: Soft-RoCE (`rdma_rxe`) in QEMU guests that share this file system.

`python -m tests.testbed test` boots one guest with the device `rxe0` and runs `tests/rdma` in it; `two-hosts` boots
two, joined by a control link and two rails, and runs `tests/rdma/two_hosts`; `run -- COMMAND` runs anything in one
guest. A guest uses the host's own files: what is edited here is what runs there. Its processor is emulated, so times
mean nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mooncache-testbed"


class BedError(Exception):
    """The test bed cannot be had, or was lost; the message says what to do."""
