"""A listener under test, and callers of it: proper ones, and one that speaks bytes."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any

from mooncache.discovery import handshake
from mooncache.discovery.dial import dial
from mooncache.discovery.handshake import Call, Hello, frame
from mooncache.discovery.listener import Listener
from mooncache.discovery.messages import Answer, Reply, Request
from mooncache.discovery.secret import key_of
from tests.helpers import LIMIT, Task

SECRET = b"only we know"


def echo(request: Request) -> Reply:
    return Reply({"purpose": request.purpose, "caller": request.caller, "body": request.body, "local": request.local})


def ask(where: Listener | str, purpose: str = "echo", body: dict[str, Any] | None = None, **options: Any) -> Answer:
    address = where if isinstance(where, str) else where.address
    return dial(address, purpose, body or {}, **{"caller": "asking", "generation": 7, "secret": None, **options})


def asked(where: Listener | str, purpose: str = "echo", body: dict[str, Any] | None = None, **options: Any) -> Any:
    """The body of the answer, when the rest is not wanted."""
    answer = ask(where, purpose, body, **options)
    answer.sock.close()
    return answer.body


class Raw:
    """A client by hand."""

    def __init__(self, where: Listener) -> None:
        host, _, port = where.address.rpartition(":")
        self.sock = socket.create_connection((host.strip("[]"), int(port)), timeout=LIMIT)
        self.hello = Hello.read(self.receive(), "the listener")

    def receive(self) -> bytes:
        return self.exactly(handshake.text_bytes(self.exactly(8), handshake.ANSWER_BYTES, "the listener"))

    def exactly(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            more = self.sock.recv(n - len(data))
            assert more, "hung up"
            data += more
        return data

    def call(self, secret: bytes | None = None, **changes: Any) -> bytes:
        key = None if secret is None else key_of(secret)
        message = Call(self.hello, handshake.new_nonce(), "echo", "asking", 7, {}).message(key)
        return json.dumps({**message, **changes}).encode()

    def send(self, text: bytes, magic: bytes = handshake.MAGIC, length: int | None = None) -> None:
        self.sock.sendall(struct.pack(">4sI", magic, len(text) if length is None else length) + text)

    def is_hung_up(self) -> bool:
        """Waits for the end of the connection; nothing may come before it."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:  # the listener had not read everything
            return True

    def close(self) -> None:
        self.sock.close()


def receive(sock: socket.socket, n: int) -> bytes:
    sock.settimeout(LIMIT)
    data = b""
    while len(data) < n:
        data += sock.recv(n - len(data))
    return data


class Impostor:
    """Says what it is told to instead of an engine's hello and answer, and then hangs up."""

    def __init__(self, hello: bytes, answer: Callable[[bytes], bytes] | None = None) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._sock.getsockname()[1]}"
        self._hello, self._answer = hello, answer
        self._task = Task(self._run)

    def _run(self) -> None:
        self._sock.settimeout(LIMIT)
        sock, _ = self._sock.accept()
        with sock:
            sock.sendall(self._hello)
            if self._answer is not None:
                header = receive(sock, 8)
                text = receive(sock, handshake.text_bytes(header, handshake.CALL_BYTES, "the caller"))
                sock.sendall(self._answer(text))

    def close(self) -> None:
        self._task.result()
        self._sock.close()


HELLO = Hello("0" * 64, False)


def said(value: Any, limit: int = 1 << 20) -> bytes:
    return frame(value, limit)
