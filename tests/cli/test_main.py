import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points, version
from textwrap import dedent

import pytest
from typer.testing import CliRunner

from mooncache import cli, plugins
from mooncache.bench import lifecycle
from tests.helpers import ROOT


def run(*arguments):
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Commands `greet`, which takes options, and `gone`, which cannot be imported; returns what they are."""
    (tmp_path / "greetings_plugin.py").write_text(
        dedent(
            '''
            def greet(name: str, loudly: bool = False):
                """Say hello."""
                print("HELLO" if loudly else "hello", name)
            '''
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "greetings_plugin", raising=False)
    points = {
        "greet": EntryPoint("greet", "greetings_plugin:greet", plugins.COMMANDS),
        "gone": EntryPoint("gone", "no_such_plugin:gone", plugins.COMMANDS),
    }
    monkeypatch.setattr(plugins, "offered", lambda group: points)
    return points


def test_help_lists_own_and_added_commands(plugin):
    shown = run("--help")
    assert shown.exit_code == 0
    assert "bench" in shown.stdout
    assert "Say hello." in shown.stdout


def test_the_simulators_commands_are_declared():
    assert {"calibrate", "compare"} <= plugins.offered(plugins.COMMANDS).keys()


def test_version():
    assert run("--version").stdout.split() == ["mooncache", version("mooncache")]


def test_an_added_command_takes_its_own_arguments(plugin):
    assert run("greet", "moon", "--loudly").stdout == "HELLO moon\n"


def test_own_commands_do_not_import_added_ones(plugin):
    assert run("bench", "--help").exit_code == 0
    assert "greetings_plugin" not in sys.modules


def test_a_command_that_cannot_be_imported_is_listed_and_says_why(plugin):
    assert "gone" in run("--help").stdout
    refused = run("gone")
    assert refused.exit_code == cli.FAULT
    assert refused.stderr.startswith("mooncache: error: gone cannot be imported: No module named")


def test_a_command_whose_extra_is_missing_says_which_to_install(monkeypatch):
    (compare,) = (point for point in entry_points(group=plugins.COMMANDS) if point.name == "compare")
    monkeypatch.setitem(sys.modules, "simpy", None)  # as if it were not installed
    for module in [name for name in sys.modules if name.partition(".")[0] == "sim"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(plugins, "offered", lambda group: {"compare": compare})
    refused = run("compare", "configs/tp4_layerwise.yaml", "--set", "nic.rails=4")
    assert (refused.exit_code, refused.stdout) == (cli.FAULT, "")
    assert refused.stderr.startswith(
        "mooncache: error: compare needs more than the engine does: pip install 'mooncache[sim]'"
    )
    assert refused.stderr.count("\n") == 1


def test_an_unknown_command_is_refused():
    assert run("bnech").exit_code == cli.FAULT


@pytest.mark.parametrize(("typed", "meant"), [("bnech", "bench"), ("comapre", "compare"), ("demos", "demo")])
def test_a_command_that_was_probably_meant_is_named(typed, meant):
    assert f"Did you mean '{meant}'?" in " ".join(run(typed).stderr.split())


def test_an_error_is_one_line_on_stderr():
    refused = run("bench", "transfer", "--block", "much")
    assert refused.exit_code == cli.FAULT
    assert refused.stdout == ""
    assert refused.stderr.startswith("mooncache: error: expected a size of at least one byte")
    assert refused.stderr.count("\n") == 1


def test_an_interrupt_exits_with_130(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lifecycle, "run", interrupted)
    assert run("bench", "lifecycle").exit_code == cli.INTERRUPTED


def test_the_package_runs_as_the_command():
    command = [sys.executable, "-m", "mooncache"]
    assert subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.startswith(
        "mooncache "
    )
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "Usage: mooncache [" in shown
    assert "--install-completion" in shown


def test_every_file_of_the_benches_is_a_command():
    files = {file.stem for file in (ROOT / "mooncache/bench").glob("[!_]*.py")}
    shown = run("bench", "--help").stdout
    assert files
    for name in files:
        assert f"│ {name} " in shown
        assert run("bench", name, "--help").exit_code == 0


def test_a_command_imports_no_bench():
    asks = "import sys; from mooncache import cli; sys.exit(any(m.startswith('mooncache.bench.') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", asks], cwd=ROOT, check=False).returncode == 0
