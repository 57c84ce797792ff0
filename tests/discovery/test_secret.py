"""The secret that engines are given, and the one of the user they run as."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mooncache.discovery import secret as secrets
from mooncache.discovery.secret import KEY_BYTES, SECRET_BYTES, check_secret, key_of, of_user
from mooncache.errors import TransportError, UsageError
from tests.helpers import ROOT

UID = os.geteuid()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three places for folders, of which the first is not there."""
    made = [tmp_path / name for name in ("missing", "first", "second")]
    for place in made[1:]:
        place.mkdir()
    monkeypatch.setattr(secrets, "PLACES", tuple(map(str, made)))
    return made


def folder_in(place: Path) -> Path:
    return place / f"mooncache-{UID}"


# ------------------------------------------------------------------------------ given
@pytest.mark.parametrize("secret", [b"", b"s", b"x" * (SECRET_BYTES - 1)])
def test_a_short_secret_is_refused_with_the_limit_and_without_saying_it(secret):
    with pytest.raises(UsageError, match=rf"at least {SECRET_BYTES} bytes, got {len(secret)}: .*openssl") as refused:
        check_secret(secret)
    assert len(secret) < 2 or secret.decode() not in str(refused.value)


@pytest.mark.parametrize("secret", [5, "text", [b"bytes"]])
def test_a_secret_of_another_type_is_refused(secret):
    with pytest.raises(UsageError, match=f"None, text or bytes, got {type(secret).__name__}"):
        check_secret(secret)


def test_a_secret_is_stretched_once_in_a_process_and_proofs_are_not_made_with_itself(monkeypatch):
    calls, scrypt = [], hashlib.scrypt
    monkeypatch.setattr(hashlib, "scrypt", lambda *a, **k: (calls.append(a), scrypt(*a, **k))[1])
    keys = {key_of(b"stretched only here") for _ in range(3)}
    assert len(calls) == len(keys) == 1
    assert b"stretched" not in keys.pop()
    assert key_of(b"another one") != key_of(b"stretched only here")


# ------------------------------------------------------------------------------ of a user
def test_the_secret_of_a_user_is_in_a_file_that_only_this_user_can_open(places):
    assert len(of_user()) == KEY_BYTES
    folder = folder_in(places[1])
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "secret").stat().st_mode & 0o777 == 0o600
    assert of_user() == of_user() == (folder / "secret").read_bytes()


def test_a_restrictive_or_careless_umask_changes_nothing(places):
    before = os.umask(0)
    try:
        first = of_user()
    finally:
        os.umask(before)
    assert (folder_in(places[1]) / "secret").stat().st_mode & 0o777 == 0o600
    assert of_user() == first


ASK = """
import sys, types
package = types.ModuleType("mooncache")  # without all that it loads: it takes seconds
package.__path__ = [sys.argv[2]]
sys.modules["mooncache"] = package
from mooncache.discovery import secret
secret.PLACES = (sys.argv[1],)
print("ready", flush=True)
sys.stdin.readline()
print(secret.of_user().hex(), flush=True)
"""


def test_processes_that_start_at_once_find_the_same_whatever_their_environment(places, tmp_path):
    asking = []
    for i in range(8):
        own = {name: str(tmp_path / f"{name}-{i}") for name in ("HOME", "TMPDIR", "XDG_RUNTIME_DIR")}
        command = [sys.executable, "-c", ASK, str(places[1]), str(ROOT / "mooncache")]
        env = {**os.environ, **own}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        asking.append(subprocess.Popen(command, **pipes, text=True, env=env))
    for process in asking:
        assert process.stdout.readline() == "ready\n"
    for process in asking:  # all stand right before it
        process.stdin.write("\n")
        process.stdin.flush()
    assert {process.communicate(timeout=60)[0] for process in asking} == {of_user().hex() + "\n"}


def test_a_secret_that_was_removed_is_made_anew(places):
    first = of_user()
    (folder_in(places[1]) / "secret").unlink()
    second = of_user()
    folder_in(places[1]).joinpath("secret").unlink()
    folder_in(places[1]).rmdir()
    assert len({first, second, of_user()}) == 3


def _another_owner(path: Path) -> None:
    if UID != 0:
        pytest.skip("needs to be root to give a file away")
    os.chown(path, 65534, -1)


def _symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o600)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "readable by the group": (lambda path: path.chmod(0o640), r"can be reached by other users \(mode 640\)"),
    "writable by all": (lambda path: path.chmod(0o602), r"can be reached by other users \(mode 602\)"),
    "another user's": (_another_owner, "belongs to user 65534"),
    "a symlink": (_symlink, "symbolic links"),
    "a folder": (_directory, "is of another kind"),
    "a pipe": (_pipe, "is of another kind"),
    "too short": (lambda path: path.write_bytes(b"x" * 31), "does not hold 32 bytes"),
    "too long": (lambda path: path.write_bytes(b"x" * 33), "does not hold 32 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "does not hold 32 bytes"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_file_that_others_may_know_or_that_is_damaged_is_not_used(places, bad):
    of_user()
    change, says = BAD_FILES[bad]
    path = folder_in(places[1]) / "secret"
    change(path)
    with pytest.raises(TransportError, match=f"{path}, .*{says}.*: remove it"):
        of_user()


BAD_FOLDERS: dict[str, Callable[[Path], object]] = {
    "open to others": lambda path: path.chmod(0o701),
    "another user's": _another_owner,
    "a symlink": _symlink,
    "a file": lambda path: (path.rmdir(), path.touch()),
}


@pytest.mark.parametrize("bad", BAD_FOLDERS)
def test_a_folder_in_which_others_could_have_laid_it_is_passed_by(places, bad):
    """Anybody can take a name in a folder like /tmp."""
    folder_in(places[1]).mkdir(mode=0o700)
    BAD_FOLDERS[bad](folder_in(places[1]))
    of_user()
    assert (folder_in(places[2]) / "secret").exists()


def test_without_any_place_it_is_said_what_to_do(places):
    for place in places[1:]:
        folder_in(place).touch()
    with pytest.raises(TransportError, match=rf"user {UID} find no place .*the same secret=, or say insecure=True"):
        of_user()


def test_a_place_that_cannot_be_written_is_passed_by(places, monkeypatch):
    monkeypatch.setattr(secrets, "PLACES", ("/proc", "/sys", str(places[2])))
    of_user()
    assert (folder_in(places[2]) / "secret").exists()


def test_no_descriptor_is_left_open(places):
    of_user()
    before = os.listdir("/proc/self/fd")
    for _ in range(10):
        of_user()
    (folder_in(places[1]) / "secret").chmod(0o644)
    with pytest.raises(TransportError):
        of_user()
    assert len(os.listdir("/proc/self/fd")) == len(before)
