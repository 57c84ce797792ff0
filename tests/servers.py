"""Real servers of both stores, on ports of their own, that can be killed, frozen and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.helpers import until


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


class Server:
    """One server process. `forgets`: what it knew does not survive a restart."""

    forgets: bool

    def __init__(self, kind: str, folder: Path) -> None:
        binary = "redis-server" if kind == "redis" else "etcd"
        if shutil.which(binary) is None:
            why = f"{binary} is missing: apt-get install redis-server etcd-server"
            pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
        self.port, peers = free_ports(2)
        self.forgets = kind == "redis"
        self.url = f"{kind}://127.0.0.1:{self.port}"
        if kind == "redis":
            self._command = [
                binary,
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--dir",
                str(folder),
            ]
        else:
            client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{peers}"
            self._command = [
                binary, "--data-dir", str(folder / "etcd"), "--listen-client-urls", client,
                "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", f"default={peer}", "--unsafe-no-fsync",
                "--heartbeat-interval", "10", "--election-timeout", "100",  # leases of 1 s
            ]  # fmt: skip
        self._log = folder / "log"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        until(self._answers, f"{self._command[0]} answering; see {self._log}")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        question = b"PING\r\n" if self.forgets else b"GET /health HTTP/1.0\r\n\r\n"
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as sock:
                sock.sendall(question)
                answer = b""
                while more := sock.recv(1000):
                    answer += more
                    if b"PONG" in answer or b'"health":"true"' in answer:
                        return True
        except OSError:
            pass
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """It still takes connections, and answers nothing; returns when all its threads have stopped."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)
