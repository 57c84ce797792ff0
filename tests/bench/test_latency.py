import itertools
import json
import os

import pytest
from typer.testing import CliRunner

from mooncache import cli
from mooncache.bench import latency
from mooncache.bench.harness.process import Process

ROW = {
    "provider", "transport", "op", "slices", "block_bytes", "seconds_p50", "seconds_p99", "reference",
    "reference_seconds_p50", "reference_seconds_p99", "ratio", "repeats", "verified_bytes",
}  # fmt: skip


def bench(*arguments, status=0):
    """Run `mooncache bench latency ...`; returns its result, and its report if it printed one."""
    result = CliRunner().invoke(cli.app, ["bench", "latency", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result, json.loads(result.stdout) if "--json" in arguments and result.stdout else None


@pytest.mark.parametrize(("provider", "ops"), [("loopback", ["write"]), ("tcp", ["write", "read"]), ("shm", ["read"])])
def test_every_size_is_measured_and_verified(provider, ops, capsys):
    options = ("--provider", provider, *(word for op in ops for word in ("--op", op)), "--block", 8, "--block", "1KiB")
    _, report = bench(*options, "--operations", 10, "--json")
    rows = report["results"]
    assert [(row["op"], row["block_bytes"]) for row in rows] == list(itertools.product(ops, [8, 1024]))
    for row in rows:
        assert set(row) == ROW
        assert (row["provider"], row["transport"], row["reference"]) == (provider, provider, "plain socket")
        assert row["seconds_p99"] >= row["seconds_p50"] > 0
        assert row["reference_seconds_p99"] >= row["reference_seconds_p50"] > 0
        assert row["repeats"] == 10 * latency.PLACES  # each round goes to every place
        assert row["verified_bytes"] == 11 * latency.PLACES * row["block_bytes"]
    latency.show(report)
    shown = capsys.readouterr().out
    assert "One operation, waited for" in shown
    assert "µs" in shown


def test_blocks_of_another_round_are_noticed(monkeypatch):
    tell = Process.tell

    def falsified(self, **command):
        tell(self, **(command | {"seed": 0} if command["do"] == "fill" else command))

    monkeypatch.setattr(Process, "tell", falsified)
    refused, _ = bench("--provider", "loopback", "--block", 8, status=2)
    assert "64 blocks of 8B to arrive unchanged by loopback, 64 did not" in refused.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--provider", "pigeon"), "Invalid value for '--provider'"),
        (("--op", "swap"), "Invalid value for '--op'"),
        (("--block", "none"), "expected a size"),
        (("--operations", 0), "Invalid value for '--operations'"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, says):
    refused, _ = bench(*options, status=2)
    assert refused.stdout == ""
    assert says in refused.stderr


def test_two_cores_are_apart_if_there_are_two(monkeypatch):
    first, second = latency.two_cores()
    assert {first, second} <= os.sched_getaffinity(0)
    assert (first == second) == (len(os.sched_getaffinity(0)) == 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert latency.two_cores() == (5, 5)
