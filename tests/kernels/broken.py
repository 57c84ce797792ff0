"""Rigs whose queue pairs break, and ways to bring one into each state."""

from __future__ import annotations

from mooncache.kernels.enums import Order, QueueState
from mooncache.kernels.verbs import WcStatus
from tests.kernels.slate import SlateRig

CLOSED, READY, BROKEN, DRAINED, PROBING = QueueState
NONE, BREAK, RETURN, LOSE, PROBE = Order
LOST = int(WcStatus.RETRY_EXC_ERR)
BREAKS = {"breaks": True, "signal": 4, "gathers": 2}
BIG = 1 << 20


def rig_of(*rails, **settings) -> SlateRig:
    return SlateRig(*(rails or (BREAKS,)), **{"queue_depth": 64, "chain": 16, **settings})


def fail_all(posted) -> int:
    return LOST


def reach(rig: SlateRig, state: QueueState, rail: int = 0) -> None:
    """Bring a ready queue into a state; whatever is on it was not answered yet."""
    if state in (BROKEN, DRAINED, CLOSED, PROBING):
        if rig.served[rail] < rig.totals[rail] and state == BROKEN:
            rig.serve(rail, fail=fail_all, most=1)
        elif rig.served[rail] < rig.totals[rail]:
            rig.serve(rail, fail=fail_all)
        else:
            assert state != BROKEN, "only a queue with something on it stays broken"
            rig.order(rail, BREAK)
        rig.turn()
    if state in (CLOSED, PROBING):
        rig.order(rail, RETURN)
        rig.turn()
    if state == PROBING:
        rig.broken[rail] = False
        rig.order(rail, PROBE)
        rig.turn()
    assert rig.rows[rail].state == state
