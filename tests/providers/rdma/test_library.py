from __future__ import annotations

import importlib.machinery
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mooncache.providers.rdma import library

DEBIAN = library.DEBIAN


def run(code: str, folder: Path | None) -> str:
    """What a new Python prints that finds pyverbs in `folder`, or nowhere."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    seen = {} if folder is None else {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | seen, capture_output=True, text=True, check=True
    ).stdout


def installed(folder: Path | None) -> library.Installed:
    code = "from mooncache.providers.rdma.library import installed; print(installed())"
    found = eval(run(code, folder), {"Installed": library.Installed})
    assert isinstance(found, library.Installed)
    return found


def package(folder: Path, **files: str) -> Path:
    (folder / "pyverbs").mkdir()
    for name, text in {"__init__": "", **files}.items():
        (folder / "pyverbs" / f"{name}.py").write_text(text)
    return folder


def test_importing_the_package_imports_no_pyverbs() -> None:
    code = (
        "import sys, mooncache.providers.rdma.nic, mooncache.providers.rdma.gpu;"
        "print([name for name in sys.modules if name.startswith('pyverbs')])"
    )
    assert run(code, None).strip() == "[]"


@pytest.mark.parametrize(
    ("debian", "cure"), [(True, "apt-get install python3-pyverbs"), (False, "pip install 'mooncache[rdma]'")]
)
def test_without_pyverbs_the_cure_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, debian: bool, cure: str
) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    monkeypatch.setattr(library, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(library, "_debian", lambda: debian)
    problem, found = library._diagnosis(ModuleNotFoundError("No module named 'pyverbs'"))
    assert problem == "it is not installed in this environment"
    assert cure in found


def test_what_loading_raises_says_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    package(tmp_path, device="raise ImportError('no such symbol')")
    code = (
        "from mooncache.providers.rdma.library import load\ntry: load()\nexcept Exception as error: print(repr(error))"
    )
    raised = run(code, tmp_path)
    assert raised.startswith("TransportError(")
    assert "RDMA needs pyverbs: it does not load: no such symbol" in raised


def test_a_pyverbs_that_the_environment_does_not_see_is_linked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_debian", lambda: True)
    monkeypatch.setattr(library, "DEBIAN", tmp_path)
    (tmp_path / f"device{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    assert f"ln -s {tmp_path} " in library._installation(None)
    (tmp_path / f"device{importlib.machinery.EXTENSION_SUFFIXES[0]}").rename(tmp_path / "device.cpython-36m.so")
    assert "is for another Python" in library._installation("44.0")


def test_a_pyverbs_built_for_another_python_is_named(tmp_path: Path) -> None:
    package(tmp_path)
    (tmp_path / "pyverbs" / "device.cpython-36m-x86_64-linux-gnu.so").touch()
    found = installed(tmp_path)
    assert found.problem is not None
    assert found.problem.startswith(f"the one in {tmp_path}/pyverbs was built for another Python (.cpython-36m-")
    assert found.cure is not None
    assert "libnl3" in found.cure


def test_a_pyverbs_that_does_not_load_is_named_with_both_versions(tmp_path: Path) -> None:
    package(tmp_path, device="raise ImportError('version `IBVERBS_PRIVATE_99 not found')")
    found = installed(tmp_path)
    assert found.problem is not None
    assert "it does not load: version `IBVERBS_PRIVATE_99 not found (found: pyverbs unknown in " in found.problem
    assert f"libibverbs of rdma-core {found.rdma_core or 'nowhere'})" in found.problem
    assert found.cure is not None
    assert "of its own rdma-core version" in found.cure


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A folder that holds the distribution's pyverbs and nothing else."""
    if not any((DEBIAN / f"device{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        pytest.skip("the distribution has no pyverbs for this Python (Debian: apt-get install python3-pyverbs)")
    (tmp_path / "pyverbs").symlink_to(DEBIAN)
    return tmp_path


def test_the_distributions_pyverbs_is_found_with_its_version(distribution: Path) -> None:
    found = installed(distribution)
    assert (found.problem, found.cure) == (None, None)
    assert found.pyverbs is not None
    assert found.rdma_core is not None
    assert found.pyverbs.startswith(found.rdma_core)


def test_loading_leaves_the_applications_logging_alone(distribution: Path) -> None:
    code = (
        "import logging; from mooncache.providers.rdma.library import load; load();"
        "print(logging.getLogger().handlers, logging.getLogger().level)"
    )
    assert run(code, distribution).strip() == f"[] {logging.WARNING}"
