"""Several NICs of a rank in the simulation: the policy that spreads slices over them is the engine's own."""

from __future__ import annotations

from typing import Any

import pytest

from sim.config import Scenario
from sim.costs import load_calibration, prices
from sim.fast import BatchCost, measure

SLICES, SLICE_BYTES = 20_000, 4096  # 1.6 ms at 400 Gb/s


def scenario(**nic: Any) -> Scenario:
    shape = {
        "kind": "shape", "layers": 1, "ranks": 1, "slices": SLICES, "slice_bytes": "4KiB", "requests": 1,
        "arrival": {"process": "fixed", "every": "0s"},
    }  # fmt: skip
    return Scenario.model_validate({"name": "test", "workload": shape, "prefill": {"layer_time": "1ms"}, "nic": nic})


def cost(**nic: Any) -> BatchCost:
    """What a batch costs on such NICs."""
    asked = scenario(**nic)
    return measure(
        asked, "pool", "bulk", prices(load_calibration("shipped"), asked, "bulk", SLICES), SLICES, SLICE_BYTES
    )


FULL = {"rate": "400Gbps", "message_rate": "200M/s"}
HALF = {"rate": "200Gbps", "message_rate": "100M/s"}


def test_two_rails_at_half_the_rate_take_about_as_long_as_one() -> None:
    one, two, half = cost(**FULL), cost(**HALF, rails=2), cost(**HALF)
    assert two.occupancy == pytest.approx(one.occupancy, rel=0.03)
    assert half.occupancy == pytest.approx(2 * one.occupancy, rel=0.03)
