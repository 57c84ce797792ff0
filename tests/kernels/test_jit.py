"""The cache of machine code: keyed by the sources, shared by processes, mended where damaged, elsewhere if need be.

Each case runs in interpreters of its own, with a cache directory of its own and two tiny kernels.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mooncache.kernels import cache
from tests.helpers import ROOT, run_python
from tests.warm import warm as warm_all

TINY = """
import logging, os, sys, types
sys.modules["mooncache"] = types.ModuleType("mooncache")  # its parts without the whole, which takes a second to import
sys.modules["mooncache"].__path__ = [{root!r} + "/mooncache"]
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
sys.path.insert(0, {folder!r})
from mooncache.kernels import jit
import tiny
jit._entries[:] = [tiny.triple, tiny.square]
print("COLD", jit.cold(), flush=True)
{before}
jit.prewarm()
print("ANSWER", tiny.triple(14), tiny.square.compiled(5))
print("WHERE", jit.place().path if jit.place() else None)
hits = [sum(each.compiled.stats.cache_hits.values()) for each in (tiny.triple, tiny.square)]
print("HITS", *hits, flush=True)
{after}
"""
KERNEL = """
from mooncache.kernels.jit import kernel

@kernel("int64(int64)")
def triple(x):
    return 3 * x

@kernel("int64(int64)")
def square(x):
    return x * x
"""


class Tiny:
    """Runs the script, or starts it; its answer by the first word of each line."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        self.source = source  # the folder of the kernels
        self.cache = folder / "cache"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def start(self, before: str = "", after: str = "", **environment: str) -> subprocess.Popen[str]:
        # fmt: off
        surroundings = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "MOONCACHE_CACHE_DIR": str(self.cache), "TMPDIR": str(self.temporary), **environment,
        }
        # fmt: on
        return subprocess.Popen(
            [sys.executable, "-c", TINY.format(root=str(ROOT), folder=str(self.source), before=before, after=after)],
            env=surroundings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def answer(self, process: subprocess.Popen[str]) -> dict[str, list[str]]:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        answer: dict[str, list[str]] = {"WARNING": [], "INFO": []}
        for line in said.splitlines():
            word, _, rest = line.partition(" ")
            answer.setdefault(word, []).append(rest)
        assert answer["ANSWER"] == ["42 25"]
        return answer

    def __call__(self, **options: str) -> dict[str, list[str]]:
        return self.answer(self.start(**options))

    def files(self) -> list[Path]:
        return sorted(self.cache.rglob("*.kernel"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    (folder / "tiny.py").write_text(KERNEL)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, source):
    """A cache that holds both kernels."""
    tiny = Tiny(tmp_path_factory.mktemp("compiled"), source)
    first = tiny()
    assert (first["COLD"], first["HITS"], first["WARNING"]) == (["True"], ["0 0"], [])
    return tiny.cache


@pytest.fixture
def tiny(tmp_path, source):
    """With an empty cache."""
    return Tiny(tmp_path, source)


@pytest.fixture
def warm(tiny, compiled):
    """With both kernels in the cache."""
    shutil.copytree(compiled, tiny.cache)
    return tiny


@contextmanager
def held(file: Path):
    """Lock a file of the cache as another process would."""
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def heard(process: subprocess.Popen[str], word: str) -> None:
    """Wait until the process says it."""
    for line in process.stdout:
        if word in line:
            return
    pytest.fail(f"it ended without {word!r}")


def test_the_second_process_loads_what_the_first_compiled(warm):
    second = warm()
    assert (second["COLD"], second["HITS"], second["WARNING"], second["INFO"]) == (["False"], ["1 1"], [], [])
    assert second["WHERE"] == [str(warm.cache / f"kernels-{cache.source_hash()}")]


def test_a_cache_that_holds_some_kernels_is_cold_and_only_the_others_are_compiled(warm):
    warm.files()[0].unlink()
    again = warm()
    assert again["COLD"] == ["True"]
    assert sorted(again["HITS"][0].split()) == ["0", "1"]
    assert any("compiling 1 kernels" in line for line in again["INFO"])


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "short of a byte": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "zeros in the middle": lambda data: data[:1000] + bytes(len(data) - 2000) + data[-1000:],
    "random": lambda data: np.random.default_rng(1).bytes(len(data)),
    "a bit of the digest": lambda data: flipped(data, 3),
    "a bit of the code": lambda data: flipped(data, len(data) // 2),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_anew_with_a_warning_and_no_other_is_touched(warm, damage, which):
    damaged, other = warm.files()[which], warm.files()[1 - which]
    data, before = damaged.read_bytes(), other.stat()
    damaged.write_bytes(damage(data))
    healed = warm()
    assert sorted(healed["HITS"][0].split()) == ["0", "1"]
    assert len(healed["WARNING"]) == 1
    assert "rebuilding" in healed["WARNING"][0]
    assert (other.stat().st_ino, other.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    after = warm()
    assert (after["HITS"], after["WARNING"]) == (["1 1"], [])
    assert warm.files() == sorted([damaged, other])


def test_another_checkout_of_the_same_sources_shares_the_machine_code(warm, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(warm.source, elsewhere)
    warm.source = elsewhere
    assert warm()["HITS"] == ["1 1"]


def test_another_text_of_the_same_kernel_in_the_same_place_does_not(warm, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tiny.py").write_text(KERNEL.replace("3 * x", "x * 3"))
    warm.source = elsewhere
    assert warm()["HITS"] == ["0 0"]
    assert len(warm.files()) == 4


def test_of_processes_that_start_together_one_compiles_each_kernel(tiny):
    wait = "sys.stdin.readline()"  # until all of them have seen the cold cache
    started = [tiny.start(before=wait) for _ in range(8)]
    for process in started:
        heard(process, "COLD True")
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    hits = [tiny.answer(process)["HITS"][0] for process in started]
    assert sum(each.count("0") for each in hits) == 2


def test_a_process_waits_for_the_one_that_compiles_and_says_so(warm):
    file, _ = warm.files()
    file.unlink()
    with held(file.with_name(f"{file.name}.lock")):
        waiting = warm.start()
        heard(waiting, "waiting for them")
    answer = warm.answer(waiting)
    assert (sorted(answer["HITS"][0].split()), answer["WARNING"]) == (["0", "1"], [])


def test_a_process_killed_while_it_compiles_holds_up_nobody(tiny):
    compiles = "with cache.alone(tiny.square.file): print('HOLDS', flush=True); sys.stdin.readline()"
    holder = tiny.start(before=f"from mooncache.kernels import cache\n{compiles}")
    heard(holder, "HOLDS")
    waiting = tiny.start()
    heard(waiting, "waiting for them")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert tiny.answer(waiting)["HITS"] == ["0 0"]


def test_old_versions_go_but_for_the_newest_and_those_in_use(tiny):
    tiny.cache.mkdir()
    former = [tiny.cache / f"kernels-{i:02}" for i in range(cache.KEPT + 3)]
    for age, folder in enumerate(former):
        folder.mkdir()
        (folder / "in-use").touch()
        os.utime(folder / "in-use", (age, age))
    with (former[1] / "in-use").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        told = [line for line in tiny()["INFO"] if "removed" in line]
    assert len(told) == 1
    assert "of 2 other versions" in told[0]
    assert [folder for folder in former if folder.exists()] == [former[1], *former[3:]]


# ------------------------------------------------------------------ where it cannot be written
def unwritable(tiny: Tiny) -> dict[str, str]:
    """Surroundings in which the cache is a file where the folder should be."""
    tiny.cache.write_text("")
    return {"MOONCACHE_CACHE_DIR": str(tiny.cache)}


def test_where_the_cache_cannot_be_written_siblings_share_another_and_the_last_removes_it(tiny):
    surroundings = unwritable(tiny)
    first = tiny.start(after="sys.stdin.readline()", **surroundings)
    heard(first, "HITS 0 0")
    second = tiny(**surroundings)
    assert second["HITS"] == ["1 1"]
    assert len(second["WARNING"]) == 1
    assert "cannot be written" in second["WARNING"][0]
    (shared,) = tiny.temporary.iterdir()
    assert [str(shared)] == second["WHERE"]
    assert shared.stat().st_mode & 0o777 == 0o700
    first.communicate("\n")
    assert list(tiny.temporary.iterdir()) == []


def test_what_a_killed_process_left_there_is_used_again_and_what_older_versions_left_is_removed(tiny):
    surroundings = unwritable(tiny)
    old = tiny.temporary / f"mooncache-kernels-{os.geteuid()}-old"
    old.mkdir()
    killed = tiny.start(after="os.kill(os.getpid(), 9)", **surroundings)
    killed.communicate()
    assert not old.exists()
    assert len(list(tiny.temporary.iterdir())) == 1
    assert tiny(**surroundings)["HITS"] == ["1 1"]
    assert list(tiny.temporary.iterdir()) == []


def test_a_forked_child_that_ends_leaves_the_directory_to_its_parent(tiny):
    fork = """
child = os.fork()
if not child:
    sys.exit()
os.waitpid(child, 0)
print("STAYS", jit.place().path.exists())
"""
    assert tiny(after=fork, **unwritable(tiny))["STAYS"] == ["True"]
    assert list(tiny.temporary.iterdir()) == []


@pytest.mark.parametrize("planted", ["open to all", "link"])
def test_a_directory_that_somebody_planted_under_that_name_is_not_used(tiny, planted):
    surroundings = unwritable(tiny)
    name = tiny.temporary / f"mooncache-kernels-{os.geteuid()}-{cache.source_hash()}"
    elsewhere = tiny.folder / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if planted == "link":
        name.symlink_to(elsewhere)
    else:
        name.mkdir()
        name.chmod(0o777)
    assert tiny(**surroundings)["WHERE"] != [str(name)]
    assert list(elsewhere.iterdir()) == []


def test_kernels_that_came_with_a_read_only_image_are_not_compiled_again(warm):
    reader = {"MOONCACHE_CACHE_DIR": str(warm.cache)}
    (folder,) = warm.cache.iterdir()
    (folder / "in-use").unlink()
    (folder / "in-use").mkdir()  # cannot be held; permissions do not stop root
    again = warm(**reader)
    assert again["HITS"] == ["1 1"]
    assert len(again["WARNING"]) == 1
    assert again["WHERE"][0].startswith(str(warm.temporary))


def test_with_no_place_at_all_kernels_are_compiled_for_the_process(tiny):
    tiny.temporary.rmdir()
    nowhere = "import tempfile; tempfile._candidate_tempdir_list = lambda: []"
    script = f"{nowhere}\n{TINY}"
    done = run_python(
        script.format(root=str(ROOT), folder=str(tiny.source), before="", after=""), MOONCACHE_CACHE_DIR="/proc/nowhere"
    )
    assert "ANSWER 42 25" in done.stdout, done.stderr
    assert "WHERE None" in done.stdout
    assert done.stdout.count("compiling for this process alone") == 1


def test_a_cache_that_can_no_longer_be_written_is_told_and_the_kernel_works(tiny):
    full = """
import tempfile
def full(*_, **__): raise OSError(28, "No space left on device")
tempfile.mkstemp = full
"""
    answer = tiny(before=full)
    assert len(answer["WARNING"]) == 2
    assert all("No space left" in line for line in answer["WARNING"])


def test_a_changed_source_has_another_cache(tmp_path, monkeypatch):
    """Numba does not notice a change in a function of another file; the key does."""
    shutil.copytree(ROOT / "mooncache", tmp_path / "mooncache", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "_ROOT", tmp_path / "mooncache")
    key = cache.source_hash.__wrapped__
    seen = {key()}
    assert key() in seen
    for name in (
        "kernels/pool.py",
        "kernels/reclaim/bulk.py",
        "providers/inprocess/loopback.py",
        "limits.py",
        "errors.py",
    ):
        with (tmp_path / "mooncache" / name).open("a") as file:
            file.write("\n# changed\n")
        changed = key()
        assert changed not in seen, name
        seen.add(changed)
    with (tmp_path / "mooncache" / "engine.py").open("a") as file:
        file.write("\n# changed\n")
    assert key() in seen, "no kernel is made of engine.py"
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert key() not in seen


def test_a_kernel_that_cannot_compile_says_why_and_does_not_blame_the_cache(tmp_path):
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
    assert "rebuilding" not in done.stderr


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MOONCACHE_CACHE_DIR", str(tmp_path / "a"))
    assert cache.find_place() == (tmp_path / "a" / f"kernels-{cache.source_hash()}", True)
    monkeypatch.delenv("MOONCACHE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache.find_place() == (tmp_path / "b" / "mooncache" / f"kernels-{cache.source_hash()}", True)


def test_a_warm_engine_loads_nothing_that_only_compiling_needs():
    warm_all()
    script = """
import sys
from mooncache import Engine
Engine(provider="loopback", slices=256).close()
print(*(name for name in ("numba.np.linalg", "numba.typed.typedlist", "scipy.linalg") if name in sys.modules))
"""
    done = run_python(script)
    assert done.stdout.split() == [], done.stderr
