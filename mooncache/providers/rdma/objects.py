"""Objects of pyverbs for each slice, which this provider avoids: `mooncache bench post` measures against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mooncache.kernels.enums import Opcode
from mooncache.kernels.verbs import SEND_SIGNALED
from mooncache.providers.rdma.library import load

WC_RDMA_WRITE = 1  # ibv_wc_opcode


def build_and_drop(slices: Sequence[tuple[int, int]], length: int, chain: int, signal: int) -> tuple[int, int]:
    """Make the objects that pyverbs needs to write these slices, and drop them; no device is involved.

    An SGE and a SendWR a slice, linked to chains as `QP.post_send` takes them, and a WC for each completion that is
    asked for, as `CQ.poll` makes it: every `signal` work requests and at a chain's end.

    Args:
        slices: (source, target) addresses.

    Returns:
        How many chains and how many completions there were.

    Raises:
        TransportError: pyverbs does not load; says what to do.
    """
    load()
    from pyverbs.cq import WC
    from pyverbs.wr import SGE, SendWR

    chains = completions = 0
    last: Any = None
    for number, (source, target) in enumerate(slices):
        place = number % chain + 1
        asks = place % signal == 0 or place == chain or number + 1 == len(slices)
        request = SendWR(
            wr_id=number,
            num_sge=1,
            sg=[SGE(source, length, 1)],
            opcode=Opcode.WRITE.value,
            send_flags=SEND_SIGNALED if asks else 0,
        )
        request.set_wr_rdma(1, target)
        if place == 1:
            chains += 1
        else:
            last.next_wr = request
        last = request
        if asks:
            completions += 1
            WC(wr_id=number, status=0, opcode=WC_RDMA_WRITE, byte_len=length, qp_num=1)
    return chains, completions
