import json
import os
import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mooncache import Engine, UsageError, cli
from mooncache.cli import checks
from mooncache.cli.checks.base import Finding, attempt, check, listed
from mooncache.cli.doctor import STYLES, Need, summary
from tests.cli.machines import UNLIMITED, levels, nic, only, pci, write
from tests.helpers import ROOT, SMALL


def run(*options):
    return CliRunner().invoke(cli.app, ["doctor", *options])


# ------------------------------------------------------------------ the command
FINDINGS = [
    Finding("one", "ok", "as it should be"),
    Finding("two", "warning", "less than [it] could be", "type this\nor this, " + "which is a long line " * 9),
]
BROKEN = [*FINDINGS, Finding("three", "error", "broken")]


def test_json_is_one_object_in_the_order_of_the_checks(monkeypatch):
    monkeypatch.setattr(checks, "examine", lambda need: BROKEN)
    result = run("--json")
    report = json.loads(result.stdout)
    assert list(report) == ["ok", "findings"]
    assert report["ok"] is False
    assert [list(finding) for finding in report["findings"]] == [["check", "level", "text", "cure"]] * 3
    assert [Finding(**finding) for finding in report["findings"]] == BROKEN


@pytest.mark.parametrize(("findings", "status"), [(FINDINGS, 0), (BROKEN, 1)])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_only_an_error_is_told_by_the_exit_status(monkeypatch, findings, status, options):
    monkeypatch.setattr(checks, "examine", lambda need: findings)
    assert run(*options).exit_code == status


def test_the_table_has_every_finding_and_cures_in_lines_that_can_be_copied(monkeypatch):
    monkeypatch.setattr(checks, "examine", lambda need: BROKEN)
    shown = run().stdout
    for finding in BROKEN:
        assert finding.text in shown
    for line in FINDINGS[1].cure.splitlines():
        assert f"  {line}\n" in shown
    assert shown.endswith("1 error, 1 warning.\n")


def test_the_summary():
    assert summary(FINDINGS[:1]) == "Nothing is wrong."
    assert summary([*BROKEN, *BROKEN]) == "2 errors, 2 warnings."


def test_the_wire_that_has_to_work_is_passed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(checks, "examine", lambda need: asked.append(need) or FINDINGS)
    run()
    for need in Need:
        run("--provider", need.value)
    assert asked == ["auto", *(need.value for need in Need)]


def test_an_unknown_wire_is_refused():
    refused = run("--provider", "pigeon")
    assert refused.exit_code == cli.FAULT
    assert refused.stdout == ""
    assert "Invalid value for '--provider'" in refused.stderr


def test_other_commands_do_not_import_the_checks():
    asks = "import sys; from mooncache import cli; sys.exit('mooncache.cli.checks' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asks], cwd=ROOT, check=False).returncode == 0


def test_on_this_machine_each_subject_has_a_finding():
    result = run("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == (not report["ok"])
    assert report["ok"] == all(finding["level"] != "error" for finding in report["findings"])
    seen = {finding["check"].split()[0] for finding in report["findings"]}
    assert seen >= {"system", "python", "kernel", "cores", "numa", "clock", "open", "locked", "huge", "shared", "rdma"}
    for finding in report["findings"]:
        assert finding["level"] in STYLES
        assert finding["text"]


@pytest.mark.parametrize(
    ("need", "level"), [("auto", "warning"), ("tcp", "warning"), ("shm", "warning"), ("rdma", "error")]
)
def test_a_whole_machine_without_rdma(machine, monkeypatch, need, level):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (UNLIMITED, UNLIMITED))
    findings = checks.examine(need, machine)
    assert [finding.level for finding in findings if finding.check == "rdma"] == [level]
    broken = {finding.check for finding in findings if finding.level == "error"}
    assert broken <= ({"rdma", "rdma library"} if need == "rdma" else set())


def test_a_whole_machine_with_rdma(machine):
    write(machine, nic() | pci("0000:17:00.0", "0x10de", "0x030200"))
    found = {finding.check: finding for finding in checks.examine("rdma", machine)}
    for name in ("rdma mlx5_0:1", "rdma mlx5_0:1 mtu", "rdma mlx5_0:1 gid", "rdma mlx5_0 access"):
        assert found[name].level == "ok", found[name]
    assert found["gpu"].level == "warning"


def test_files_of_rdma_and_gpus_that_make_no_sense_are_findings(machine):
    write(machine, nic(node="many") | pci("0000:17:00.0", "0x10de", "shiny"))
    found = {finding.check: finding for finding in checks.examine("auto", machine)}
    assert (found["rdma"].level, found["gpu"].level) == ("warning", "warning")
    assert "many" in found["rdma"].text
    assert "expected a number, got 'shiny'" in found["gpu"].text


def test_an_empty_root_yields_findings_not_exceptions(tmp_path):
    assert "warning" in levels(checks.examine("auto", tmp_path))


# ------------------------------------------------------------------ engines
def test_engines_of_this_user_are_asked_what_is_wrong_with_them():
    with Engine("ill", provider="tcp", **SMALL) as ill, Engine("closed-mouthed", secret="not the user's", **SMALL):
        ill.provider.background.note("a keeper", "its thread failed")
        *found, whole = checks.engines.engines()
        (told,) = [finding for finding in found if f"'ill' of process {os.getpid()}" in finding.text]
        assert (told.level, told.text.partition(": ")[2]) == ("warning", "a keeper: its thread failed")
        assert whole.level == "ok"
        assert "do not: they have a secret" in whole.text
        with pytest.raises(UsageError, match="trouble"):  # over the network
            ill._service.dial(ill.address, "trouble", {})
    assert not any(f"process {os.getpid()}" in finding.text for finding in checks.engines.engines())


def test_where_no_engine_is_open_that_is_said(tmp_path):
    assert only(checks.engines.engines(tmp_path)).text == "0 of this user are open and answer"


# ------------------------------------------------------------------ what checks share
def test_what_cannot_be_read_is_a_finding_after_those_before_it(tmp_path):
    @check("thing")
    def look():
        yield Finding("thing", "ok", "so far")
        (tmp_path / "absent").read_text()

    first, last = look()
    assert first.level == "ok"
    assert last == Finding("thing", "warning", f"cannot be told: {tmp_path / 'absent'}: No such file or directory")


def test_an_attempt_returns_what_it_found_or_why_not(tmp_path):
    assert attempt("thing", lambda: (1, 2)) == ([1, 2], [])
    nothing, why = attempt("thing", lambda: [int("x")])
    assert (nothing, only(why).level) == ([], "warning")


def test_names_in_a_sentence():
    assert [listed(names) for names in ([], ["a"], ["a", "b", "c"])] == ["none", "a", "a, b and c"]
