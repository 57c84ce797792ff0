"""Engines on the other host, each in a process of its own: `python -m tests.rdma.two_hosts.far HOST:PORT`.

This process loads everything once, which takes a minute under emulation, then forks a child for each connection. What
comes over a connection is what the child does: the first line opens its engine, each further one is a command.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
from typing import TextIO

import numpy as np

from mooncache import Engine
from mooncache.kernels import jit
from mooncache.providers.rdma.provider import Rdma


def serve(lines: TextIO, answers: TextIO) -> None:
    """Be an engine that lends its memory, until the lines end."""

    def say(*words: object) -> None:
        print(*words, file=answers, flush=True)

    listen, arena, *devices = lines.readline().split()
    memory = np.zeros(int(arena), np.uint8)
    name = f"far-{listen.rpartition(':')[2]}"
    with Engine(name, provider=Rdma(devices, timeout=17), listen=listen, insecure=True) as engine:
        region = engine.register(memory)
        say(os.getpid(), engine.address, region.address)
        for line in lines:
            command, *values = line.split()
            if command == "sum":
                say(hashlib.blake2b(memory.tobytes(), digest_size=16).hexdigest())
            elif command == "fill":
                stream = np.random.Generator(np.random.Philox(key=[int(values[0]), 0]))
                memory[:] = stream.integers(1, 256, memory.size, dtype=np.uint8)
                say("filled")
            elif command == "clear":
                memory[:] = 0
                say("cleared")
            elif command == "note":
                say(engine.notifications().get(float(values[0])).message.decode())


def main() -> None:
    """Fork a child for each connection."""
    host, _, port = sys.argv[1].rpartition(":")
    jit.prewarm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.create_server((host, int(port))) as server:
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                with connection, connection.makefile("r") as lines, connection.makefile("w") as answers:
                    serve(lines, answers)
                return
            connection.close()


if __name__ == "__main__":
    main()
