"""Run pytest in the worst surroundings that it may inherit: `python -m tests.surroundings [pytest's arguments]`.

Without a test or folder among these it runs those that depend on what they inherit.

Interrupts are ignored as under `nohup`, signals are blocked, there is no terminal and no home, the locale is C, files
are for their owner only, the folder for temporary files has a space in its name, and 1,024 files may be open. Where
root starts it, and another user can read this Python, it is another user.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from mooncache.kernels import jit
from tests.helpers import ROOT
from tests.warm import warm

NOBODY = 65534
SOFT_LIMIT = 1024  # most systems' own
REPRESENTATIVE = (
    "tests/test_batch.py", "tests/test_engine.py", "tests/test_service.py", "tests/cli/test_serve.py",
    "tests/cli/test_main.py", "tests/discovery", "tests/kernels/test_jit.py", "tests/sim/test_workload.py",
    "tests/wires/test_connect.py", "tests/wires/test_peers_lost.py", "tests/wires/test_transfers.py",
)  # fmt: skip


def readable_by_others(path: Path) -> bool:
    """Whether another user reaches a file and may read it."""
    folders = [parent for parent in path.resolve().parents if parent.exists()]
    return all(folder.stat().st_mode & 0o001 for folder in folders) and bool(path.stat().st_mode & 0o004)


def environment(folder: Path) -> dict[str, str]:
    """Of a process that has no home and no locale, whose own files are in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "XDG_"))}
    return kept | {
        "LC_ALL": "C", "HOME": "/nonexistent", "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1",
        "MOONCACHE_CACHE_DIR": str(folder / "kernels"),  # as without a home there is no other place for it
    }  # fmt: skip


def endure(user: int | None) -> None:
    """Of the child, before it becomes pytest."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.umask(0o077)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)


def run(arguments: list[str]) -> int:
    """pytest's exit status."""
    named = any(argument.startswith("tests") for argument in arguments)
    warm()
    user = None
    if os.getuid() == 0:
        if all(map(readable_by_others, (Path(sys.executable), Path(os.__file__), ROOT / "pyproject.toml"))):
            user = NOBODY
        else:
            print(f"As root: another user cannot read {sys.executable} or {ROOT}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="worst surroundings ") as place:
        folder = Path(place)
        kernels = jit.place()
        if kernels is not None:
            shutil.copytree(kernels.path, folder / "kernels" / kernels.path.name)
        if user is not None:
            for path in [folder, *folder.rglob("*")]:
                os.chown(path, user, user)
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, *(() if named else REPRESENTATIVE)],
            cwd=ROOT, env=environment(folder), stdin=subprocess.DEVNULL, check=False, preexec_fn=lambda: endure(user),
        ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
