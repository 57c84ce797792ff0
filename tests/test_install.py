"""What `pip install` brings without extras, in an environment of its own: enough for a transfer, and nothing large."""

import re
import subprocess
import sys
from importlib.metadata import requires

import pytest

from tests.helpers import ROOT, environment

pytestmark = pytest.mark.xdist_group("install")  # one environment for all

BROUGHT = {"numba", "llvmlite", "numpy", "pydantic", "rich", "typer"}
SMALL_MB = 10  # more than pydantic, with what it is made of


def run(*command, status=0):
    """Run a command outside the checkout; its result."""
    surroundings = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([*map(str, command)], cwd="/", env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `bin` folder of a new environment in which the wheel of this checkout is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    index = subprocess.run([*pip, "download", "--no-deps", "--dest", folder, "hatchling"],
                           capture_output=True, text=True, check=False)  # fmt: skip
    if index.returncode:
        pytest.skip(f"no package index can be reached: {index.stderr.strip().splitlines()[-1]}")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder / "dist", ROOT)
    (wheel,) = (folder / "dist").iterdir()
    run(sys.executable, "-m", "venv", folder / "venv")
    there = folder / "venv/bin"
    run(there / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install", wheel)
    return there


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_only_numba_and_numpy_are_large(installed):
    wanted = {name_of(each) for each in requires("mooncache") if "extra ==" not in each}
    assert wanted == BROUGHT - {"llvmlite"}
    sizes = """
from importlib.metadata import distributions
for each in distributions():
    nbytes = sum(file.locate().stat().st_size for file in each.files or () if file.locate().exists())
    print(each.name, nbytes // 10**6)
"""
    listed = dict(line.split() for line in run(installed / "python", "-c", sizes).stdout.splitlines())
    large = {name.lower() for name, size in listed.items() if int(size) > SMALL_MB} - {"pip", "setuptools"}
    assert large == {"numba", "llvmlite", "numpy"}
    assert not listed.keys() & {"scipy", "matplotlib", "simpy", "PyYAML", "pytest"}


def test_the_example_of_the_readme_makes_its_transfer(installed):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert "prefill.write(" in example
    where = "import mooncache; print(mooncache.__file__)\n"
    said = run(installed / "python", "-c", where + example).stdout.splitlines()
    assert said[0].startswith(str(installed.parent))
    assert "request 7" in said[1]


def test_its_commands_run_and_those_of_the_simulator_name_their_extra(installed):
    for command in ([installed / "mooncache"], [installed / "python", "-m", "mooncache"]):
        assert run(*command, "--version").stdout.startswith("mooncache ")
        refused = run(*command, "compare", "a.yaml", "--set", "nic.rails=4", status=2)
        assert refused.stderr.startswith("mooncache: error: compare needs more than the engine does: pip install")
        assert "'mooncache[sim]'" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert "pip install 'mooncache[sim]'" in " ".join(re.sub("[│\n]", " ", run(*command, "--help").stdout).split())
    assert run(installed / "mooncache", "bench", "gil", "--seconds", "0.1").stdout


def test_the_scenarios_come_with_it(installed):
    found = "from sim import shipped; print(shipped.folder(), *shipped.names())"
    folder, *names = run(installed / "python", "-c", found).stdout.split()
    assert folder.startswith(str(installed.parent))
    assert names == sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
