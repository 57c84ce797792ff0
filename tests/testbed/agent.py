"""The far guest's end of the command channel: starts processes, pulls cables and the plug, on request.

A request is one line of JSON on a TCP connection of its own, the answer another: {"error": text} or {"value": ...}.
Every method of `Agent` is a request of that name. `tests.testbed.peer` is the near end.
"""

from __future__ import annotations

import json
import os
import re
import socketserver
import subprocess
import sys
import threading
from time import monotonic
from typing import Any

from tests.testbed import network


class Child:
    """A process whose output lines are kept, and shown on this guest's terminal."""

    def __init__(self, number: int, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, text=True, errors="replace",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._number = number
        self._lines: list[str] = []
        self._taken = 0
        self._ended = False
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(f"[{self._number}] {line}", end="", flush=True)
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def next_line(self, pattern: str, seconds: float) -> str:
        """The next line that the pattern is found in; those before it are passed over."""
        deadline = monotonic() + seconds
        with self._changed:
            while True:
                while self._taken < len(self._lines):
                    self._taken += 1
                    if re.search(pattern, self._lines[self._taken - 1]):
                        return self._lines[self._taken - 1]
                left = deadline - monotonic()
                if self._ended or left <= 0:
                    why = "it ended" if self._ended else f"within {seconds} s"
                    last = "\n  ".join(["", *self._lines[-20:]])
                    raise LookupError(f"process {self._number}: no line with {pattern!r} ({why}); it said last:{last}")
                self._changed.wait(left)


class Agent:
    """The requests. Processes are called by their number."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def ping(self) -> list[str]:
        """The RDMA devices of this guest."""
        return sorted(os.listdir("/sys/class/infiniband"))

    def start(self, command: list[str], environment: dict[str, str]) -> int:
        """Start a process; its number. `python` is this agent's own interpreter."""
        command = [sys.executable if word == "python" and not at else word for at, word in enumerate(command)]
        self._children.append(Child(len(self._children), command, environment))
        return len(self._children) - 1

    def next_line(self, number: int, pattern: str, seconds: float) -> str:
        """Wait for a line of its output, standard error included."""
        return self._children[number].next_line(pattern, seconds)

    def send(self, number: int, line: str) -> None:
        """Write a line to its standard input."""
        stdin = self._children[number].process.stdin
        assert stdin is not None
        stdin.write(line + "\n")
        stdin.flush()

    def signal(self, number: int, signal: int) -> None:
        """Send it a signal."""
        self._children[number].process.send_signal(signal)

    def wait(self, number: int, seconds: float) -> int:
        """Its exit status; negative is the signal that ended it."""
        return self._children[number].process.wait(seconds)

    def set_link(self, name: str, up: bool) -> None:
        """Plug this guest's end of a link in, or pull it."""
        network.set_link(name, up)

    def power_off(self) -> None:
        """End this guest at once, as if the plug was pulled: nothing is flushed or closed. There is no answer."""
        with open("/proc/sysrq-trigger", "w") as trigger:
            trigger.write("o")


class Handler(socketserver.StreamRequestHandler):
    """One request."""

    agent: Agent

    def handle(self) -> None:
        """Do it, and say what came of it."""
        name, arguments = json.loads(self.rfile.readline())
        answer: dict[str, Any]
        try:
            answer = {"value": getattr(self.agent, name)(**arguments)}
        except Exception as error:  # whatever it is, the near end is to see it
            answer = {"error": f"{type(error).__name__}: {error}"}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


class Server(socketserver.ThreadingTCPServer):
    """A thread for each request, because some of them wait."""

    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    """Serve until the guest is ended."""
    Handler.agent = Agent()
    with Server((network.CONTROL.address("right"), network.PORT), Handler) as server:
        print("agent: ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
