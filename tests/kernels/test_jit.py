"""The cache of machine code: keyed by the sources, rebuilt when damaged, elsewhere when it cannot be written.

Each case runs in an interpreter of its own, with a cache directory of its own and one tiny kernel.
"""

import os
import shutil

import pytest

from mooncache.kernels import jit
from tests.helpers import ROOT, run_python

TINY = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="WARNING %(message)s", stream=sys.stdout)
sys.path.insert(0, {folder!r})
from mooncache.kernels import jit
import tiny
print("COLD", jit.cold())
print("ANSWER", tiny.triple(14))
print("WHERE", jit.cache_dir())
hits = sum(tiny.triple.compiled.stats.cache_hits.values())
print("HITS", hits)
"""
KERNEL = """
from mooncache.kernels.jit import kernel

@kernel("int64(int64)")
def triple(x):
    return 3 * x
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.py").write_text(KERNEL)

    def run(**environment):
        cache = {"MOONCACHE_CACHE_DIR": str(tmp_path / "cache"), **environment}
        done = run_python(TINY.format(folder=str(tmp_path)), **cache)
        assert done.returncode == 0, done.stderr
        lines = [line.partition(" ") for line in done.stdout.splitlines()]
        answer = {word: rest for word, _, rest in lines if word != "WARNING"}
        answer["WARNINGS"] = [rest for word, _, rest in lines if word == "WARNING"]
        assert answer["ANSWER"] == "42"
        return answer

    return run


def test_the_second_process_loads_what_the_first_compiled(tiny):
    first = tiny()
    assert (first["COLD"], first["HITS"], first["WARNINGS"]) == ("True", "0", [])
    second = tiny()
    assert (second["COLD"], second["HITS"], second["WARNINGS"]) == ("False", "1", [])
    assert first["WHERE"] == second["WHERE"]


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("keep", [0, 40])
def test_a_truncated_cache_file_is_rebuilt_with_a_warning(tiny, tmp_path, suffix, keep):
    tiny()
    (damaged,) = (tmp_path / "cache").rglob(f"*.{suffix}")
    damaged.write_bytes(damaged.read_bytes()[:keep])
    healed = tiny()
    assert healed["HITS"] == "0"
    assert len(healed["WARNINGS"]) == 1
    assert "rebuilding" in healed["WARNINGS"][0]
    after = tiny()
    assert (after["HITS"], after["WARNINGS"]) == ("1", [])


def test_a_cache_that_cannot_be_written_falls_back_to_a_private_one(tiny, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    answer = tiny()
    assert len(answer["WARNINGS"]) == 1
    assert "cannot be written" in answer["WARNINGS"][0]
    assert not answer["WHERE"].startswith(str(tmp_path / "cache"))
    shutil.rmtree(answer["WHERE"])


HASH = """
import sys
sys.path.insert(0, {folder!r})
from mooncache.kernels import jit
assert jit.__file__.startswith({folder!r}), jit.__file__
print(jit.source_hash())
"""


def test_a_changed_source_has_another_cache(tmp_path):
    """Numba does not notice a change in a function of another file; the key does."""
    shutil.copytree(ROOT / "mooncache", tmp_path / "mooncache", ignore=shutil.ignore_patterns("__pycache__"))

    def key():
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = run_python(HASH.format(folder=str(tmp_path)), PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    first = key()
    assert key() == first
    seen = {first}
    for name in ("kernels/pool.py", "kernels/reclaim/bulk.py", "providers/loopback.py", "limits.py", "errors.py"):
        with (tmp_path / "mooncache" / name).open("a") as file:
            file.write("\n# changed\n")
        changed = key()
        assert changed not in seen, name
        seen.add(changed)
    with (tmp_path / "mooncache" / "engine.py").open("a") as file:
        file.write("\n# changed\n")
    assert key() in seen, "no kernel is made of engine.py"


def test_a_kernel_that_cannot_compile_says_why_instead_of_rebuilding_for_ever(tmp_path):
    script = """
from mooncache.kernels.jit import kernel

@kernel("int64(int64)")
def broken(x):
    return x + no_such_name

broken(1)
"""
    (tmp_path / "broken.py").write_text(script)
    done = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import broken",
        MOONCACHE_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert done.returncode == 1
    assert "no_such_name" in done.stderr


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MOONCACHE_CACHE_DIR", str(tmp_path / "a"))
    assert jit.cache_dir.__wrapped__() == tmp_path / "a" / f"kernels-{jit.source_hash()}"
    monkeypatch.delenv("MOONCACHE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert jit.cache_dir.__wrapped__() == tmp_path / "b" / "mooncache" / f"kernels-{jit.source_hash()}"
