import json
import os
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from mooncache import Engine, cli, cores
from mooncache.bench import gil, lifecycle, placement, soak, turnover
from mooncache.bench.harness import measure, options
from mooncache.bench.harness.report import figure
from mooncache.providers.inprocess.emulated import Emulated


def bench(*arguments, status=0):
    """Run `mooncache bench ...`; returns its result, and its report if it printed one."""
    result = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result, json.loads(result.stdout) if "--json" in arguments and result.stdout else None


# ------------------------------------------------------------------------------ lifecycle
ROW = {
    "store", "policy", "thread", "slices", "submit_ns_per_slice", "reference_ns_per_slice", "complete_ns_per_slice",
    "nic_ns_per_slice", "release_us_p50",
    "release_us_p99", "step_ms_p50", "step_ms_max", "repeats",
}  # fmt: skip


def test_lifecycle_measures_every_pair_thread_and_size():
    _, report = bench("lifecycle", "--slices", 1, "--slices", 300, "--repeat", 2, "--json")
    measured = [(r["store"], r["policy"], r["thread"], r["slices"]) for r in report["results"]]
    assert len(measured) == len(set(measured)) == 2 * 7 * 2 * 2
    for row in report["results"]:
        assert set(row) == ROW
        assert row["repeats"] == 2
        assert row["release_us_p99"] >= row["release_us_p50"] > 0
        assert row["submit_ns_per_slice"] > 0
        assert row["complete_ns_per_slice"] > 0
        assert row["nic_ns_per_slice"] > 0
        assert row["reference_ns_per_slice"] > 0
    assert report["release_ratio_heap_on_close_to_pool_bulk"] > 0
    assert report["submit_one_us_p50"] > 0
    assert "million" not in report
    assert report["provenance"]["cores"] >= 1


def test_lifecycle_of_a_million_says_what_its_steps_took():
    options = ("--store", "pool", "--policy", "bulk", "--thread", "same", "--repeat", 1)
    _, report = bench("lifecycle", "--slices", 1_000_000, *options, "--json")
    assert set(report["million"]) == {"release_us_p50", "release_us_p99", "step_ms_p50", "step_ms_max"}
    assert report["release_ratio_heap_on_close_to_pool_bulk"] is None


def test_lifecycle_for_people_shows_units_and_a_sentence():
    options = ("--policy", "on_close", "--policy", "bulk", "--thread", "same", "--repeat", 2)
    shown, _ = bench("lifecycle", "--slices", 300, *options)
    assert "release" in shown.stdout
    assert "µs" in shown.stdout
    assert "Closing a batch takes its caller" in shown.stdout


@pytest.mark.parametrize("option", ["--store", "--policy", "--thread"])
def test_lifecycle_refuses_unknown_names(option):
    refused, _ = bench("lifecycle", option, "nothing", "--json", status=2)
    assert refused.stdout == ""
    assert f"Invalid value for '{option}'" in refused.stderr


@pytest.mark.parametrize("slices", [0, 1_000_001])
def test_lifecycle_refuses_sizes_out_of_range(slices):
    bench("lifecycle", "--slices", slices, status=2)


def test_work_that_was_not_done_is_an_error(monkeypatch):
    def one_lost(engine):
        stats = measure.wait_until_quiet(engine)
        return replace(stats, counts={**stats.counts, "completed": stats.counts["completed"] - 1})

    monkeypatch.setattr(lifecycle, "wait_until_quiet", one_lost)
    refused, _ = bench("lifecycle", "--slices", 2, "--repeat", 1, "--json", status=2)
    assert refused.stdout == ""
    assert "completed: expected" in refused.stderr


# ------------------------------------------------------------------------------ gil
def test_gil_compares_alone_with_beside_and_verifies_the_bytes():
    _, report = bench("gil", "--seconds", 0.4, "--json")
    assert report["throughput_ratio"] > 0
    assert report["submit_p50_ratio"] > 0
    for way in ("alone", "beside_busy_thread"):
        assert report[way]["gb_per_s"] > 0
        assert report[way]["submit_us_p99"] >= report[way]["submit_us_p50"]


def test_gil_notices_a_byte_that_did_not_arrive():
    with Engine(slices=256 * 100, slice_bytes=4096) as engine, Engine(slices=1) as sink:
        transfer = gil.Transfer(engine, sink)
        transfer.stamp(1)
        transfer.round(0.0)
        transfer.verify()
        place = int(transfer.traffic.target[7]) - transfer.traffic.target_buffer.ctypes.data
        transfer.traffic.target_buffer[place + 4095] ^= 1
        with pytest.raises(measure.FingerprintError, match="1 did not"):
            transfer.verify()


# ------------------------------------------------------------------------------ turnover
@pytest.mark.parametrize("provider", ["shm", "tcp"])
def test_turnover_sees_every_peer_and_map_and_looks_at_both_processes(provider):
    _, report = bench("turnover", "--provider", provider, "--peers", 20, "--batches", 50, "--maps", 5, "--json")
    assert report["verdict"] == "ok"
    assert (report["peers"], report["maps"]) == (20, 5)
    assert report["batches"] >= 50
    assert report["map_ms"]["max"] > 0
    assert report["growth"].keys() == {"here", "there"}
    assert [seen[0] for seen in report["seen"]] == list(range(1, 21))


def test_turnover_exits_with_1_when_something_grows(monkeypatch):
    monkeypatch.setitem(turnover.MOST, "threads", -1)
    _, report = bench("turnover", "--peers", 2, "--batches", 1, "--maps", 1, "--json", status=1)
    assert report["verdict"] == "violated"
    assert any("threads of the process here grew by" in line for line in report["violations"])


# ------------------------------------------------------------------------------ soak
def test_soak_finds_everything_back_at_every_quiet_point():
    _, report = bench("soak", "--layers", 12, "--slices", 300, "--json")
    assert report["verdict"] == "ok"
    assert report["violations"] == []
    assert [layer for layer, _ in report["rss_mib"]] == [2, 4, 6, 8, 10, 12]
    assert report["free_slices"] == report["capacity_slices"] == 4 * 512
    assert report["stale"] == 0


def test_soak_exits_with_1_when_memory_grows(monkeypatch):
    monkeypatch.setattr(soak, "GROWTH_MIB", -1.0)
    _, report = bench("soak", "--layers", 4, "--slices", 10, "--json", status=1)
    assert report["verdict"] == "violated"
    assert "resident memory grew" in report["violations"][0]


def test_soak_notes_slots_that_are_missing(monkeypatch):
    monkeypatch.setattr(soak, "slots_of", lambda slices: measure.slots_of(slices) + 1)
    shown, _ = bench("soak", "--layers", 4, "--slices", 10, status=1)
    assert "finished and not closed" in shown.stdout


def test_soak_needs_as_many_layers_for_each_thread():
    bench("soak", "--layers", 5, status=2)


# ------------------------------------------------------------------------------ placement
def test_placement_tells_who_frees():
    pairs = ("heap+inline", "heap+on_close", "heap+deferred", "pool+bulk", "pool+leak")
    options = [word for pair in pairs for word in ("--pair", pair)]
    _, report = bench("placement", "--layers", 3, "--slices", 600, "--ranks", 2, "--quick", *options, "--json")
    rows = {f"{row['store']}+{row['policy']}": row for row in report["results"]}
    assert set(rows) == set(pairs)
    assert (report["layers"], report["rounds"]) == (3, 1)
    assert rows["heap+inline"]["worker_freeing_s"] > 0
    assert rows["heap+inline"]["caller_freeing_s"] < rows["heap+on_close"]["caller_freeing_s"]
    assert rows["heap+on_close"]["worker_freeing_s"] == 0
    assert rows["heap+deferred"]["reaper_freeing_s"] > 0
    assert rows["pool+bulk"]["worker_free_share"] == 0
    for row in rows.values():
        assert set(row) == {"store", "policy", *placement.FIELDS, "worker_free_share"}


def test_placement_for_people_has_a_sentence():
    shown, _ = bench("placement", "--layers", 2, "--slices", 300, "--ranks", 1, "--quick")
    assert "times as long as" in shown.stdout


@pytest.mark.parametrize("pair", ["heap", "heap+", "bulk+pool", "heap+bulk+pool"])
def test_placement_refuses_what_is_not_a_pair(pair):
    bench("placement", "--pair", pair, status=2)


# ------------------------------------------------------------------------------ what they share
def test_scattered_requests_never_touch():
    traffic = measure.scattered(1000, 512)
    for buffer, places in ((traffic.source_buffer, traffic.source), (traffic.target_buffer, traffic.target)):
        at = np.sort(places) - buffer.ctypes.data
        assert (np.diff(at) >= 1024).all()
        assert at[0] == 0
        assert at[-1] + 512 <= buffer.size
    again = measure.scattered(1000, 512)
    assert (np.diff(again.source) == np.diff(traffic.source)).all()


def quiet_stats(store, policy):
    traffic = measure.scattered(300, 512)
    with (
        Engine(provider=Emulated(measure.FREE_WIRE), store=store, policy=policy, slices=8192) as engine,
        Engine(provider=Emulated(measure.FREE_WIRE), slices=1) as sink,
    ):
        engine.register(traffic.source_buffer)
        sink.register(traffic.target_buffer)
        for _ in range(3):
            engine.write(sink.name, *traffic.operands).wait().close()
        return measure.wait_until_quiet(engine)


@pytest.mark.parametrize("store", options.STORES)
@pytest.mark.parametrize("policy", options.POLICIES)
def test_counts_agree_for_the_work_done_and_for_no_other(store, policy):
    stats = quiet_stats(store, policy)
    measure.expect_counts(stats, 900, 3, store, policy)
    for kind in ("slices_filled", "completed", "failed", "stale", "batches_closed"):
        other = replace(stats, counts={**stats.counts, kind: stats.counts[kind] + 1})
        with pytest.raises(measure.FingerprintError, match=kind):
            measure.expect_counts(other, 900, 3, store, policy)
    if policy != "leak":
        with pytest.raises(measure.FingerprintError, match="free slots"):
            measure.expect_counts(replace(stats, free_slices=stats.free_slices - 256), 900, 3, store, policy)


def test_cores_are_given_back():
    before = os.sched_getaffinity(0)
    with measure.on_own_cores():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_lists_of_cpus(tmp_path):
    (tmp_path / "siblings").write_text("0,8-10\n")
    assert cores.cpus_of(tmp_path / "siblings") == {0, 8, 9, 10}
    assert cores.cpus_of(tmp_path / "absent") == set()


def test_figures_keep_three_digits():
    assert [figure(cell) for cell in (0.01234, 12.345, 1234.5, 30_000, "pool")] == [
        "0.0123", "12.3", "1,234", "30,000", "pool",
    ]  # fmt: skip
