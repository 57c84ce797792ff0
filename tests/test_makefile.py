"""The environment that make makes is of the Python that was asked for."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

IDENTITY = ".".join([*map(str, sys.version_info[:3]), sys.base_prefix])


@pytest.fixture
def would_do(tmp_path):
    """What make would do for a goal in a folder whose environment was made by `maker`."""

    def ask(maker, *arguments):
        for name in ("pyproject.toml", "Makefile"):
            (tmp_path / name).write_text((ROOT / name).read_text())
        (tmp_path / "env").mkdir()
        (tmp_path / "env" / ".made").write_text(f"{maker}\n")
        inherited = {name: value for name, value in environment().items() if name not in ("PYTHON", "MAKEFLAGS")}
        command = ["make", "--dry-run", "setup", "VENV=env", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=inherited, capture_output=True, text=True, check=True).stdout

    return ask


def test_it_stays_for_the_same_python(would_do):
    assert "-m venv" not in would_do(IDENTITY, f"PYTHON={sys.executable}")


def test_it_stays_where_no_python_is_named(would_do):
    assert "-m venv" not in would_do("3.99.0./somewhere")


def test_it_is_made_anew_for_another_python(would_do):
    assert f"{sys.executable} -m venv --clear env" in would_do("3.99.0./somewhere", f"PYTHON={sys.executable}")
