"""The kernel-driven rank and the slice-level model agree, tick for tick, on random small cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from mooncache.kernels import enums
from mooncache.kernels.enums import Kind, Policy, Store
from sim.clock import Environment
from sim.config import Scenario
from sim.costs import Prices
from sim.rank import FOREVER, Layer, Rank, Steps
from tests.sim.slice_model import CHUNK, Case, SliceModel, Spec

CASES, GROUPS = 420, 14
PAIRS = [(store, policy) for store in Store for policy in Policy]
NS, US = 1000, 1_000_000
BYTE_PS = (1, 4, 20, 80, 320)  # 8 Tb/s to 25 Gb/s: whole picoseconds a byte, so that both sides can be exact
# Where the worker gives slots back, a thread that waits for them sees them at the end of a round in sim/rank.py, and
# another that happens to ask meanwhile at its start: the order is not defined, so these have all the slots they need.
# So have cases in which nothing but polls costs time, where several threads would ask for slots at one tick.
NEVER_STARVED = (Policy.INLINE, Policy.EPOCH)

SCENARIO = Scenario.model_validate(
    {
        "name": "oracle",
        "workload": {
            "kind": "shape", "layers": 1, "ranks": 1, "slices": 1, "slice_bytes": "1B", "requests": 1,
            "arrival": {"every": "1s"},
        },
        "prefill": {"layer_time": "1ms"},
    }
)  # fmt: skip


class Seen(NamedTuple):
    """What both sides must agree on. Picoseconds."""

    ends: list[int]  # [layers]  last slice applied
    closes: list[int]  # [layers]  close returned
    spent: list[int]  # threads, worker, reaper
    counts: dict[str, int]
    most_chunks: int | None  # ever in use; None where the order of taking and giving back is not defined


# ------------------------------------------------------------------------------ both sides
def by_model(case: Case) -> tuple[Seen, SliceModel]:
    model = SliceModel(case).run()
    actors = (*model.threads, model.worker, model.reaper)
    seen = Seen(
        ends=[batch.end_ps for batch in model.batches],
        closes=[batch.close_ps for batch in model.batches],
        spent=[actor.spent_ps for actor in actors],
        counts={kind.name.lower(): model.counts[kind] for kind in Kind},
        most_chunks=None if case.policy in NEVER_STARVED else model.most_chunks,
    )
    return seen, model


def scenario_of(case: Case) -> Scenario:
    """The case as the configuration that sim/rank.py reads; unchecked, since a case goes beyond its bounds."""
    sections = {
        "engine": {
            "submit_threads": case.threads, "queue_depth": case.queue_depth, "chain": case.chain,
            "poll_lot": case.poll_lot, "pool_slices": case.pool_chunks * CHUNK,
        },
        "nic": {
            "rate": 8 * 10**12 // case.byte_ps, "latency": case.latency_ps,
            "message_rate": 10**12 // case.message_ps if case.message_ps else 2 * 10**12,
        },
        "reclaim": {
            "cache_slices": case.cache_slices, "period": case.reaper_period_ps, "lot": case.reaper_lot,
        },
    }  # fmt: skip
    return SCENARIO.model_copy(
        update={name: getattr(SCENARIO, name).model_copy(update=keys) for name, keys in sections.items()}
    )


def prices_of(case: Case) -> Prices:
    prices = Prices({}, {})
    for kind in Kind:
        prices.fixed[kind], prices.each[kind] = case.fixed.get(kind, 0), case.each.get(kind, 0)
    return prices


def by_kernels(case: Case, horizon: Callable[[int, int], int] = lambda now, ready: ready) -> Seen:
    """`horizon`: what the rank is told about when the next layer can become ready, from now and the truth."""
    env, next_ready = Environment(), case.layers[0].ready_ps
    rank = Rank(
        env, scenario_of(case), case.store.name.lower(), case.policy.name.lower(), prices_of(case), case.wake_ps,
        lambda: horizon(env.now, next_ready),
    )  # fmt: skip
    layers = [
        Layer(0, index, spec.slices, spec.slice_bytes, spec.ready_ps, lambda _: None)
        for index, spec in enumerate(case.layers)
    ]

    def feed() -> Steps:
        nonlocal next_ready
        for index, layer in enumerate(layers):
            yield env.timeout(layer.ready_ps - env.now)
            yield rank.tasks.put(layer)
            next_ready = layers[index + 1].ready_ps if index + 1 < len(layers) else FOREVER

    env.process(feed())
    env.run()
    engine = rank.engine
    assert not rank.starved, "threads wait for slots for ever"
    assert rank.closes == len(layers)
    return Seen(
        ends=[layer.done_ps for layer in layers],
        closes=[layer.done_ps + case.wake_ps + layer.close_ps for layer in layers],
        spent=[int(block.spent.sum()) for block in (*engine.callers, engine.worker, engine.reaper)],
        counts=enums.words_of(Kind, engine.counts),
        most_chunks=None if case.policy in NEVER_STARVED else engine.state.high_water_slices // CHUNK,
    )


# ------------------------------------------------------------------------------ cases
def random_case(number: int) -> Case:
    """Case `number`: pairs of store and policy in turn, everything else drawn."""
    draw = np.random.Generator(np.random.Philox(key=[2, number]))
    store, policy = PAIRS[number % len(PAIRS)]

    def upto(least: int, most: int) -> int:
        return int(draw.integers(least, most, endpoint=True))

    def skewed(least: int, most: int) -> int:
        """Small ones as often as large ones."""
        return min(most, int(least * np.exp(draw.random() * np.log(most / least)) + draw.random()))

    free = number % 10 == 4  # only polls cost time, so that much happens at one tick

    def price(most: int) -> int:
        return 0 if free or draw.random() < 0.3 else upto(1, most)

    threads = upto(1, 4)
    count = upto(1, 8)
    alike = draw.random() < 0.3  # layers of one size, as in a model; else each of its own
    sizes = [skewed(1, 600) for _ in range(count)]
    sizes = [sizes[0]] * count if alike else sizes
    gap = skewed(1, 100 * US)
    ready = np.cumsum([0 if draw.random() < 0.3 else upto(0, gap) for _ in range(count)]).tolist()
    layers = tuple(Spec(at, n, upto(1, 4096)) for at, n in zip(ready, sizes, strict=True))
    needed = [-(-n // CHUNK) for n in sizes]
    cache = upto(0, 3 * CHUNK)
    tight = policy not in NEVER_STARVED and draw.random() < 0.6 and not free
    most = max(needed) if tight else sum(needed)
    if policy == Policy.THREAD_CACHE:
        most += threads * (cache // CHUNK)  # what other threads keep never comes back
    return Case(
        store=store,
        policy=policy,
        layers=layers,
        threads=threads,
        pool_chunks=most,
        queue_depth=skewed(1, 64),
        chain=skewed(1, 64),
        poll_lot=skewed(1, 64),
        cache_slices=cache,
        reaper_lot=skewed(1, 1000),
        reaper_period_ps=upto(1, 100 * US),
        wake_ps=price(30 * US),
        message_ps=price(400 * NS),
        byte_ps=BYTE_PS[upto(0, len(BYTE_PS) - 1)],
        latency_ps=price(5 * US),
        fixed={kind: price(500 * NS) for kind in Kind} | ({Kind.POLLS: 2 * US} if free else {}),
        each={kind: price(100 * NS) for kind in Kind},
    )


@pytest.mark.parametrize("group", range(GROUPS))
def test_kernels_and_slice_model_agree_tick_for_tick(group: int) -> None:
    """Group by group of one pair of store and policy each."""
    for number in range(group, CASES, GROUPS):
        case = random_case(number)
        model, _ = by_model(case)
        assert by_kernels(case) == model, f"random_case({number}): {case}"


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(820, id="publication rings while the last, empty round is still being paid for"),
        pytest.param(3379, id="the same, when an epoch is retired"),
        pytest.param(18, id="reaper gives slots to waiting threads while the worker runs ahead"),
        pytest.param(58, id="worker's turn ends while a close gives slots back"),
    ],
)
def test_cases_that_once_disagreed(number: int) -> None:
    case = random_case(number)
    assert by_kernels(case) == by_model(case)[0]


@pytest.mark.parametrize("group", range(GROUPS))
def test_how_far_the_worker_runs_ahead_changes_nothing(group: int) -> None:
    """A rank that must come back to SimPy after every round sees what one sees that runs to its true horizon."""
    for number in range(CASES + group, CASES + 6 * GROUPS, GROUPS):
        case = random_case(number)
        assert by_kernels(case) == by_kernels(case, horizon=lambda now, ready: now), f"random_case({number})"


def test_two_publications_during_one_empty_round_are_taken_together() -> None:
    """The minimal form of case 820: a sleeper that is woken does not begin before its last round is over."""
    case = Case(
        store=Store.POOL, policy=Policy.BULK, threads=3, pool_chunks=3,
        layers=tuple(Spec(at * US, 1, 1) for at in (0, 25, 30)),
        queue_depth=4, chain=4, poll_lot=4, cache_slices=0, reaper_lot=1, reaper_period_ps=1,
        wake_ps=0, message_ps=0, byte_ps=1, latency_ps=50 * US, fixed={Kind.POLLS: 20 * US}, each={},
    )  # fmt: skip
    seen = by_kernels(case)
    # Rounds end at 20 and 40 us; the third takes both and posts at 40, the fourth polls from 60, and so on.
    assert seen.counts["batches_taken"] == 3
    assert seen.ends[1] == seen.ends[2]
    assert seen == by_model(case)[0]


def test_random_cases_reach_the_rare_paths() -> None:
    """Threads that wait for slots, full queues, lots of two batches, reuse of objects and chunks, epochs, restarts."""
    seen: set[str] = set()
    for number in range(140):
        case = random_case(number)
        result, model = by_model(case)
        counts = result.counts
        where = f"{case.store.name.lower()} + {case.policy.name.lower()}"
        seen.add(where)
        if model.waits_for_slots:
            seen.add("waits for slots under " + case.policy.name.lower())
        if counts["heap_reused"]:
            seen.add("objects reused")
        if case.store == Store.HEAP and counts["heap_cached"] and counts["heap_freed"]:
            seen.add("cache overflows")
        if case.policy == Policy.LEAK and model.leaked_chunks < counts["chunks_acquired"]:
            seen.add("leaking process restarted")
        if counts["doorbells"] < counts["work_requests"] and counts["work_requests"] > case.queue_depth:
            seen.add("chains wait for credits")
        if model.reaper.counts[Kind.SLICES_FREED] > case.reaper_lot:
            seen.add("reaper needs several lots")
        if len(set(result.ends)) < len(result.ends):
            seen.add("two batches end at one tick")
    wanted = {f"{store.name.lower()} + {policy.name.lower()}" for store, policy in PAIRS}
    starving = (p.name.lower() for p in Policy if p not in NEVER_STARVED)
    wanted |= {f"waits for slots under {policy}" for policy in starving}
    wanted |= {
        "objects reused", "cache overflows", "leaking process restarted", "chains wait for credits",
        "reaper needs several lots", "two batches end at one tick",
    }  # fmt: skip
    assert wanted <= seen, wanted - seen
