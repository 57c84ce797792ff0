"""The near end of the command channel: the other guest as tests see it."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

LIMIT = 120.0  # seconds: far more than anything here takes, also emulated; only a hang gets there


class Peer:
    """The other guest, by the address of its agent."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self.host = host
        self.gone = False  # whether its plug was pulled

    def wait_until_up(self, limit: float) -> None:
        """Its kernel may have started after ours."""
        deadline = monotonic() + limit
        while True:
            try:
                self.ask("ping")
                return
            except OSError as error:
                if monotonic() > deadline:
                    raise AssertionError(f"no agent at {self._address} within {limit} s: {error}") from None
                sleep(0.2)

    def ask(self, request: str, limit: float = LIMIT, **arguments: Any) -> Any:
        """Send a request to the agent, and return its answer. `OSError` when there is nobody."""
        if self.gone:
            raise ConnectionResetError(f"{request}: the other guest's plug was pulled")
        with socket.create_connection(self._address, timeout=limit) as connection:
            connection.sendall(json.dumps([request, arguments]).encode() + b"\n")
            with connection.makefile() as answers:
                line = answers.readline()
        if not line:
            raise ConnectionResetError(f"the agent went away during {request}")
        answer = json.loads(line)
        assert "error" not in answer, f"{request} in the other guest: {answer['error']}"
        return answer["value"]

    def start(self, *command: str, **environment: str) -> Process:
        """Start a process there, in the checkout: `peer.start("python", "-m", "tests.rdma.far", NAME="value")`."""
        return Process(self, self.ask("start", command=list(command), environment=environment))

    def set_link(self, name: str, up: bool) -> None:
        """Plug its end of a link in, or pull it."""
        self.ask("set_link", name=name, up=up)

    def power_off(self, limit: float = LIMIT) -> None:
        """Pull its plug: what it does stops in the middle, and nobody is told. There is no way back."""
        with suppress(OSError):  # no answer
            self.ask("power_off", limit=2.0)
        deadline = monotonic() + limit
        while monotonic() < deadline:
            try:
                self.ask("ping", limit=1.0)
            except OSError:
                self.gone = True
                return
        raise AssertionError(f"the other guest is still there after {limit} s")


class Process:
    """A process in the other guest."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer, self._number = peer, number

    def expect(self, pattern: str = "", limit: float = LIMIT) -> str:
        """The next line of its output that the pattern (`re.search`) is found in; passes over those before it."""
        return str(self._ask("next_line", limit=limit + 10, pattern=pattern, seconds=limit))

    def send(self, line: str) -> None:
        """Write a line to its standard input."""
        self._ask("send", line=line)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        self._ask("signal", signal=int(number))

    def wait(self, limit: float = LIMIT) -> int:
        """Its exit status, as `subprocess` says it."""
        return int(self._ask("wait", limit=limit + 10, seconds=limit))

    def _ask(self, request: str, **arguments: Any) -> Any:
        return self._peer.ask(request, number=self._number, **arguments)
