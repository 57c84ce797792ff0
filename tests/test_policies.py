"""Each policy does what its file says of it (`TRAITS`), and who has to allow for it does: one test over all."""

from __future__ import annotations

import pytest

from mooncache.kernels.enums import Kind, Policy
from mooncache.kernels.reclaim.policies import TRAITS, traits_of
from mooncache.kernels.reclaim.traits import FreesIn
from tests.helpers import until

SLICES = 300  # more than a chunk


@pytest.mark.parametrize("policy", Policy, ids=lambda policy: policy.name)
def test_a_policy_frees_where_and_how_its_traits_say(pairs, policy):
    traits, pair = TRAITS[policy], pairs(policy=policy.name.lower())
    actors, callers = pair.here._runtime.actors, pair.here._callers
    pair.scattered(SLICES).wait(20).close()
    blocks = {
        FreesIn.WORKER: actors.workers, FreesIn.REAPER: [actors.reaper], FreesIn.CALLER: callers.blocks.values()
    }  # fmt: skip

    def count(kind: Kind) -> dict[FreesIn, int]:
        found = {where: sum(int(block.counters[kind]) for block in those) for where, those in blocks.items()}
        return {where: n for where, n in found.items() if n}

    how = Kind.SLICES_DROPPED if traits.whole_chain else Kind.SLICES_FREED
    freed = {traits.frees_in: SLICES} if traits.frees else {}
    until(lambda: sum(count(how).values()) == (SLICES if traits.frees else 0), "the slices, freed")
    assert count(how) == freed
    assert count(Kind.SLICES_FREED if traits.whole_chain else Kind.SLICES_DROPPED) == {}
    assert count(Kind.SLICES_LEAKED) == ({} if traits.frees else {FreesIn.CALLER: SLICES})
    assert sum(count(Kind.RETIRED).values()) == traits.retires
    if traits.frees:
        until(lambda: (stats := pair.here.stats()).free_slices == stats.capacity_slices, "all of the pool, free again")


@pytest.mark.parametrize("policy", Policy, ids=lambda policy: policy.name)
def test_an_engine_has_a_reaper_where_the_policy_needs_one(pairs, policy):
    pair = pairs(policy=policy.name.lower())
    reapers = [thread for thread in pair.here._runtime.actors.threads if thread.name.endswith("-reaper")]
    assert len(reapers) == TRAITS[policy].needs_reaper
    assert traits_of(policy.name.lower()) is TRAITS[policy]
