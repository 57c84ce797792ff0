import json

import pytest
from typer.testing import CliRunner

from mooncache import cli
from mooncache.bench import finality
from mooncache.bench.harness.process import Process

ROW = {
    "provider", "cases", "late_bytes_source", "late_bytes_target", "fence_ms_p50", "fence_ms_max",
    "fence_peer_stopped_ms_max", "fences_refused", "kinds", "outcomes",
}  # fmt: skip


def bench(*arguments, status=0):
    """Run `mooncache bench finality ...`; returns its result, and its report if it printed one."""
    result = CliRunner().invoke(cli.app, ["bench", "finality", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result, json.loads(result.stdout) if "--json" in arguments and result.stdout else None


@pytest.mark.parametrize("provider", ["tcp", "shm"])
def test_nothing_comes_late(provider, capsys):
    _, report = bench("--provider", provider, "--cases", 12, "--json")
    (row,) = report["results"]
    assert set(row) == ROW
    assert (row["provider"], row["cases"], sum(row["kinds"].values())) == (provider, 12, 12)
    assert row["late_bytes_source"] == row["late_bytes_target"] == 0
    finality.show(report)
    assert "No bytes landed" in capsys.readouterr().out


def test_bytes_that_come_late_are_noticed(monkeypatch):
    ask = Process.ask

    def careless(self, **command):
        answer = ask(self, **command)
        if command["do"] == "fill":  # somebody writes to the target's pages afterwards
            ask(self, do="fill", value=finality.CANARY - 1)
        return answer

    monkeypatch.setattr(Process, "ask", careless)
    result, report = bench("--provider", "tcp", "--cases", 1, "--json", status=1)
    assert report["results"][0]["late_bytes_target"] == finality.NBYTES["tcp"]
    assert not result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--provider", "pigeon"), "Invalid value for '--provider'"),
        (("--cases", 0), "Invalid value for '--cases'"),
    ],
)
def test_what_cannot_be_tried_is_refused(options, says):
    refused, _ = bench(*options, status=2)
    assert says in refused.stderr
