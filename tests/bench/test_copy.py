"""`mooncache bench copy`, and the way of copying that engines take by what it has kept."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from mooncache import cli, copy_ways
from mooncache.bench import copy as bench
from mooncache.bench.harness import blocks
from mooncache.bench.harness.measure import FingerprintError
from mooncache.copy_ways import NONE, Banks
from mooncache.kernels.arrays import address_of
from mooncache.kernels.restartable import R_BANKS_BELOW, R_BANKS_FROM
from mooncache.limits import KiB
from mooncache.providers.careful import Copier


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A bench of milliseconds, and a place of its own for what it keeps."""
    monkeypatch.setattr(bench, "SIZES", (512, 16 * KiB))
    monkeypatch.setattr(bench, "TOTAL_BYTES", 1 << 18)
    monkeypatch.setattr(copy_ways, "base_directory", lambda: tmp_path / "cache")
    copy_ways.banks.cache_clear()
    yield
    copy_ways.banks.cache_clear()


def run(*arguments, status=0):
    result = CliRunner().invoke(cli.app, ["bench", "copy", "--repeat", "2", *arguments])
    assert result.exit_code == status, result.output
    return result


def test_it_measures_every_way_and_says_which_lengths_go_by_banks():
    report = json.loads(run("--json").stdout)
    assert [row["block_bytes"] for row in report["results"]] == [512, 16 * KiB]
    assert [row["blocks"] for row in report["results"]] == [512, 16]
    for row in report["results"]:
        figures = {way: row[f"{way}_ns_per_block"] for way in ("memcpy", "lines", "banks")}
        assert all(ns > 0 for ns in figures.values())
        assert figures[row["fastest"]] == min(figures.values())
    assert "Here it is best to copy" in run().stdout


def test_a_byte_that_is_not_copied_is_noticed(monkeypatch):
    monkeypatch.setattr(blocks.Copying, "timed", lambda self, way: 1e-3)
    with pytest.raises(FingerprintError, match="expected 512 blocks of 512B to be copied by MEMCPY, 512 were not"):
        bench.measure(512, 1, iter([1]))


@pytest.mark.parametrize(
    ("banks", "expected"),
    [
        ([10, 10, 10, 10], NONE),
        ([10, 5, 5, 10], Banks(2, 4)),
        ([5, 10, 5, 5], Banks(3, 5)),  # up to the longest that was measured
        ([9.6, 9.6, 9.6, 9.4], Banks(4, 5)),  # as fast is not worth it
    ],
)
def test_banks_are_for_the_longest_run_of_lengths_for_which_they_are_worth_it(banks, expected):
    rows = [
        {"block_bytes": size, "lines_ns_per_block": 10, "banks_ns_per_block": ns} for size, ns in enumerate(banks, 1)
    ]
    assert bench.by_banks(rows) == expected


def test_what_was_kept_is_what_engines_copy_by(monkeypatch):
    monkeypatch.setattr(bench, "by_banks", lambda rows: Banks(1 * KiB, 9 * KiB))
    assert "kept in" in run("--save", "--json").stderr
    copy_ways.banks.cache_clear()
    assert copy_ways.banks() == (1 * KiB, 9 * KiB)
    row = Copier()._restart
    assert (row[R_BANKS_FROM], row[R_BANKS_BELOW]) == (1 * KiB, 9 * KiB)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": [1]}', '{"x": ["a", 2]}', '{"x": 5}'])
def test_a_file_that_cannot_be_read_counts_as_none_and_is_made_anew(text, caplog):
    path = copy_ways.base_directory() / copy_ways.FILE
    path.parent.mkdir()
    path.write_text(text)
    assert copy_ways.banks() == copy_ways.KNOWN.get(copy_ways.cpu(), NONE)
    assert "bench copy --save` makes it anew" in caplog.text
    copy_ways.save(Banks(5, 6))
    copy_ways.banks.cache_clear()
    assert copy_ways.banks() == (5, 6)


def test_a_place_that_cannot_be_written_is_said():
    copy_ways.base_directory().write_text("a file")
    assert "cannot be written" in run("--save", status=2).output


def test_an_unknown_cpu_copies_by_lines(monkeypatch):
    monkeypatch.setattr(copy_ways, "cpu", lambda: ("", 0, 0))
    assert copy_ways.banks() == NONE


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("way", blocks.Way, ids=lambda w: w.name.lower())
def test_every_way_copies_all_blocks(way, threads):
    sources, targets = np.arange(4000, dtype=np.uint8), np.zeros(4000, np.uint8)
    offsets = np.arange(0, 4000, 40)
    copying = blocks.Copying(address_of(targets) + offsets, address_of(sources) + offsets, 30, threads)
    targets[:] = 0
    copying.copy(way)
    copying.close()
    np.testing.assert_array_equal(targets.reshape(-1, 40)[:, :30], sources.reshape(-1, 40)[:, :30])
    assert not targets.reshape(-1, 40)[:, 30:].any()
