"""Frames written and read by hand, as a peer that means no good could."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from mooncache.discovery.dial import dial
from mooncache.providers.stream.frames import HEADER_BYTES, MAGIC
from mooncache.providers.stream.lane import FRAMES_VERSION
from tests.helpers import LIMIT

Entry = tuple[int, int, int]


def lane_to(address: str, caller: str = "a stranger", *, queue: int = 0, round: int = 0) -> socket.socket:
    """A connection that carries frames to an engine."""
    body = {"lanes": FRAMES_VERSION, "queue": queue, "round": round}
    sock = dial(address, "lane", body, caller=caller, generation=1, secret=None).sock
    sock.settimeout(LIMIT)
    return sock


def frame(
    kind: int, seq: int, entries: Sequence[Entry] = (), body: bytes = b"", *, magic: int = MAGIC,
    count: int | None = None, size: int | None = None,
) -> bytes:  # fmt: skip
    """A frame; `count` and `size` where they are to lie."""
    head = struct.pack(
        "<4q", magic | kind, seq, len(entries) if count is None else count, len(body) if size is None else size
    )
    table = b"".join(struct.pack("<3q", *entry) for entry in entries)
    return (head + table).ljust(HEADER_BYTES, b"\0") + body


class Head(NamedTuple):
    """What starts a frame."""

    kind: int
    seq: int
    entries: list[Entry]
    size: int
    padding: bytes  # what fills the header behind a short table


def receive(sock: socket.socket, n: int) -> bytes:
    """Exactly n bytes. Raises ConnectionError at the end of the stream."""
    got = bytearray()
    while len(got) < n:
        some = sock.recv(min(n - len(got), 1 << 20))
        if not some:
            raise ConnectionError("the stream has ended")
        got += some
    return bytes(got)


def receive_head(sock: socket.socket) -> Head:
    head = receive(sock, HEADER_BYTES)
    kind, seq, count, size = struct.unpack_from("<4q", head)
    head += receive(sock, max(0, 32 + 24 * count - HEADER_BYTES))
    entries = [struct.unpack_from("<3q", head, 32 + 24 * i) for i in range(count)]
    return Head(kind - MAGIC, seq, entries, size, head[32 + 24 * count :])


def closed(sock: socket.socket) -> bool:
    """Whether the other side hangs up, with nothing more said; waits for that."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True
