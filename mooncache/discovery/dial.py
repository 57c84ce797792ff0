"""The asking side of a handshake."""

from __future__ import annotations

import errno
import os
import socket
import threading
from array import array
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from mooncache import forks, shortage
from mooncache.deadline import Deadline
from mooncache.discovery import handshake
from mooncache.discovery.address import parse_address
from mooncache.discovery.credentials import Process, process_at
from mooncache.discovery.handshake import FDS_A_MESSAGE, Call, Hello, Refused
from mooncache.discovery.messages import Answer
from mooncache.discovery.secret import check_secret, key_of, of_user
from mooncache.errors import CapacityError, DiscoveryError, EngineClosed, TransportError, UsageError
from mooncache.threads import Thread

KINDS = {kind.__name__: kind for kind in (UsageError, CapacityError, TransportError, DiscoveryError, EngineClosed)}
"""Errors that keep their class on the way to the caller."""


class AnotherUser(TransportError):
    """The engine at a Unix socket runs as another user, and no secret says that it is to be trusted."""


def dial(
    address: str, purpose: str, body: dict[str, Any], *, caller: str, generation: int, secret: bytes | None,
    deadline: Deadline | None = None,
) -> Answer:  # fmt: skip
    """Ask the engine at an address, and wait for its answer.

    Args:
        address: "host:port", or "unix:NAME" for the abstract socket `Listener.unix` of an engine of this host.
        purpose, body: see `Request`. `body` is a JSON object; the whole call is limited to handshake.CALL_BYTES.
        caller, generation: of the asking engine.
        secret: what the other side's `Listener` has. Without one, the user's own serves where that is asked for, and a
            Unix socket of another user's is not spoken to.
        deadline: of who waits for it, in so many seconds; handshake.HANDSHAKE_S unless given.

    Raises:
        UsageError: a bad address or secret. CapacityError: the call is too long.
        DiscoveryError: the host's name is unknown, only one side has a secret, they differ, the versions differ, or
            what answers is no engine.
        TransportError: the connection was refused, broke, or took longer than the deadline.
        AnotherUser: see `secret`.
        Any of these and EngineClosed: what `serve` over there raised. EngineClosed too: the deadline was ended.
    """
    check_secret(secret)
    deadline = deadline or Deadline(handshake.HANDSHAKE_S)
    deadline.waits_for(f"{address} to take a connection")
    why = "that host is down, or a firewall does not let its port through"
    try:
        sock = _connect(address, deadline)
        deadline.waits_for(f"{address} to answer {purpose!r}")
        why = (
            "it takes connections, so its process is stopped or overloaded, or some call there keeps the GIL and with "
            "it all Python threads, or what listens there is no engine"
        )
        try:
            if secret is None and sock.family == socket.AF_UNIX:
                _check_user(process_at(sock), address)
            with deadline.over_socket(sock):
                answer = _ask(sock, address, purpose, body, caller, generation, secret, deadline)
            sock.settimeout(None)
            return answer
        except BaseException:
            sock.close()
            raise
    except TimeoutError as error:
        raise TransportError(f"no answer from {address} within {deadline.seconds or 0:.3g} s: {why}") from error
    except ConnectionRefusedError as error:
        raise TransportError(
            f"{address} refused the connection; is the engine there open, and is this its address?"
        ) from error
    except OSError as error:
        if deadline.ended:
            raise EngineClosed(deadline.ended) from error
        what = f"no handshake with {address}"
        raise shortage.none_left(error, what) or TransportError(
            f"{what}: {error.strerror or error}; try again"
        ) from error


def _check_user(process: Process, address: str) -> None:
    if not process.ours:
        raise AnotherUser(
            f"{address} is an engine of user {process.uid}, this one of user {os.geteuid()}: give both the same secret="
        )


def _ask(
    sock: socket.socket, address: str, purpose: str, body: dict[str, Any], caller: str, generation: int,
    secret: bytes | None, deadline: Deadline,
) -> Answer:  # fmt: skip
    hello = Hello.read(_receive_text(sock, handshake.HELLO_BYTES, address, deadline), address)
    key = _key_for(hello, secret, address)
    call = Call(hello, handshake.new_nonce(), purpose, caller, generation, body)
    sock.settimeout(deadline.left())
    sock.sendall(handshake.frame(call.message(key), handshake.CALL_BYTES))
    text = _receive_text(sock, handshake.ANSWER_BYTES, address, deadline)
    answer = call.read_answer(text, key, address)
    if isinstance(answer, Refused):
        raise KINDS.get(answer.kind, DiscoveryError)(f"{address} answers: {answer.message}")
    return Answer(answer.body, sock, _receive_fds(sock, answer.fds, address, deadline))


def _key_for(hello: Hello, secret: bytes | None, address: str) -> bytes | None:
    """Return the key to prove with: of the secret given to both sides, else the user's own, or none."""
    given = hello.secured and not hello.user
    if given != (secret is not None):
        who, other = ("it", "this engine") if given else ("this engine", "it")
        raise DiscoveryError(f"{address}: {who} has a secret and {other} has none; start both with the same one")
    if secret is not None:
        return key_of(secret)
    return of_user() if hello.user else None


def _connect(address: str, deadline: Deadline) -> socket.socket:
    """Connect to the first of the host's addresses that takes the connection."""
    if address.startswith("unix:"):
        return _connect_to(socket.AF_UNIX, "\0" + address.removeprefix("unix:"), deadline)
    host, port = parse_address(address)
    try:
        found = _resolve(host, port, deadline)
    except TimeoutError as error:
        raise DiscoveryError(
            f"host {host!r} was not found within {deadline.seconds or 0:.3g} s; does the system's resolver answer?"
        ) from error
    except (OSError, UnicodeError) as error:
        raise DiscoveryError(f"host {host!r} of {address} is unknown ({error}); is the name right?") from error
    deadline.waits_for(f"{address} to take a connection")
    for family, where in found[:-1]:
        # An address that never answers leaves the others their share of the time.
        with suppress(OSError):
            return _connect_to(family, where, deadline.within(deadline.left() / len(found)))
    return _connect_to(*found[-1], deadline)


class _LookUps:
    """Look-ups under way, by host and port. A forked child has none: the threads at work are the parent's."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.futures: dict[tuple[str, int], Future[list[tuple[int, Any]]]] = {}

    disown = __init__  # see `forks.Holder`


_look_ups = forks.private(_LookUps())


def _resolve(host: str, port: int, deadline: Deadline) -> list[tuple[int, Any]]:
    """Return address family and socket address of a host. The system's look-up has no limit: it runs in a thread.

    Whoever asks for the same meanwhile waits for the same thread, so that no more than one is left behind.
    """
    with suppress(OSError, UnicodeError):  # an address needs no look-up
        return _getaddrinfo(host, port, socket.AI_NUMERICHOST)
    with _look_ups.lock:
        found = _look_ups.futures.get((host, port))
        if found is None:
            found = Future()
            with shortage.told(f"host {host!r} cannot be looked up"):
                Thread(f"look-up-{host}", partial(_look_up, host, port, found)).start()
            _look_ups.futures[host, port] = found
    deadline.waits_for(f"the address of host {host!r}")
    if not deadline.until(found.done):
        raise TimeoutError
    return found.result()


def _look_up(host: str, port: int, found: Future[list[tuple[int, Any]]]) -> None:
    try:
        addresses = _getaddrinfo(host, port)
    except BaseException as error:
        _forget_look_up(host, port)
        found.set_exception(error)
    else:
        _forget_look_up(host, port)
        found.set_result(addresses)


def _forget_look_up(host: str, port: int) -> None:
    with _look_ups.lock:
        _look_ups.futures.pop((host, port), None)  # none: whoever started this was interrupted


def _getaddrinfo(host: str, port: int, flags: int = 0) -> list[tuple[int, Any]]:
    return [(found[0], found[4]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)]


def _connect_to(family: int, where: Any, deadline: Deadline) -> socket.socket:
    sock = forks.private(socket.socket(family, socket.SOCK_STREAM))
    try:
        if family != socket.AF_UNIX:
            handshake.set_options(sock)
        sock.settimeout(deadline.left())
        with deadline.over_socket(sock):
            sock.connect(where)
    except BaseException:
        sock.close()
        raise
    return sock


def _receive_text(sock: socket.socket, limit: int, source: str, deadline: Deadline) -> bytes:
    header = _receive(sock, handshake.HEADER.size, deadline)
    return _receive(sock, handshake.text_bytes(header, limit, source), deadline)


def _receive(sock: socket.socket, n: int, deadline: Deadline) -> bytes:
    """Read exactly n bytes: what comes after the answer is the caller's."""
    got = bytearray()
    while len(got) < n:
        sock.settimeout(deadline.left())
        more = sock.recv(n - len(got))
        if not more:
            raise ConnectionError("it hung up before it had answered; its log says why")
        got += more
    return bytes(got)


def _receive_fds(sock: socket.socket, n: int, source: str, deadline: Deadline) -> list[int]:
    fds = array("i")
    try:
        while len(fds) < n:
            sock.settimeout(deadline.left())
            lot = min(FDS_A_MESSAGE, n - len(fds))
            # Not socket.recv_fds, which ignores its flags: children would inherit the descriptors.
            space = socket.CMSG_SPACE(lot * fds.itemsize)
            data, received, flags, _ = sock.recvmsg(1, space, socket.MSG_CMSG_CLOEXEC)
            for _, _, got in received:
                fds.frombytes(got[: len(got) - len(got) % fds.itemsize])
            if flags & socket.MSG_CTRUNC:  # the system had no number to give to the next
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if not data or not received:
                raise TransportError(f"{source} sent {len(fds)} of {n} file descriptors; its log says why")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds.tolist()
