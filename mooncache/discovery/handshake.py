"""The handshake, without I/O: frames, the three messages, the proofs in them, and the limits of both sides.

    server                                    client
      hello   version, nonce, secured   ---->
              <----   call    version, nonce, purpose, caller, generation, body, proof
      answer  body, fds, proof          ---->
      or      error (kind, message), proof

A proof is an HMAC-SHA256 over who says it and everything both have said. Both nonces are in it, so nothing that was
recorded can be said again. Its key is made of the secret (see `secret`). The caller proves first: one who cannot gets
an error with an empty proof, and nothing that was made with the secret. Where everybody is answered proofs are empty,
and nobody is asked for one.

`listener` is the server, `dial` the client. After the answer the connection may go on as something else.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from mooncache.discovery.fields import VERSION, WORD, Fields, check_version, dump, parse
from mooncache.discovery.record import RECORD_BYTES
from mooncache.errors import CapacityError, DiscoveryError
from mooncache.limits import NICS, QUEUE_PAIRS, REGIONS_MOST, WORKERS, KiB

MAGIC = b"MOON"
HEADER = struct.Struct(">4sI")
NONCE_BYTES = 32

HANDSHAKE_S = 5.0
"""The time for a whole handshake: a thousand times that of three messages on a busy network."""

FDS = (
    REGIONS_MOST  # a segment each
    + 2  # a key table and guards
)
"""File descriptors that an answer can bring."""

FDS_A_MESSAGE = 250
"""File descriptors behind one byte; the kernel's limit is 253 (SCM_MAX_FD)."""

TCP_OPTIONS = {
    (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 4,  # s
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 2,  # s
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 10_000,  # ms
}
"""The options of every connection. A host that vanished shows within 10 s: 4 s of silence and 3 probes 2 s apart
unanswered, or bytes that nobody acknowledged for 10 s, since no probes are sent while there are such bytes."""

HELLO_BYTES = 1 * KiB
"""Largest hello, whatever version it speaks: a nonce in hex and three field names."""

COMMON_BYTES = (
    255 * 12  # the caller's name, each character escaped as two halves
    + 2 * 64  # nonce and proof
    + 20  # generation
    + 884  # the names of fields, version, purpose, what else a body says; rounded up to 4 KiB
)
"""The bytes of each call, and of each answer, besides what grows with an engine."""

CONNECT_BYTES = (
    NICS * 96  # paths: GID of 39 characters, LID, MTU, rkey, three small numbers
    + WORKERS * QUEUE_PAIRS * 24  # path, number of the queue pair and of its first packet, 24 bits each
    + NICS * 96  # the same for notifications; in answers with an address and an rkey of 19 digits
    + 20  # address of the answer word
)
"""The bytes in which a peer over RDMA describes its queue pairs when it connects, or is answered."""

SEGMENTS_BYTES = REGIONS_MOST * 64
"""Number, address and length of each segment that a peer on this host may map, 19 digits each; asked by number."""

CALL_BYTES = COMMON_BYTES + max(CONNECT_BYTES, REGIONS_MOST * 20)
"""Largest call: 256 strangers at once hold 22 MiB."""

ANSWER_BYTES = COMMON_BYTES + max(RECORD_BYTES, CONNECT_BYTES, SEGMENTS_BYTES)
"""Largest answer."""

MESSAGE_LENGTH = 1000
"""Characters of an error that travel."""


def frame(message: dict[str, Any], limit: int) -> bytes:
    """Write header and JSON of a message. Raises CapacityError when the JSON is longer than `limit` bytes."""
    text = dump(message)
    if len(text) > limit:
        raise CapacityError(f"a handshake's message of {len(text)} bytes is too long; limit {limit}")
    return HEADER.pack(MAGIC, len(text)) + text


def text_bytes(header: bytes, limit: int, source: str) -> int:
    """Read how many bytes follow a header. Raises DiscoveryError for a foreign one, or more than `limit` bytes."""
    magic, length = HEADER.unpack(header)
    if magic != MAGIC:
        raise DiscoveryError(f"{source}: expected {MAGIC!r}, got {magic!r}: this is no handshake of Mooncache")
    if length > limit:
        raise DiscoveryError(f"{source}: expected a message of at most {limit} bytes, {length} were announced")
    return int(length)


def new_nonce() -> str:
    """Draw 32 bytes nobody has seen before, in hex."""
    return secrets.token_hex(NONCE_BYTES)


def set_options(sock: socket.socket) -> None:
    """Set the options that every TCP connection has, on both sides."""
    for option, value in TCP_OPTIONS.items():
        sock.setsockopt(*option, value)


class Hello(NamedTuple):
    """The server's first message.

    Attributes:
        secured: callers have to prove that they know a secret.
        user: that is the one of the user as whom the server runs.
    """

    nonce: str
    secured: bool
    user: bool = False

    def message(self) -> dict[str, Any]:
        """Encode the message."""
        said = {"version": VERSION, "nonce": self.nonce, "secured": self.secured}
        return {**said, "user": True} if self.user else said

    @classmethod
    def read(cls, text: bytes, source: str) -> Hello:
        """Read a message. Raises DiscoveryError for another version or anything that is no hello."""
        value = parse(text, source)
        check_version(value, source)
        whose = ("user",) if "user" in value else ()
        fields = Fields(value, source, ("version", "nonce", "secured", *whose))
        secured = fields.get("secured", bool)
        return cls(fields.name("nonce"), secured, secured and bool(whose) and fields.get("user", bool))


class Answered(NamedTuple):
    """A good answer; so many file descriptors follow it."""

    body: dict[str, Any]
    fds: int

    def content(self) -> dict[str, Any]:
        """Return the part that is proven."""
        return {"body": self.body, "fds": self.fds}


class Refused(NamedTuple):
    """An error: the name of its class, and its text."""

    kind: str
    message: str

    def content(self) -> dict[str, Any]:
        """Return the part that is proven."""
        return {"error": {"kind": self.kind, "message": self.message[:MESSAGE_LENGTH]}}


@dataclass(frozen=True)
class Call:
    """The client's message, and all that its proof and the answer's cover."""

    hello: Hello
    nonce: str
    purpose: str
    caller: str
    generation: int
    body: dict[str, Any]

    def message(self, key: bytes | None) -> dict[str, Any]:
        """Encode the message."""
        return {
            "version": VERSION, "nonce": self.nonce, "purpose": self.purpose, "caller": self.caller,
            "generation": self.generation, "body": self.body, "proof": self._proof(key, "client", None),
        }  # fmt: skip

    @classmethod
    def read(cls, text: bytes, hello: Hello, key: bytes | None, source: str) -> tuple[Call, bool]:
        """Read a call; return it, and whether it proves that the caller knows the secret.

        Raises DiscoveryError for another version or anything that is no call.
        """
        value = parse(text, source)
        check_version(value, source)
        names = ("version", "nonce", "purpose", "caller", "generation", "body", "proof")
        fields = Fields(value, source, names)
        call = cls(
            hello, fields.name("nonce"), fields.name("purpose"), fields.name("caller"),
            fields.integer("generation", 1, WORD), fields.get("body", dict),
        )  # fmt: skip
        return call, _same(fields.get("proof", str), call._proof(key, "client", None))

    def answer(self, said: Answered | Refused, key: bytes | None) -> dict[str, Any]:
        """Encode the server's answer. `key` is None for a caller who has proven nothing."""
        content = said.content()
        return {**content, "proof": self._proof(key, "server", content)}

    def read_answer(self, text: bytes, key: bytes | None, source: str) -> Answered | Refused:
        """Read the server's answer. Raises DiscoveryError when it is no answer, or not proven."""
        value = parse(text, source)
        keys = ("error", "proof") if isinstance(value, dict) and "error" in value else ("body", "fds", "proof")
        fields = Fields(value, source, keys)
        content = {name: fields.get(name, object) for name in keys[:-1]}
        if not _same(fields.get("proof", str), self._proof(key, "server", content)):
            if self.hello.user:
                raise DiscoveryError(
                    f"{source} did not prove that it knows the secret of this engine's user: it is another user's, or "
                    "in another container; start both engines with the same one, by secret="
                )
            raise DiscoveryError(
                f"{source} did not prove that it knows this engine's secret; start both engines with the same one"
            )
        if "error" in content:
            error = Fields(content["error"], source, ("kind", "message"))
            return Refused(error.name("kind"), error.get("message", str))
        return Answered(fields.get("body", dict), fields.integer("fds", 0, FDS + 1))

    def _proof(self, key: bytes | None, role: str, content: object) -> str:
        if key is None:
            return ""
        said = [
            role, VERSION, self.hello.nonce, self.nonce, self.purpose, self.caller, self.generation, self.body, content
        ]  # fmt: skip
        return hmac.digest(key, dump(said), "sha256").hex()


def _same(proof: str, expected: str) -> bool:
    """Compare in a time that tells nothing about where they differ."""
    return hmac.compare_digest(proof.encode(errors="replace"), expected.encode())
