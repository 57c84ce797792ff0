"""Other processes for tests: each runs functions of `there` on request, and can be stopped and killed.

They are forked by a *nursery*, an interpreter of its own that has loaded everything and has no threads: a process
costs milliseconds, inherits nothing of the test's, and is as real as any other.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.helpers import LIMIT, ROOT, environment, until


class Far:
    """Another process. `far(function, ...)` runs a function of `there` in it; its exceptions are raised here."""

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection, self.pid = connection, pid
        self._end = os.pidfd_open(pid)
        self.alive = True

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.tell(function, *arguments, **options)
        return self.answer()

    def tell(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Let it begin; `answer` fetches what comes of it."""
        self._connection.send((function, arguments, options))

    def answer(self) -> Any:
        assert self._connection.poll(LIMIT), "another process does not answer"
        good, value = self._connection.recv()
        if not good:
            raise value
        return value

    def has_answered(self, within: float = 0) -> bool:
        return self._connection.poll(within)

    def stop(self) -> None:
        """Stop all its threads; returns when they have."""
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: self._states() == {"T"}, "the process, stopped")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash would; returns when the system has closed all it held."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            self.close()

    def let_go(self) -> None:
        """Let it end by itself; `close` waits for that."""
        self._connection.close()

    def close(self) -> None:
        if self.alive:
            self.alive = False
            self.let_go()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)  # a test that failed may have left it stopped
            ended, _, _ = select.select([self._end], [], [], LIMIT)
            os.close(self._end)
            assert ended, "another process does not end"

    def _states(self) -> set[str]:
        """Of its threads; of one that ends meanwhile none."""
        states = set()
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(OSError):
                states.add((thread / "stat").read_text().rpartition(")")[2].split()[0])
        return states


class Nursery:
    """Forks processes."""

    def __init__(self) -> None:
        ours, its = socket.socketpair()
        self._child = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", "from tests.wires.processes import nurse; nurse()"],
            env=environment(), cwd=ROOT, stdin=its,
        )  # fmt: skip
        its.close()
        self._socket = ours
        self._lock = threading.Lock()

    def fork(self) -> Far:
        ours, its = socket.socketpair()
        with self._lock, its:
            socket.send_fds(self._socket, [b"f"], [its.fileno()])
            pid = int.from_bytes(self._socket.recv(4), "little")
        return Far(Connection(ours.detach()), pid)

    def close(self) -> None:
        self._socket.close()
        assert self._child.wait(LIMIT) == 0


def nurse() -> None:
    """The nursery's side."""
    from mooncache.kernels import jit
    from tests.wires import there

    jit.prewarm()
    requests = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: they leave no zombies
    while True:
        _, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not descriptors:
            return
        pid = os.fork()
        if pid == 0:
            requests.close()
            there.serve(Connection(descriptors[0]))
        os.close(descriptors[0])
        requests.sendall(pid.to_bytes(4, "little"))
