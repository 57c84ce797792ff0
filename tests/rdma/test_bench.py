"""`mooncache bench rdma` on the device. Its two processes are this one: to load two more takes a guest minutes."""

import json

import pytest
from typer.testing import CliRunner

from mooncache import cli
from mooncache.bench import rdma
from mooncache.bench.ends import rdma as rdma_end
from mooncache.bench.harness import perftest

N, REPEATS, DEPTH, SIGNAL = 200, 1, 64, 8
HEAD = {
    "device", "test", "reference", "reference_repeats", "block_bytes", "iterations", "repeats", "verified_bytes",
    "ratio",
}  # fmt: skip
STREAM = HEAD | {
    "seconds_p50", "seconds_min", "seconds_max", "messages_per_s", "gigabytes_per_s", "reference_messages_per_s",
    "reference_gigabytes_per_s", "work_requests", "doorbells", "completions", "polls",
}  # fmt: skip
SINGLE = HEAD | {"seconds_p50", "seconds_p99", "reference_seconds_p50", "reference_seconds_p99"}


class Here:
    """In place of `Process`: runs the commands in this process."""

    def __init__(self, module):
        assert module == rdma_end.__name__

    def tell(self, do, **command):
        self._came = rdma_end.HANDLERS[do](**command)

    def answer(self, patience):
        return self._came

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for role in list(rdma_end._sides):
            rdma_end.close(role)


def test_streams_and_latency_are_compared_with_perftest(device, monkeypatch, capsys):
    monkeypatch.setattr(rdma, "Process", Here)
    sizes = f"--iterations {N} --repeat {REPEATS} --depth {DEPTH} --signal {SIGNAL} --bytes 4KiB"
    result = CliRunner().invoke(cli.app, ["bench", "rdma", "--device", device, *sizes.split(), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (port,) = report["ports"]
    assert port["device"].startswith(device)
    assert (report["depth"], report["chain"], report["signal"]) == (DEPTH, DEPTH // 2, SIGNAL)
    *streams, single = report["results"]
    assert [row["test"] for row in streams] == ["write", "read"]
    for row in streams:
        assert set(row) - {"reference_error"} == STREAM
        assert row["work_requests"] == N
        assert row["doorbells"] == -(-N // (DEPTH // 2))
        assert abs(row["completions"] - -(-N // SIGNAL)) <= 1
        assert row["messages_per_s"] > 0
        assert row["verified_bytes"] == (REPEATS + 1) * rdma.PLACES * 4096
    assert set(single) - {"reference_error"} == SINGLE
    assert single["iterations"] == N // rdma.ONE_IN
    assert single["seconds_p99"] >= single["seconds_p50"] > 0
    rdma.show(report)
    shown = capsys.readouterr().out
    if not perftest.installed(*rdma.TESTS.values()):
        pytest.skip(perftest.CURE)
    assert "perftest" in shown
    for row in report["results"]:
        assert "reference_error" not in row
        assert row["ratio"] > 0
