import json

import pytest
from typer.testing import CliRunner

from mooncache import cli
from mooncache.bench import beside
from mooncache.bench.ends import beside as beside_end
from mooncache.bench.harness.process import Process

ROW = {
    "provider", "stream", "slices", "block_bytes", "calls", "call_us_p50", "call_us_p99", "p99_to_largest",
    "quiet_call_us_p50", "quiet_call_us_p99",
}  # fmt: skip


def bench(*arguments, status=0):
    """Run `mooncache bench beside ...`; returns its result, and its report if it printed one."""
    result = CliRunner().invoke(cli.app, ["bench", "beside", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result, json.loads(result.stdout) if "--json" in arguments and result.stdout else None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--provider", "loopback"), "Invalid value for '--provider'"),
        (("--operations", 4), "Invalid value for '--operations'"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, says):
    refused, _ = bench(*options, status=2)
    assert refused.stdout == ""
    assert says in refused.stderr


@pytest.mark.parametrize("provider", beside.STREAMS)
def test_small_writes_are_measured_beside_a_stream(provider, capsys):
    _, report = bench("--provider", provider, "--operations", 20, "--json")
    rows, (sleeps,) = report["results"], report["sleeps"]
    assert [row["slices"] for row in rows] == list(beside_end.BATCHES)
    for row in rows:
        assert set(row) == ROW
        assert row["calls"] == 20
        assert 0 < row["call_us_p50"] <= row["call_us_p99"]
        assert 0 < row["quiet_call_us_p50"] <= row["quiet_call_us_p99"]
    assert rows[-1]["p99_to_largest"] == 1
    assert sleeps["provider"] == provider
    assert sleeps["stream_bytes_per_s"] > 0
    assert sleeps["late_us_p50_with"] <= sleeps["late_us_p99_with"]
    beside.show(report)
    assert "sleeps of 1 ms ended" in " ".join(capsys.readouterr().out.split())


def test_a_stream_that_stood_still_is_noticed(monkeypatch):
    ask = Process.ask

    def still(self, **command):
        answer = ask(self, **command)
        return answer | {"batches": 0} if command["do"] == "end_stream" else answer

    monkeypatch.setattr(Process, "ask", still)
    refused, _ = bench("--provider", "tcp", "--operations", 5, status=2)
    assert "the stream over tcp stood still" in refused.stderr


def test_bytes_that_are_wrong_beside_a_stream_are_noticed(monkeypatch):
    ask = Process.ask

    def falsified(self, **command):
        return ask(self, **(command | {"seed": 0} if command["do"] in ("wrong", "wrong_stream") else command))

    monkeypatch.setattr(Process, "ask", falsified)
    refused, _ = bench("--provider", "shm", "--operations", 5, status=2)
    assert "that are wrong: expected 0" in refused.stderr
