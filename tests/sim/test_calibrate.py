"""Calibration measures every table with the real kernels, threads and malloc, and the simulator takes the file.

Sizes are cut down so that it takes seconds; what comes out is a time, so only its shape is checked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from mooncache.cli import app
from sim import calibrate, malloc_bench
from sim.config import PAIRS, load_scenario
from sim.costs import TABLES, Calibration, load_calibration
from sim.runs import Job, simulate

SIZES, PAIRS_ON_AN_ARENA = (256, 30_000), (1, 2)  # the worker's chains are always measured with 30,000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`mooncache calibrate`: its file, and what it said on stderr."""
    path = tmp_path_factory.mktemp("calibration") / "here.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "SIZES", SIZES)
        patch.setattr(calibrate, "PAIRS", PAIRS_ON_AN_ARENA)
        patch.setattr(calibrate, "PROCESSES", 1)
        patch.setattr(calibrate, "repeats_for", lambda slices: 15)
        result = CliRunner().invoke(app, ["calibrate", "--output", str(path), "--name", "here"])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    return path, result.stderr


@pytest.fixture(scope="module")
def measured(written: tuple[Path, str]) -> Calibration:
    return load_calibration(str(written[0]))


def test_every_table_comes_out_with_plausible_points(measured: Calibration) -> None:
    assert set(measured.tables) == set(TABLES)
    for name, points in measured.tables.items():
        assert points, name
        for point in points:
            assert 0 <= point.p5 <= point.ns <= point.p95, name
            assert point.repeats >= 9, name


def test_tables_have_the_sizes_and_thread_numbers_asked_for(measured: Calibration) -> None:
    def axes(table: str) -> set[tuple[int, int]]:
        return {(point.slices, point.pairs) for point in measured.tables[table]}

    for table in ("fill", "free_slice", "work_request", "completion"):
        assert axes(table) == {(n, 1) for n in SIZES}
    for table in ("allocate_fresh", "allocate_same", "allocate_contended", "free_same", "free_contended"):
        assert axes(table) == {(n, pairs) for n in SIZES[1:] for pairs in PAIRS_ON_AN_ARENA}


def test_it_says_where_it_was_measured_and_what_it_is_at(written: tuple[Path, str], measured: Calibration) -> None:
    path, said = written
    assert measured.name == "here"
    assert measured.machine == calibrate.machine()
    assert all(str(value) for value in measured.machine.model_dump().values())
    for title, _ in calibrate.PARTS:
        assert f"measuring: {title}" in said
    assert path.name in said


def test_a_simulation_runs_on_it(tmp_path: Path, written: tuple[Path, str]) -> None:
    workload = {
        "kind": "shape", "layers": 2, "ranks": 2, "slices": 500, "slice_bytes": "512B", "requests": 2,
        "arrival": {"every": "1ms"},
    }  # fmt: skip
    content = {
        "name": "t", "workload": workload, "prefill": {"layer_time": "50us"}, "calibration": str(written[0]),
        "engine": {"arenas": "shared"},
    }  # fmt: skip
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(content))
    asked = load_scenario(tmp_path / "t.yaml")
    for pair in PAIRS:
        run = simulate(Job(asked, pair, 0))
        assert (run.response > 0).all()
        assert run.figures.closes == 2 * 2 * 2


def test_median_and_spread_are_those_of_the_samples() -> None:
    found = calibrate.point([float(v) for v in np.arange(101)], 256, 2)
    assert (found.p5, found.ns, found.p95, found.repeats, found.slices, found.pairs) == (5, 50, 95, 101, 256, 2)
    assert calibrate.point([-3.0, -2.0, -1.0], 1).ns == 0, "a difference of two measurements may fall below zero"


def test_malloc_patterns_time_every_layer_that_counts() -> None:
    layers = malloc_bench.SKIPPED + 4
    for pairs in (1, 2):
        found = malloc_bench.measure(300, pairs, layers)
        assert {name: len(samples) for name, samples in found.items()} == {
            "allocate_contended": 4 * pairs, "free_contended": 4 * pairs, "allocate_same": 4 * pairs,
            "free_same": 4 * pairs, "allocate_fresh": 4 * pairs,
        }  # fmt: skip
        assert all(sample >= 0 for samples in found.values() for sample in samples)
