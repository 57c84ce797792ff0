"""The directories of machine code on disk, and the locks by which processes share them.

    <base>/kernels-<key>/in-use          locked (shared) by each process that uses the directory, while it lives
    <base>/kernels-<key>/NAME.lock       locked by the one process that compiles this kernel
    <base>/kernels-<key>/NAME            its machine code (`stored.py`), replaced as a whole

`<base>` is `$MOONCACHE_CACHE_DIR`, else `$XDG_CACHE_HOME/mooncache`, else `~/.cache/mooncache`. Where it cannot be
written, as in a container with a read-only home, the directory is `<tmp>/mooncache-kernels-<uid>-<key>`: of this user
alone, shared by his processes, begun with a copy of what the usual one holds, and removed by the last that uses it.
Locks are the kernel's (flock), so that a process that is killed holds none.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import logging
import os
import platform
import select
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numba
from numba.core.registry import cpu_target

from mooncache.kernels.stored import SUFFIX

log = logging.getLogger("mooncache")

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("kernels", "providers", "errors.py", "limits.py")
_IN_USE = "in-use"
_PRIVATE = "mooncache-kernels-"

KEPT = 16
"""Directories of other versions that stay, those used last: a few checkouts of developers, some 5 MB each."""

WAIT_S = 600
"""The time that a process waits for another that compiles, which takes minutes, before it compiles by itself."""


class Place(NamedTuple):
    """The directory of this version's machine code."""

    path: Path
    lasting: bool
    """True if it outlives the processes that use it."""


@cache
def source_hash() -> str:
    """Return the key of all that machine code is made from and for: sources, Numba, Python, this CPU.

    Of the providers those are the files that declare kernels: resources in Python change without compiling anything.
    """
    made_for = (numba.__version__, platform.python_version(), *cpu_target.target_context.codegen().magic_tuple())
    digest = hashlib.blake2b(repr(made_for).encode(), digest_size=8)
    for name in _SOURCES:
        path = _ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            text = file.read_bytes()
            if name != "providers" or b"mooncache.kernels.jit import" in text:
                digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + text)
    return digest.hexdigest()


def base_directory() -> Path:
    """Return where this user's caches lie; it may have to be made."""
    given = os.environ.get("MOONCACHE_CACHE_DIR")
    return Path(
        given
        or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "mooncache"
        )
    )


def find_place() -> Place:
    """Find, make and hold this version's directory. Once a process: it is held until the process ends.

    Raises:
        OSError: neither the usual directory nor one in the temporary folder can be written.
    """
    base = base_directory()
    usual = base / f"kernels-{source_hash()}"
    try:
        new = not usual.exists()
        usual.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=usual):
            pass
        hold(usual)
    except OSError as error:
        path = _private(usual)
        log.warning("kernel cache %s cannot be written (%s); using %s while processes use it", base, error, path)
        return Place(path, lasting=False)
    if new:
        former = sorted(usual.parent.glob("kernels-*"), key=_last_used)[: -KEPT - 1]
        _tell(remove_unused(former), usual.parent)
    return Place(usual, lasting=True)


def _private(usual: Path) -> Path:
    """Make a directory in the temporary folder, held, that goes away with the last process that holds it."""
    folder = Path(tempfile.gettempdir())
    path = folder / f"{_PRIVATE}{os.geteuid()}-{usual.name.removeprefix('kernels-')}"
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if not _is_ours(path) or path.lstat().st_mode & 0o077:
        path = Path(tempfile.mkdtemp(prefix=_PRIVATE))  # whoever took that name shall not decide what code runs here
    held = hold(path)
    _leave_at_the_end(path, held)
    former = (other for other in folder.glob(f"{_PRIVATE}*") if other != path and _is_ours(other))
    _tell(remove_unused(former), folder)
    with suppress(OSError, shutil.Error), alone(path / "copy"):  # nothing there, or not for us to read: compiled anew
        if not any(path.glob(f"*{SUFFIX}")):
            others = shutil.ignore_patterns(_IN_USE, "*.lock", ".*")
            shutil.copytree(usual, path, dirs_exist_ok=True, ignore=others)
    return path


def _leave_at_the_end(path: Path, held: int) -> None:
    """Have the last process remove the directory; a forked child counts by itself."""
    holds = {"fd": held}

    def leave() -> None:
        os.close(holds["fd"])
        remove_unused([path])

    def hold_anew() -> None:
        os.close(holds["fd"])
        holds["fd"] = hold(path)

    atexit.register(leave)
    os.register_at_fork(after_in_child=hold_anew)


def hold(path: Path) -> int:
    """Make a directory, and keep it from being removed while the answer, a descriptor, is open.

    Raises:
        OSError: it cannot be made or written.
    """
    while True:
        path.mkdir(mode=0o700 if path.name.startswith(_PRIVATE) else 0o777, exist_ok=True)
        try:
            fd = _open(path / _IN_USE)
        except FileNotFoundError:  # removed since it was made
            continue
        with suppress(OSError):  # file systems without locks: nothing is removed there either
            fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            os.utime(fd)
            return fd
        os.close(fd)  # it was removed while we waited


def remove_unused(directories: Iterable[Path]) -> list[Path]:
    """Remove directories that no process holds. Return those."""
    return [directory for directory in directories if _remove(directory)]


def _remove(path: Path) -> bool:
    try:
        fd = _open(path / _IN_USE)
    except OSError:  # gone, or not ours to write
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
        return True
    except OSError:  # held by somebody, perhaps since a moment ago
        return False
    finally:
        os.close(fd)


@contextmanager
def alone(file: Path, wait: bool = True) -> Iterator[bool]:
    """Be the only process that makes `file`, by a lock beside it. Not to be entered again inside.

    Args:
        wait: while another process makes it: up to WAIT_S, then go on beside that one, since files are replaced whole.
            Else the answer is False at once.

    Raises:
        OSError: the directory can no longer be written.
    """
    fd = _open(file.with_name(f"{file.name}.lock"))
    try:
        mine = _locked(fd)
        if wait and not mine:
            mine = any(_locked(fd, pause=0.05) for _ in range(WAIT_S * 20))
            if not mine:
                log.warning("another process has been making %s for %d s; no longer waiting for it", file, WAIT_S)
        yield mine or wait
    finally:
        with suppress(OSError):  # by word, since a child forked meanwhile shares the lock and keeps the descriptor open
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _locked(fd: int, pause: float = 0) -> bool:
    """Pause for some seconds, then try to take the lock. A file system without locks lets everybody pass."""
    select.select([], [], [], pause)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _last_used(path: Path) -> float:
    for file in (path / _IN_USE, path):
        with suppress(OSError):
            return file.stat().st_mtime
    return 0.0


def _is_ours(path: Path) -> bool:
    """Return whether it is a directory, not a link to one, of this user."""
    with suppress(OSError):
        found = path.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return False


def _tell(removed: list[Path], where: Path) -> None:
    if removed:
        log.info("removed kernels of %d other versions from %s, which nobody used", len(removed), where)
