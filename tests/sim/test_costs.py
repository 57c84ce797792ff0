"""Calibration files and price lists: looked up, interpolated, refused; and who pays which table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mooncache.errors import UsageError
from mooncache.kernels.enums import KINDS, Kind
from sim.config import POLICIES, Scenario
from sim.costs import PS_PER_NS, TABLES, Calibration, Point, Prices, digest, load_calibration, prices
from sim.errors import ConfigError

MACHINE = {
    "cpu": "c", "cores": 2, "kernel": "k", "libc": "l", "python": "p", "numba": "n", "numpy": "n",
}  # fmt: skip
IN_WORKER = ("inline", "deferred", "epoch")  # or in a reaper: not the thread that allocates


def point(slices: int, ns: float, pairs: int = 1) -> dict[str, Any]:
    return {"slices": slices, "pairs": pairs, "ns": ns, "p5": ns, "p95": ns, "repeats": 25}


def calibration(**tables: list[dict[str, Any]]) -> Calibration:
    """Each table's number, starting at 1, is its cost in ns, unless said otherwise."""
    every = {name: [point(100, float(number))] for number, name in enumerate(TABLES, 1)}
    content = {
        "format": 1,
        "name": "made up",
        "measured": "2026-01-01",
        "machine": MACHINE,
        "tables": {**every, **tables},
    }
    return Calibration.model_validate(content)


def scenario(ranks: int = 4, **engine: Any) -> Scenario:
    shape = {
        "kind": "shape", "layers": 1, "ranks": ranks, "slices": 100, "slice_bytes": "512B", "requests": 1,
        "arrival": {"every": "1s"},
    }  # fmt: skip
    return Scenario.model_validate({"name": "t", "workload": shape, "prefill": {"layer_time": "1ms"}, "engine": engine})


# ------------------------------------------------------------------------------ looking up
def test_a_measured_point_is_returned_as_it_is_and_others_lie_on_the_line_between() -> None:
    c = calibration(fill=[point(100, 10.0), point(300, 30.0), point(200, 12.0)])  # in any order
    assert [c.ns("fill", n) for n in (100, 200, 300)] == [10, 12, 30]
    assert c.ns("fill", 150) == pytest.approx(11)
    assert c.ns("fill", 275) == pytest.approx(25.5)


def test_beyond_the_measured_sizes_the_nearest_point_holds() -> None:
    c = calibration(fill=[point(100, 10.0), point(300, 30.0)])
    assert c.ns("fill", 1) == 10
    assert c.ns("fill", 10**7) == 30


def test_threads_on_an_arena_are_interpolated_at_the_size_asked_for() -> None:
    c = calibration(allocate_same=[point(100, 10.0), point(200, 20.0), point(100, 50.0, 4), point(200, 80.0, 4)])
    assert c.ns("allocate_same", 150, 1) == pytest.approx(15)
    assert c.ns("allocate_same", 150, 4) == pytest.approx(65)
    assert c.ns("allocate_same", 150, 2) == pytest.approx(15 + 50 / 3)


@pytest.mark.parametrize("pairs", [0, 5, 8])
def test_more_threads_than_were_measured_are_refused_not_guessed(pairs: int) -> None:
    c = calibration(allocate_same=[point(100, 10.0, 1), point(100, 50.0, 4)])
    with pytest.raises(UsageError, match=rf"'made up'.*'allocate_same'.*1 to 4 threads.*came {pairs}") as caught:
        c.ns("allocate_same", 100, pairs)
    assert "engine.arenas to own" in str(caught.value)


def test_a_table_of_one_number_of_threads_holds_for_all() -> None:
    assert calibration(fill=[point(100, 10.0)]).ns("fill", 100, 64) == 10


# ------------------------------------------------------------------------------ files
def test_the_shipped_file_loads_and_is_complete() -> None:
    shipped = load_calibration("shipped")
    assert set(shipped.tables) == set(TABLES)
    for name, points in shipped.tables.items():
        assert points, name
        assert len({(p.slices, p.pairs) for p in points}) == len(points), f"{name} has a point twice"
        for p in points:
            assert p.p5 <= p.ns <= p.p95, name
            assert p.repeats >= 9, name
    assert {p.pairs for p in shipped.tables["allocate_contended"]} >= {1, 4}, "TP4 on one arena needs four pairs"
    for name in ("fill", "work_request", "completion", "allocate_same", "free_contended"):
        assert max(p.slices for p in shipped.tables[name]) >= 30_000, name


def test_the_shipped_file_knows_that_freeing_on_the_heap_costs_more_than_in_the_pool() -> None:
    shipped = load_calibration("shipped")
    for n in (4096, 30_000, 120_000):
        assert shipped.ns("free_contended", n) > shipped.ns("free_slice", n) > shipped.ns("free_chunk", n) / 256
        assert shipped.ns("free_same", n) > 5 * shipped.ns("free_slice", n)


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_file_of_ones_own_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    shipped = load_calibration("shipped")
    path = write(tmp_path / "c.json", shipped.model_dump_json(indent=1))
    assert load_calibration(path) == shipped
    assert digest(load_calibration(path)) == digest(shipped)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibration.*mooncache calibrate"):
        load_calibration(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="calibration"):
        load_calibration(str(tmp_path))  # a folder


@pytest.mark.parametrize("table", TABLES)
def test_each_missing_or_empty_table_is_named(tmp_path: Path, table: str) -> None:
    content = calibration().model_dump()
    content["tables"][table] = []
    with pytest.raises(ConfigError, match=rf"tables.*\b{table}\b"):
        load_calibration(write(tmp_path / "empty.json", content))
    del content["tables"][table]
    with pytest.raises(ConfigError, match=rf"tables.*\b{table}\b"):
        load_calibration(write(tmp_path / "missing.json", content))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("format", lambda c: c.update(format=2)),
        ("machine.libc", lambda c: c["machine"].pop("libc")),
        ("machine.governor", lambda c: c["machine"].update(governor="x")),
        ("tables.fill.0.ns", lambda c: c["tables"]["fill"][0].update(ns=-1.0)),
        ("tables.fill.0.ns", lambda c: c["tables"]["fill"][0].update(ns="fast")),
        ("tables.fill.0.slices", lambda c: c["tables"]["fill"][0].update(slices=0)),
        ("tables.fill.0.repeats", lambda c: c["tables"]["fill"][0].pop("repeats")),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(tmp_path: Path, key: str, change: Any) -> None:
    content = calibration().model_dump()
    change(content)
    with pytest.raises(ConfigError) as caught:
        load_calibration(write(tmp_path / "c.json", content))
    (problem,) = caught.value.problems
    assert problem.key == key
    assert problem.where.endswith("c.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"ns": NaN}'])
def test_what_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected a calibration file"):
        load_calibration(write(tmp_path / "c.json", text))


def test_a_digest_is_short_stable_and_changes_with_every_figure() -> None:
    content = {"format": 1, "name": "made up", "measured": "2026-01-01", "machine": MACHINE}
    c = Calibration.model_validate({**content, "tables": {"fill": [point(100, 2.0)]}})
    assert digest(c) == "75f5fabdf276", "results would no longer name the calibration that they were made with"
    assert digest(c.model_copy(update={"name": "other"})) != digest(c)
    assert digest(Calibration.model_validate({**content, "tables": {"fill": [point(100, 2.5)]}})) != digest(c)


# ------------------------------------------------------------------------------ prices
def table_number(name: str) -> int:
    """What `calibration()` says that the table costs, ps."""
    return (list(TABLES).index(name) + 1) * PS_PER_NS


ALWAYS = {
    "fixed": {
        Kind.BATCHES_SUBMITTED: "submit_call",
        Kind.DOORBELLS: "doorbell",
        Kind.POLLS: "poll",
        Kind.BATCHES_FINISHED: "batch",
        Kind.BATCHES_CLOSED: "close_call",
    },
    "each": {
        Kind.SLICES_FILLED: "fill",
        Kind.WORK_REQUESTS: "work_request",
        Kind.COMPLETIONS: "completion",
        Kind.SLICES_FREED: "free_slice",
        Kind.CHUNKS_FREED: "free_chunk",
        Kind.HEAP_REUSED: "reuse",
        Kind.HEAP_CACHED: "keep",
    },
}


@pytest.mark.parametrize("policy", POLICIES)
def test_which_table_each_kind_of_work_is_priced_by(policy: str) -> None:
    how = "fresh" if policy == "leak" else "contended" if policy in IN_WORKER else "same"
    each = {
        **ALWAYS["each"],
        Kind.HEAP_ALLOCATED: f"allocate_{how}",
        Kind.HEAP_FREED: "free_contended" if how == "contended" else "free_same",
    }
    found = prices(calibration(), scenario(), policy, 100)
    for array, tables in ((found.fixed, ALWAYS["fixed"]), (found.each, each)):
        expected = [table_number(tables[kind]) if kind in tables else 0 for kind in Kind]
        assert array.tolist() == expected


def test_shared_arenas_are_priced_by_the_number_of_ranks_and_only_the_allocator_is() -> None:
    tables = {
        name: [point(100, 1.0), point(100, 9.0, 4)]
        for name in ("allocate_fresh", "allocate_same", "allocate_contended", "free_same", "free_contended")
    }
    c = calibration(**tables)
    for policy in POLICIES:
        own, shared = (prices(c, scenario(arenas=arenas), policy, 100) for arenas in ("own", "shared"))
        heap = [Kind.HEAP_ALLOCATED, Kind.HEAP_FREED]
        assert own.each[heap].tolist() == [1000, 1000]
        assert shared.each[heap].tolist() == [9000, 9000]
        assert shared.fixed.tolist() == own.fixed.tolist()
        others = [kind for kind in Kind if kind not in heap]
        assert shared.each[others].tolist() == own.each[others].tolist()


def test_more_ranks_on_one_arena_than_were_measured_are_refused() -> None:
    shipped = load_calibration("shipped")
    prices(shipped, scenario(ranks=8, arenas="own"), "inline", 100)
    with pytest.raises(UsageError, match="came 8"):
        prices(shipped, scenario(ranks=8, arenas="shared"), "inline", 100)


def test_prices_are_whole_picoseconds() -> None:
    found = Prices({Kind.POLLS: 4.8765}, {Kind.WORK_REQUESTS: 0.0004, Kind.COMPLETIONS: 2.5})
    assert found.fixed.dtype == found.each.dtype == "int64"
    assert len(found.fixed) == len(found.each) == KINDS
    assert (found.fixed[Kind.POLLS], found.each[Kind.WORK_REQUESTS], found.each[Kind.COMPLETIONS]) == (4876, 0, 2500)


def test_a_point_must_be_a_measurement() -> None:
    assert Point.model_validate(point(1, 0.0)).ns == 0
    for wrong in ({"ns": -1.0}, {"repeats": 0}, {"pairs": 0}, {"p5": float("nan")}, {"unit": "ns"}):
        with pytest.raises(ValueError, match="validation error"):
            Point.model_validate({**point(1, 1.0), **wrong})
