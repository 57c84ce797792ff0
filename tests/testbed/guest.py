"""One virtual machine on the host's own files, which runs one script and is gone."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.testbed import CACHE, ROOT, BedError, interpreter
from tests.testbed.kernel import Kernel

FILES = "bed"  # the tag of the second export of the host's files, which the guest may cache

# Warnings go to the console file. The rest takes work from the emulator: fences, and a fifth level of page tables.
KERNEL = ("loglevel=5", "mitigations=off", "no5lvl")

# A guest's first minute. The root file system is the host's, and knows no caching: every import asks the host for every
# file. So what Python is loaded from is mounted once more, with a cache: `import numba` takes 7 s instead of 30.
PROLOGUE = """\
exec 2>&1
{{ sleep {limit}; echo o > /proc/sysrq-trigger; }} > /dev/null &  # should nobody be left to end this guest
mkdir /run/files /run/scratch
mount -t 9p -o ro,cache=loose,trans=virtio,version=9p2000.L,msize=524288 {tag} /run/files
for folder in {folders}; do mount --bind "/run/files$folder" "$folder"; done
ulimit -l unlimited
export PATH={binaries}:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/run/scratch
cd {root}
"""

EPILOGUE = """
status=$?
sync
echo $status > {status}.new && mv {status}.new {status}
"""


class Guest:
    """A running guest. `script` is bash; its last command's exit status is the guest's.

    What it prints comes out here at once, each line behind `prefix`. Leaving the `with` block ends it.
    """

    def __init__(
        self,
        name: str,
        kernel: Kernel,
        script: str,
        variables: Mapping[str, str],
        *,
        memory: str,
        cpus: int,
        limit: int,
        prefix: str = "",
        devices: Sequence[str] = (),
        descriptors: Sequence[int] = (),
    ) -> None:
        self.name, self._prefix = name, prefix.encode()
        self._folder = tempfile.TemporaryDirectory(prefix=f"{name}-", dir=CACHE)
        folder = Path(self._folder.name)
        self._status, self._console = folder / "status", folder / "console"
        file = folder / "script"
        file.write_text(self._whole(script, variables, limit))
        export = f"local,id={FILES},path=/,security_model=none,readonly=on,multidevs=remap"
        command = [
            interpreter.runner(), "--name", name, "--kimg", str(kernel.image), "--mods", "auto", "--rw", "--force-9p",
            "--disable-kvm",  # where /dev/kvm exists it may still hang the guest
            "--disable-microvm", "--memory", memory, "--cpus", str(cpus), "--cwd", str(ROOT),
            "--show-boot-console", *(word for option in KERNEL for word in ("--kopt", option)),
            "--script-sh", f"bash {shlex.quote(str(file))}",
            "--qemu-opts", "-fsdev", export, "-device", f"virtio-9p-pci,fsdev={FILES},mount_tag={FILES}", *devices,
        ]  # fmt: skip
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=console,
                pass_fds=descriptors, start_new_session=True,
            )  # fmt: skip
        self._copier = threading.Thread(target=self._copy, daemon=True)
        self._copier.start()

    def _whole(self, script: str, variables: Mapping[str, str], limit: int) -> str:
        folders = " ".join(shlex.quote(str(folder)) for folder in sorted(interpreter.read_only()))
        binaries = shlex.quote(str(Path(sys.executable).parent))
        prologue = PROLOGUE.format(
            limit=limit + 60, tag=FILES, folders=folders, binaries=binaries, root=shlex.quote(str(ROOT))
        )
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        return prologue + exports + script + EPILOGUE.format(status=shlex.quote(str(self._status)))

    def _copy(self) -> None:
        """Pass on what comes; whole lines where several guests share the terminal."""
        output, source = sys.stdout.buffer, self._process.stdout
        assert source is not None
        if self._prefix:
            for line in source:
                output.write(self._prefix + line)
                output.flush()
        else:
            while some := os.read(source.fileno(), 65536):
                output.write(some)
                output.flush()

    def wait(self, limit: float) -> int:
        """The script's exit status; `BedError` when the guest ended without one, or not within `limit` seconds."""
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            raise BedError(
                f"the {self.name} guest was ended after {limit:.0f} s: it hangs, or needs more than that (--limit, or "
                f"make ... LIMIT=seconds){self._last_words()}"
            ) from None
        self._copier.join(10)
        if not self._status.exists():
            raise BedError(f"the {self.name} guest ended before its script did{self._last_words()}")
        return int(self._status.read_text())

    def _last_words(self) -> str:
        lines = self._console.read_text(errors="replace").splitlines()
        return "".join(f"\n  {line}" for line in ["; the end of its console:", *lines[-60:]])

    def end(self) -> None:
        """Pull the plug, if it still runs; returns when it is gone."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)  # virtme-run and QEMU
                self._process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        self._copier.join(5)

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._folder.cleanup()
