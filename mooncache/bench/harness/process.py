"""A bench's other processes: each answers commands, one JSON object a line on its stdin and stdout."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic
from typing import Any

from mooncache.errors import MooncacheError

PATIENCE_S = 120.0  # the slowest step anywhere: 270,000 slices through a package that does 12,000 a second, and more
LEAVE_S = 10.0
NEWLINE = "\n"


class ProcessError(MooncacheError):
    """A process of a bench failed, or does not answer."""


class Process:
    """A Python process that runs `serve` in a module of this package.

    It has an interpreter of its own choice, so that it can see packages that this one does not; ours come first there.
    What it writes to stderr is kept, and quoted if it dies.
    """

    def __init__(self, module: str, *, python: str = sys.executable, environment: Mapping[str, str] | None = None):
        path = os.pathsep.join(place for place in sys.path if place)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._child = subprocess.Popen(
            [python, "-c", f"from {module} import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )  # fmt: skip
        self._came = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def tell(self, **command: Any) -> None:
        """Send a command; its `answer` has to be taken before the next."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
            self._child.stdin.flush()
        except OSError as error:
            raise self._died() from error

    def answer(self, patience: float = PATIENCE_S) -> Any:
        """Return the process's answer.

        Raises ProcessError if it is an error, if the process is gone or takes too long.
        """
        assert self._child.stdout is not None
        end = monotonic() + patience
        while b"\n" not in self._came:
            if not select.select([self._child.stdout], [], [], max(0.0, end - monotonic()))[0]:
                raise ProcessError(f"a process of the bench did not answer within {patience:.0f} s")
            some = os.read(self._child.stdout.fileno(), 1 << 16)
            if not some:
                raise self._died()
            self._came += some
        line, _, self._came = self._came.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise ProcessError(answer["error"])
        return answer["result"]

    def ask(self, **command: Any) -> Any:
        """Send a command and wait for its answer."""
        self.tell(**command)
        return self.answer()

    def _died(self) -> ProcessError:
        status = self._child.wait(LEAVE_S)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing on stderr")
        return ProcessError(f"a process of the bench ended with status {status}: {last}")

    def close(self) -> None:
        """Ask the process to leave by closing its stdin; kill it if it stays."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(OSError):  # it is gone, and what was still to be sent to it with it
            self._child.stdin.close()
        try:
            self._child.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._errors.close()

    def kill(self) -> None:
        """End the process at once."""
        self._child.kill()

    def pause(self, paused: bool) -> None:
        """Stop all its threads, or let them go on."""
        self._child.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            self.kill()  # it may wait for somebody who will not come
        self.close()


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Run what each line of stdin asks for in "do", until stdin ends: the child's side of `Process`.

    Answers have stdout for themselves; whatever else prints there goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"result": handlers[command.pop("do")](**command)}
        except MooncacheError as error:
            answer = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).partition(NEWLINE)[0]}"}
        print(json.dumps(answer), file=answers, flush=True)
