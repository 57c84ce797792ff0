import json

import numpy as np
import pytest
from typer.testing import CliRunner

from mooncache import cli
from mooncache.bench import post
from mooncache.bench.harness import measure
from mooncache.errors import TransportError
from mooncache.kernels import enums
from mooncache.providers.rdma import library, objects

ROW = {"signal", "ns_per_work_request", "ns_per_completion", "pyverbs_ns_per_slice", "ratio", "fingerprint"}
TOP = (ROW - {"fingerprint"}) | {
    "bench", "slices", "slice_bytes", "chain", "queue_depth", "repetitions", "pyverbs_missing", "results", "provenance",
}  # fmt: skip


def bench(*arguments, status=0):
    """Run `mooncache bench post ...`; returns its result, and its report if it printed one."""
    result = CliRunner().invoke(cli.app, ["bench", "post", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result, json.loads(result.stdout) if "--json" in arguments and result.stdout else None


def rig(slices, signal=16):
    return post.Rig(signal, measure.scattered(slices, post.SLICE_BYTES))


@pytest.fixture
def without_pyverbs(monkeypatch):
    def nothing():
        raise TransportError("RDMA needs pyverbs: it is not installed. Install it: apt-get install python3-pyverbs")

    monkeypatch.setattr(objects, "load", nothing)


def test_without_pyverbs_its_figures_are_null_and_say_why(without_pyverbs, capsys):
    _, report = bench("--slices", 1000, "--repeat", 2, "--json")
    assert set(report) == TOP
    assert (report["slices"], report["chain"], report["signal"], report["repetitions"]) == (1000, 128, 16, 2)
    assert [row["signal"] for row in report["results"]] == [16, 1]
    for row in report["results"]:
        assert set(row) == ROW
        assert row["ns_per_work_request"] > 0
        assert row["ns_per_completion"] > 0
        assert row["pyverbs_ns_per_slice"] is row["ratio"] is None
    assert "apt-get install python3-pyverbs" in report["pyverbs_missing"]
    post.show(report)
    shown = " ".join(capsys.readouterr().out.split())
    assert "No figures of pyverbs: RDMA needs pyverbs" in shown


def test_pyverbs_is_compared_where_it_is_installed(capsys):
    if library.installed().problem is not None:
        pytest.skip(str(library.installed().problem))
    _, report = bench("--slices", 300, "--repeat", 2, "--json")
    assert report["pyverbs_missing"] is None
    for row in report["results"]:
        total = row["ns_per_work_request"] + row["ns_per_completion"]
        assert row["ratio"] == pytest.approx(row["pyverbs_ns_per_slice"] / total, rel=0.02)
    post.show(report)
    assert "times as long" in capsys.readouterr().out


def test_objects_of_pyverbs_ask_for_as_many_completions():
    if library.installed().problem is not None:
        pytest.skip(str(library.installed().problem))
    assert objects.build_and_drop([(1 << 40, 1 << 41)] * 300, 512, 128, 16) == (3, 8 + 8 + 3)
    assert objects.build_and_drop([(1 << 40, 1 << 41)] * 300, 512, 128, 1) == (3, 300)


@pytest.mark.parametrize(
    ("slices", "signal", "doorbells", "completions"),
    [(1, 16, 1, 1), (128, 16, 1, 8), (129, 16, 2, 9), (1000, 16, 8, 7 * 8 + 7), (1000, 1, 8, 1000), (300, 100, 3, 5)],
)
def test_the_fingerprint_is_that_of_full_chains(slices, signal, doorbells, completions):
    bench_rig = rig(slices, signal)
    for _ in range(3):
        bench_rig.live(counted=True)
    assert (bench_rig.expected["doorbells"], bench_rig.expected["completions"]) == (doorbells, completions)
    assert bench_rig.fingerprint == {what: 3 * n for what, n in bench_rig.expected.items()}
    assert len(bench_rig.post) == len(bench_rig.poll) == 3


def test_work_that_was_not_done_is_an_error():
    lost = rig(300)
    lost.live(counted=True)
    lost.stub.row["requests"] -= 1
    with pytest.raises(measure.FingerprintError, match="posted_to_the_stub with a completion every 16: expected 600"):
        lost.live(counted=True)


@pytest.mark.parametrize("field", ["remote_addr", "rkey", "send_flags", "wr_id", "sg_list"])
def test_a_wrong_work_request_is_an_error(field):
    forged = rig(300)
    forged.live(counted=True)
    forged.worker.work_requests[field][7] ^= 4
    with pytest.raises(measure.FingerprintError, match="that differ: expected 0, came 1"):
        forged.check_last_chain()


def test_slices_that_nobody_answers_are_an_error():
    silent = rig(300)
    silent.stub.row["tail"] = 1000  # nothing seems to be left to report
    with pytest.raises(measure.FingerprintError, match="status of the batch"):
        silent.live(counted=True)
    assert np.count_nonzero(silent.states == enums.Slice.POSTED) == 300


@pytest.mark.parametrize("options", [("--slices", 0), ("--slices", 1_000_001), ("--repeat", 0)])
def test_sizes_out_of_range_are_refused(options):
    bench(*options, status=2)
