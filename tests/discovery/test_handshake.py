"""Both sides of the handshake over real sockets, with every way in which one of them can misbehave."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.deadline import Deadline
from mooncache.discovery import dial as dialling
from mooncache.discovery import handshake, listener, visitors
from mooncache.discovery.dial import dial
from mooncache.discovery.handshake import Answered, Call, Hello, frame
from mooncache.discovery.listener import SERVING, Listener
from mooncache.discovery.messages import Answer, Reply, Request
from mooncache.discovery.secret import key_of, of_user
from mooncache.errors import (
    CapacityError,
    DiscoveryError,
    EngineClosed,
    MooncacheError,
    TransportError,
    UsageError,
)
from tests.helpers import LIMIT, Task, until
from tests.servers import has_ipv6

SECRET = b"only we know"


def echo(request: Request) -> Reply:
    return Reply({"purpose": request.purpose, "caller": request.caller, "body": request.body, "local": request.local})


@pytest.fixture
def listeners() -> Iterator[Callable[..., Listener]]:
    """Makes listeners, that answer anybody unless told otherwise, and closes them all."""
    made: list[Listener] = []

    def make(bind: str = "127.0.0.1:0", **options: Any) -> Listener:
        usual = {"secret": None, "insecure": "secret" not in options, "name": "answering", "serve": echo}
        made.append(Listener(bind, **{**usual, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()


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


# ------------------------------------------------------------------------------ as it should be
@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("bind", ["127.0.0.1:0", "[::1]:0", "localhost:0"])
def test_a_call_is_answered_over_tcp(listeners, bind, secret):
    if bind.startswith("[") and not has_ipv6():
        pytest.skip("this machine has no ::1")
    where = listeners(bind, secret=secret)
    assert asked(where, "describe", {"a": [1, None, "ü", 1.5]}, secret=secret) == {
        "purpose": "describe", "caller": "asking", "body": {"a": [1, None, "ü", 1.5]}, "local": False,
    }  # fmt: skip


@pytest.mark.parametrize("secret", [None, SECRET])
def test_processes_of_this_host_are_known_as_such_and_are_handed_file_descriptors(listeners, secret):
    fd = os.memfd_create("shared")
    n = 2 * handshake.FDS_A_MESSAGE + 7  # three messages
    where = listeners(serve=lambda r: Reply({"local": r.local}, fds=[fd] * n if r.local else ()), secret=secret)
    answer = ask("unix:" + where.unix, secret=secret)
    try:
        assert answer.body == {"local": True}
        assert len(answer.fds) == n
        os.write(answer.fds[-1], b"seen by both")
        assert os.pread(fd, 100, 0) == b"seen by both"
        assert not any(os.get_inheritable(each) for each in answer.fds)
    finally:
        answer.sock.close()
        for each in [fd, *answer.fds]:
            os.close(each)


@pytest.mark.parametrize("local", [False, True])
def test_the_connection_goes_on_as_something_else_from_the_first_byte_on(listeners, local):
    taken: list[socket.socket] = []

    def then(sock: socket.socket) -> None:
        sock.send(b"first of the server")
        taken.append(sock)

    fd = os.memfd_create("shared")
    where = listeners(serve=lambda request: Reply({}, fds=[fd] if request.local else (), then=then))
    answer = ask("unix:" + where.unix if local else where.address)
    answer.sock.sendall(b"first of the client")
    until(lambda: taken, "the hand-over")
    assert not taken[0].getblocking()
    taken[0].setblocking(True)
    assert _receive(taken[0], 19) == b"first of the client"
    assert answer.sock.getblocking()
    assert _receive(answer.sock, 19) == b"first of the server"
    where.close()  # which leaves it alone
    taken[0].sendall(b"still open")
    assert _receive(answer.sock, 10) == b"still open"
    for each in (*taken, answer.sock):
        each.close()
    for each in (fd, *answer.fds):
        os.close(each)


def _receive(sock: socket.socket, n: int) -> bytes:
    sock.settimeout(LIMIT)
    data = b""
    while len(data) < n:
        data += sock.recv(n - len(data))
    return data


def test_bytes_sent_together_with_the_call_belong_to_the_one_who_takes_over(listeners):
    taken: list[socket.socket] = []
    where = listeners(serve=lambda _: Reply({}, then=taken.append))
    with closing(Raw(where)) as raw:
        text = raw.call()
        raw.sock.sendall(handshake.HEADER.pack(handshake.MAGIC, len(text)) + text + b"data")
        raw.receive()
        until(lambda: taken, "the hand-over")
        taken[0].setblocking(True)
        assert _receive(taken[0], 4) == b"data"
        taken[0].close()


def test_both_sides_of_tcp_notice_a_host_that_vanished(listeners):
    taken: list[socket.socket] = []
    answer = ask(listeners(serve=lambda _: Reply({}, then=taken.append)))
    until(lambda: taken, "the hand-over")
    for sock in (answer.sock, taken[0]):
        for option, value in handshake.TCP_OPTIONS.items():
            assert bool(sock.getsockopt(*option)) == bool(value)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
        sock.close()


# ------------------------------------------------------------------------------ secrets
def test_different_secrets_are_refused_on_both_sides_without_saying_more(listeners, caplog):
    served: list[Request] = []
    where = listeners(secret=SECRET, serve=lambda request: (served.append(request), Reply({}))[1])
    with pytest.raises(DiscoveryError, match=r"127\.0\.0\.1:\d+ did not prove .* with the same one"):
        ask(where, secret=b"guessed")
    assert not served
    assert "('asking'): it did not prove that it knows the secret" in caplog.text
    assert "guessed" not in caplog.text
    assert asked(where, secret=SECRET) == {}


@pytest.mark.parametrize(
    ("here", "there"), [(None, {"secret": SECRET}), (SECRET, {"secret": None}), (SECRET, {"insecure": True})]
)
def test_a_secret_on_one_side_only_is_refused_saying_which(listeners, caplog, here, there):
    where = listeners(**there)
    who = "this engine has a secret and it has none" if here else "it has a secret and this engine has none"
    with pytest.raises(DiscoveryError, match=rf"{where.address}: {who}; start both with the same one"):
        ask(where, secret=here)
    until(lambda: "engine 'answering' lost 127.0.0.1" in caplog.text, "the warning over there")


def test_a_caller_that_ignores_the_hello_gets_nothing_without_the_secret(listeners):
    served: list[Request] = []
    where = listeners(secret=SECRET, serve=lambda request: (served.append(request), Reply({}))[1])
    for proof in ("", "0" * 64, "ü" * 10, " "):
        with closing(Raw(where)) as raw:
            raw.send(raw.call(proof=proof))
            answer = json.loads(raw.receive())
            assert "did not prove" in answer["error"]["message"]
            assert answer["proof"] == ""  # nothing that was made with the secret, and so nothing to guess it from
            assert raw.is_hung_up()
    assert not served


@pytest.mark.parametrize("change", [{"purpose": "other"}, {"caller": "other"}, {"generation": 8}, {"body": {"a": 1}}])
def test_a_proof_covers_all_that_is_said(listeners, change):
    where = listeners(secret=SECRET)
    with closing(Raw(where)) as raw:
        raw.send(raw.call(SECRET, **change))
        assert b"did not prove" in raw.receive()


def test_a_recorded_call_is_worth_nothing_later(listeners):
    where = listeners(secret=SECRET)
    with closing(Raw(where)) as raw:
        recorded = raw.call(SECRET)
        raw.send(recorded)
        assert b"body" in raw.receive()
    with closing(Raw(where)) as raw:
        raw.send(recorded)
        assert b"did not prove" in raw.receive()


def test_errors_are_proven_too(listeners):
    def serve(_: Request) -> Reply:
        raise UsageError("so")

    where = listeners(secret=SECRET, serve=serve)
    with pytest.raises(UsageError, match="so"):
        ask(where, secret=SECRET)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_client_tells_a_server_nothing_that_was_made_with_the_secret_itself(listeners, secret):
    """What it proves with is slow to compute from a guess, or 32 random bytes."""
    heard = []

    def answer(text: bytes) -> bytes:
        heard.append(json.loads(text))
        return b""

    hello = Hello("0" * 64, True, user=secret is None)
    with closing(Impostor(said(hello.message()), answer)) as impostor, suppress(TransportError):
        ask(impostor.address, secret=secret)
    (call,) = heard
    parts = Call(hello, call["nonce"], "echo", "asking", 7, {})
    assert call["proof"] == parts.message(key_of(SECRET) if secret else of_user())["proof"]
    assert call["proof"] != parts.message(SECRET)["proof"]


def test_without_a_secret_the_user_is_the_one_who_is_asked_for(listeners):
    where = listeners(secret=None)
    assert asked(where)["caller"] == "asking"
    assert asked("unix:" + where.unix)["caller"] == "asking"
    with closing(Raw(where)) as raw:
        assert raw.hello.secured
        assert raw.hello.user
        raw.send(raw.call())
        assert b"did not prove" in raw.receive()


def test_engines_without_a_secret_talk_to_those_that_answer_anybody(listeners):
    assert asked(listeners())["caller"] == "asking"


def test_engines_of_different_users_are_told_to_have_a_secret(listeners, monkeypatch):
    where = listeners(secret=None)
    monkeypatch.setattr(dialling, "of_user", lambda: b"of another user" + b" " * 17)
    with pytest.raises(DiscoveryError, match=r"another user's, or in another container; .*the same one, by secret="):
        ask(where)


def test_a_users_secret_that_was_removed_keeps_nobody_out(listeners, monkeypatch, tmp_path):
    where = listeners(secret=None)
    monkeypatch.setattr("mooncache.discovery.secret.PLACES", (str(tmp_path),))  # as if both had lost the file
    assert asked(where)["caller"] == "asking"


@pytest.mark.parametrize("secret", [b"", b"short", "text"])
def test_a_secret_that_is_none_is_refused(listeners, secret):
    with pytest.raises(UsageError, match="secret"):
        listeners(secret=secret)
    with pytest.raises(UsageError, match="secret"):
        ask("127.0.0.1:1", secret=secret)


# ------------------------------------------------------------------------------ what serve raises
@pytest.mark.parametrize("kind", [UsageError, CapacityError, TransportError, DiscoveryError, EngineClosed])
def test_errors_of_the_peer_keep_their_class_and_say_where_they_come_from(listeners, kind):
    def serve(request: Request) -> Reply:
        raise kind(f"nobody here does {request.purpose!r}")

    where = listeners(serve=serve)
    with pytest.raises(kind, match=rf"{where.address} answers: nobody here does 'x'") as raised:
        ask(where, "x")
    assert type(raised.value) is kind


def test_other_errors_of_ours_arrive_as_discovery_errors(listeners):
    def serve(_: Request) -> Reply:
        raise MooncacheError("of another kind")

    with pytest.raises(DiscoveryError, match="of another kind"):
        ask(listeners(serve=serve))


def test_a_bug_over_there_is_logged_there_and_not_told(listeners, caplog):
    def serve(_: Request) -> Reply:
        raise RuntimeError("inner secrets")

    where = listeners(serve=serve)
    with pytest.raises(DiscoveryError, match="internal error") as raised:
        ask(where)
    assert "inner secrets" not in str(raised.value)
    assert "RuntimeError: inner secrets" in caplog.text


@pytest.mark.parametrize("reply", [Reply({"a": object()}), Reply({}, fds=[0]), Reply({"a": float("nan")})])
def test_a_reply_that_cannot_be_sent_is_a_bug_over_there(listeners, reply):
    with pytest.raises(DiscoveryError, match="internal error"):
        ask(listeners(serve=lambda _: reply))


def test_what_is_too_long_is_not_sent(listeners):
    where = listeners(serve=lambda _: Reply({"a": "x" * handshake.ANSWER_BYTES}))
    with pytest.raises(CapacityError, match="too long"):
        ask(where)
    with pytest.raises(CapacityError, match="too long"):
        ask(where, "echo", {"a": "x" * handshake.CALL_BYTES})


def test_long_errors_are_cut(listeners):
    def serve(_: Request) -> Reply:
        raise UsageError("ü" * 100_000)

    with pytest.raises(UsageError, match=r"ü{1000}$"):
        ask(listeners(serve=serve))


def test_a_taker_over_that_fails_is_logged_and_the_connection_closed(listeners, caplog):
    def then(_: socket.socket) -> None:
        raise RuntimeError("not mine")

    with closing(ask(listeners(serve=lambda _: Reply({}, then=then))).sock) as sock:
        sock.settimeout(LIMIT)
        assert sock.recv(1) == b""
    until(lambda: "not mine" in caplog.text, "the log")


def fails(_: socket.socket) -> None:
    raise OSError("no room for it")


UNSENT = {
    "no JSON": Reply({"a": object()}),
    "too long": Reply({"a": "x" * (1 << 24)}),
    "descriptors for another host": Reply({}, fds=[0]),
    "nobody reads it": Reply({"a": "x" * (1 << 23)}),
    "nobody takes over": Reply({}, then=fails),
}


@pytest.mark.parametrize("why", UNSENT)
def test_what_was_made_for_a_caller_is_given_back_once_when_the_answer_does_not_reach_it(listeners, monkeypatch, why):
    monkeypatch.setattr(handshake, "ANSWER_BYTES", 1 << 24)
    undone: list[str] = []
    where = listeners(limit_s=0.5, serve=lambda _: replace(UNSENT[why], undo=lambda: undone.append(why)))
    with closing(Raw(where)) as raw:
        raw.send(raw.call())
        until(lambda: undone, "what gives it back")
    until(lambda: not where._handshakes, "the end of the handshake")
    assert undone == [why]


@pytest.mark.parametrize("then", [None, socket.socket.close])
def test_what_was_made_for_a_caller_stays_when_the_answer_reached_it(listeners, then):
    undone: list[int] = []
    where = listeners(serve=lambda _: Reply({}, then=then, undo=lambda: undone.append(1)))
    asked(where)
    until(lambda: not where._handshakes, "the end of the handshake")
    assert undone == []


@pytest.fixture
def one_descriptor() -> Iterator[Callable[[], None]]:
    """Leaves one file descriptor to this process; all of them again after the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []

    def leave_one() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, hard))
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        os.close(held.pop())

    yield leave_one
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for descriptor in held:
        os.close(descriptor)


def test_a_listener_that_has_no_descriptor_left_tells_one_caller_after_the_other(listeners, one_descriptor, caplog):
    where = listeners()
    one_descriptor()
    for _ in range(3):
        with pytest.raises(CapacityError, match=rf"{where.address} answers: .*all \d+ file descriptors .*ulimit -n"):
            ask(where)
    assert ["no connections" in trouble for trouble in where.background.trouble] == [True]
    assert len(caplog.records) == 1  # said once, not for each
    resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1:] * 2)
    assert asked(where)["caller"] == "asking"
    assert where.background.trouble == ()


def test_who_has_no_descriptor_left_to_ask_with_is_told_so(listeners, one_descriptor):
    where = listeners()
    one_descriptor()
    with open(os.devnull), pytest.raises(CapacityError, match=rf"no handshake with {where.address}: all \d+ file"):
        ask(where)


def test_a_service_that_finds_no_descriptor_is_told_to_the_caller(listeners):
    def serve(_: Request) -> Reply:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(CapacityError, match=r"cannot answer 'echo': all \d+ file descriptors"):
        ask(listeners(serve=serve))


# ------------------------------------------------------------------------------ callers that misbehave
BAD = {
    "another magic": lambda raw: raw.send(raw.call(), magic=b"HTTP"),
    "a web browser": lambda raw: raw.sock.sendall(b"GET / HTTP/1.1\r\nHost: engine\r\n\r\n"),
    "too long": lambda raw: raw.send(b"", length=handshake.CALL_BYTES + 1),
    "much too long": lambda raw: raw.send(b"", length=2**32 - 1),
    "no JSON": lambda raw: raw.send(b"{'a': 1}"),
    "nothing": lambda raw: raw.send(b""),
    "deeply nested": lambda raw: raw.send(b"[" * handshake.CALL_BYTES),
    "a long number": lambda raw: raw.send(raw.call(generation=None).replace(b"null", b"9" * 8000)),
    "not a number": lambda raw: raw.send(raw.call(generation=None).replace(b"null", b"NaN")),
    "beyond all numbers": lambda raw: raw.send(raw.call(body={"x": 0.5}).replace(b"0.5", b"1e999")),
    "below all numbers": lambda raw: raw.send(raw.call(body={"x": [0.5]}).replace(b"0.5", b"-1E+999")),
    "an array": lambda raw: raw.send(b"[1]"),
    "a field missing": lambda raw: raw.send(b'{"version":1}'),
    "a field more": lambda raw: raw.send(raw.call(more=1)),
    "another type": lambda raw: raw.send(raw.call(body=[])),
    "a boolean for a number": lambda raw: raw.send(raw.call(generation=True)),
    "no generation": lambda raw: raw.send(raw.call(generation=0)),
    "control characters": lambda raw: raw.send(raw.call(caller="a\nb")),
    "half a character": lambda raw: raw.send(raw.call(purpose="\ud800")),
    "another version": lambda raw: raw.send(raw.call(version=7)),
    "half a header": lambda raw: (raw.sock.sendall(b"MOO"), raw.sock.shutdown(socket.SHUT_WR)),
    "half a call": lambda raw: (raw.send(b"{", length=100), raw.sock.shutdown(socket.SHUT_WR)),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_caller_that_misbehaves_is_hung_up_on_with_one_logged_line(listeners, caplog, bad):
    where = listeners()
    with closing(Raw(where)) as raw:
        BAD[bad](raw)
        assert raw.is_hung_up()
    until(lambda: caplog.records, "the line")
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("engine 'answering' ")
    assert "127.0.0.1:" in line
    assert len(line) < 600
    assert asked(where)["caller"] == "asking"


def test_a_caller_of_another_version_is_logged_with_both(listeners, caplog):
    with closing(Raw(listeners())) as raw:
        raw.send(raw.call(version=7))
        assert raw.is_hung_up()
    assert "peer speaks version 7, this engine 1: use the same release on both ends" in caplog.text


@pytest.mark.parametrize("sent", [b"", b"MOON", b"MOON\0\0\0\x10{"])
def test_a_caller_that_takes_too_long_is_hung_up_on(listeners, caplog, sent):
    where = listeners(limit_s=0.05)
    with closing(Raw(where)) as raw:
        raw.sock.sendall(sent)
        assert raw.is_hung_up()
    assert "no handshake within 0.05 s" in caplog.text


def test_a_caller_that_reads_nothing_is_hung_up_on(listeners, caplog, monkeypatch):
    monkeypatch.setattr(handshake, "ANSWER_BYTES", 1 << 24)  # more than the system holds for a reader
    where = listeners(limit_s=0.2, serve=lambda _: Reply({"a": "x" * (1 << 23)}))
    with closing(Raw(where)) as raw:
        raw.send(raw.call())
        until(lambda: "no handshake within" in caplog.text, "the end of patience")


def test_file_descriptors_wait_for_a_slow_reader(listeners, monkeypatch):
    send_fds, full = socket.send_fds, [BlockingIOError(), BlockingIOError()]

    def sometimes_full(*arguments: Any) -> Any:
        if full:
            raise full.pop()
        return send_fds(*arguments)

    monkeypatch.setattr(socket, "send_fds", sometimes_full)
    fd = os.memfd_create("shared")
    answer = ask("unix:" + listeners(serve=lambda _: Reply({}, fds=[fd])).unix)
    assert not full
    assert len(answer.fds) == 1
    answer.sock.close()
    for each in [fd, *answer.fds]:
        os.close(each)


def test_when_all_places_are_taken_the_oldest_has_to_go_and_a_new_caller_is_answered(listeners, caplog, monkeypatch):
    monkeypatch.setattr(listener, "CROWD_S", LIMIT)
    where = listeners(limit_s=LIMIT)
    slow = [Raw(where) for _ in range(visitors.VISITORS + 10)]
    assert asked(where)
    assert [raw.is_hung_up() for raw in slow[:11]] == [True] * 11
    assert len(where._visitors) == visitors.VISITORS - 1
    assert asked("unix:" + where.unix)
    said = [line for line in caplog.messages if "too many are at the door, and it was the oldest" in line]
    assert len(said) == 1  # the rest is counted
    for raw in slow:
        raw.close()
    until(lambda: not where._handshakes, "room again")
    assert not len(where._visitors)
    where.close()
    assert re.search(r"\d+ more lines .* because of 127.0.0.1 were not written", caplog.text)


@pytest.mark.usefixtures("descriptors")
def test_callers_get_in_through_a_crowd_that_comes_anew_as_often_as_it_is_hung_up_on(listeners):
    where = listeners(secret=SECRET)
    host, _, port = where.address.rpartition(":")
    stop = threading.Event()

    def crowd() -> None:
        with ExitStack() as undo:
            held = deque[socket.socket]()
            while not stop.is_set():
                if len(held) > 300:
                    held.popleft().close()
                with suppress(OSError):
                    held.append(undo.enter_context(socket.create_connection((host, int(port)), timeout=1)))
                    held[-1].sendall(b"MOON")

    tasks = [Task(crowd) for _ in range(2)]
    until(lambda: len(where._visitors) >= visitors.VISITORS, "a crowd")

    def gets_in() -> bool:
        """On a busy machine a caller may be the oldest at the door before it has had its turn to speak."""
        with suppress(TransportError):
            return bool(asked(where, secret=SECRET, deadline=Deadline(LIMIT)))
        return False

    try:
        for _ in range(20):
            until(gets_in, "an answer")
    finally:
        stop.set()
        for task in tasks:
            task.result()


def test_in_a_crowd_there_is_less_patience(listeners, caplog):
    where = listeners(limit_s=LIMIT)
    early = [Raw(where) for _ in range(visitors.CROWD)]
    with closing(Raw(where)) as late:
        assert late.is_hung_up()
    assert f"no handshake within {visitors.CROWD_S} s" in caplog.text
    until(lambda: len(where._visitors) == len(early), "the others, as they were")
    for raw in early:
        raw.close()


def test_a_source_that_misbehaves_again_and_again_fills_no_log(listeners, caplog):
    where = listeners()
    for _ in range(200):
        with closing(Raw(where)) as raw:
            raw.send(b"?")
            assert raw.is_hung_up()
    where.close()
    assert len(caplog.messages) < 10
    assert sum("more lines" in line for line in caplog.messages) == 1


def test_a_peer_that_makes_it_fail_again_and_again_fills_no_log(listeners, caplog):
    def serve(_: Request) -> Reply:
        raise RuntimeError("of some length, with all its lines")

    where = listeners(serve=serve)
    for _ in range(50):
        with pytest.raises(DiscoveryError, match="internal error"):
            ask(where)
    assert caplog.text.count("Traceback") == 1
    where.close()
    assert "49 more lines of the kind 'engine %r could not answer" in caplog.text


def test_a_caller_has_only_so_many_calls_answered_at_once(listeners, monkeypatch):
    monkeypatch.setattr(listener, "CALLS", 2)
    monkeypatch.setattr(handshake, "ANSWER_BYTES", 1 << 24)  # more than the system holds for a reader
    where = listeners(limit_s=LIMIT, serve=lambda r: Reply({"a": "x" * (1 << 23) if r.purpose == "long" else ""}))
    slow = [Raw(where) for _ in range(2)]
    for raw in slow:
        raw.send(raw.call(purpose="long"))
    until(lambda: where._answering["asking"] == 2, "two that read nothing")
    with pytest.raises(CapacityError, match="2 calls of 'asking' are being answered, as many as may be"):
        ask(where)
    assert asked(where, caller="another")
    for raw in slow:
        raw.close()
    until(lambda: not where._answering, "the end of both")
    assert asked(where)


@pytest.mark.fuzz
def test_no_bytes_whatever_disturb_the_listener(listeners):
    where = listeners(limit_s=LIMIT)
    logging.getLogger("mooncache").setLevel(logging.ERROR)

    anything = st.binary(max_size=300)
    texts = anything | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    ).map(lambda value: json.dumps(value).encode())
    fields = st.sampled_from(["version", "nonce", "purpose", "caller", "generation", "body", "proof"])

    @given(st.data())
    def disturb(data: st.DataObject) -> None:
        with closing(Raw(where)) as raw:
            how = data.draw(st.sampled_from(["bytes", "text", "field"]))
            if how == "bytes":
                raw.sock.sendall(data.draw(anything))
            elif how == "text":
                raw.send(data.draw(texts))
            else:
                raw.send(raw.call(**{data.draw(fields): json.loads(data.draw(texts.filter(_is_json)))}))
            with suppress(OSError):  # it hung up before it had read everything
                raw.sock.shutdown(socket.SHUT_WR)
                while raw.sock.recv(1 << 16):
                    pass

    try:
        disturb()
        assert asked(where)["caller"] == "asking"
    finally:
        logging.getLogger("mooncache").setLevel(logging.NOTSET)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# ------------------------------------------------------------------------------ listeners that misbehave
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
                header = _receive(sock, 8)
                text = _receive(sock, handshake.text_bytes(header, handshake.CALL_BYTES, "the caller"))
                sock.sendall(self._answer(text))

    def close(self) -> None:
        self._task.result()
        self._sock.close()


HELLO = Hello("0" * 64, False)


def said(value: Any, limit: int = 1 << 20) -> bytes:
    return frame(value, limit)


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (said({**HELLO.message(), "version": 7}), "speaks version 7, this engine 1: use the same release on both ends"),
        (said({"version": 0}), "speaks version 0"),
        (said({"version": 1}), "expected an object of version, nonce, secured"),
        (said({**HELLO.message(), "secured": 1}), "expected secured to be bool"),
        (said({"nonce": "x" * 2000}), "at most 1024 bytes"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no handshake of Mooncache"),
        (handshake.HEADER.pack(b"MOON", 3) + b"???", "expected JSON"),
    ],
)  # fmt: skip
def test_what_is_no_engine_is_said_to_be_none(hello, message):
    with closing(Impostor(hello)) as impostor, pytest.raises(DiscoveryError, match=message) as raised:
        ask(impostor.address)
    assert impostor.address in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"body": {}, "fds": 0}, "expected an object of body, fds, proof"),
        ({"body": [], "fds": 0, "proof": ""}, "expected body to be dict"),
        ({"body": {}, "fds": -1, "proof": ""}, "expected fds to be 0"),
        ({"error": "no", "proof": ""}, "expected an object of kind, message"),
        ({"error": {"kind": "\n", "message": ""}, "proof": ""}, "expected kind to be"),
        ({"body": {}, "fds": 0, "proof": 0}, "expected proof to be str"),
        ([], "expected an object"),
    ],
)
def test_an_answer_that_is_none_is_refused(answer, message):
    impostor = Impostor(said(HELLO.message()), lambda _: said(answer))
    with closing(impostor), pytest.raises(DiscoveryError, match=message):
        ask(impostor.address)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "9" * 5000])
def test_an_answer_of_numbers_that_are_none_is_refused(number):
    text = b'{"body":{"x":%s},"fds":0,"proof":""}' % number.encode()
    impostor = Impostor(said(HELLO.message()), lambda _: handshake.HEADER.pack(b"MOON", len(text)) + text)
    with closing(impostor), pytest.raises(DiscoveryError, match="expected JSON"):
        ask(impostor.address)


def test_an_answer_without_the_secret_is_refused():
    """It claims to have the secret, and lets everybody in."""
    hello = Hello("0" * 64, True)

    def answer(text: bytes) -> bytes:
        call, _ = Call.read(text, hello, None, "the caller")
        return said(call.answer(Answered({}, 0), b"guessed"))

    with (
        closing(Impostor(said(hello.message()), answer)) as impostor,
        pytest.raises(DiscoveryError, match=f"{impostor.address} did not prove"),
    ):
        ask(impostor.address, secret=SECRET)


def test_file_descriptors_that_do_not_come_are_missed():
    impostor = Impostor(said(HELLO.message()), lambda _: said({"body": {}, "fds": 3, "proof": ""}) + b"F")
    with closing(impostor), pytest.raises(TransportError, match="sent 0 of 3 file descriptors"):
        ask(impostor.address)


def test_a_peer_that_hangs_up_is_said_to_have():
    with closing(Impostor(b"MOON")) as impostor, pytest.raises(TransportError, match=f"{impostor.address}.*hung up"):
        ask(impostor.address)


# ------------------------------------------------------------------------------ nobody there
def test_nobody_there(listeners):
    where = listeners()
    where.close()
    with pytest.raises(TransportError, match=rf"{where.address} refused the connection"):
        ask(where)
    with pytest.raises(TransportError, match=rf"unix:{where.unix} refused the connection"):
        ask("unix:" + where.unix)
    with pytest.raises(DiscoveryError, match=r"host 'nobody\.invalid' of nobody\.invalid:1 is unknown"):
        ask("nobody.invalid:1")
    with pytest.raises(UsageError, match="expected an address"):
        ask("nobody")


def test_a_peer_that_never_answers_costs_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TransportError, match=rf"no answer from {address} within 0.05 s"):
            ask(address, deadline=Deadline(0.05))
        with pytest.raises(TransportError, match="within 0 s"):
            ask(address, deadline=Deadline(0))


# ------------------------------------------------------------------------------ opening and closing
@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0"])
def test_without_a_secret_other_hosts_are_not_let_in_by_accident(listeners, bind):
    with pytest.raises(UsageError, match=r"set a secret, bind to 127\.0\.0\.1, or say insecure=True"):
        listeners(bind, secret=None)


def test_a_wildcard_is_advertised_as_this_machine_or_what_it_is_told(listeners):
    assert listeners("0.0.0.0:0", insecure=True).address.startswith(socket.gethostname() + ":")
    where = listeners("0.0.0.0:0", secret=SECRET, advertise="localhost")
    assert where.address.startswith("localhost:")
    assert asked(where, secret=SECRET)


@pytest.mark.parametrize(
    ("advertise", "told"),
    [("prefill-3", "prefill-3:{}"), ("10.0.0.3:7000", "10.0.0.3:7000"), ("fd00::3", "[fd00::3]:{}"),
     ("[fd00::3]", "[fd00::3]:{}"), ("[fd00::3]:7000", "[fd00::3]:7000")],
)  # fmt: skip
def test_a_host_or_a_host_and_port_can_be_advertised(listeners, advertise, told):
    where = listeners("127.0.0.1:0", advertise=advertise)
    assert where.address == told.format(where.near.rpartition(":")[2])
    assert asked(where.near)


@pytest.mark.parametrize(
    "advertise", ["", "not a host", "a:b", "a:99999", "a:0", "0.0.0.0", "[::]:7000", "[fd00::3", "http://a:1", 5, b"a"]
)
def test_what_nobody_could_dial_is_not_advertised(listeners, advertise):
    with pytest.raises(UsageError, match="expected advertise"):
        listeners(advertise=advertise)


def test_a_port_in_use_is_said_to_be(listeners):
    with pytest.raises(
        TransportError, match=r"cannot listen at 127\.0\.0\.1:\d+: Address already in use; another port"
    ):
        listeners(listeners().address)


def test_a_host_that_is_unknown_or_not_here_cannot_be_bound_to(listeners):
    with pytest.raises(TransportError, match=r"nobody\.invalid:1: unknown host"):
        listeners("nobody.invalid:1")
    with pytest.raises(TransportError, match=r"203\.0\.113\.1:0: Cannot assign"):
        listeners("203.0.113.1:0", insecure=True)
    with pytest.raises(UsageError, match="expected an address"):
        listeners("nobody")


def test_closing_ends_handshakes_and_the_thread_and_may_be_repeated(listeners):
    where = listeners()
    slow = [Raw(where) for _ in range(5)]
    where.close()
    where.close()
    for raw in slow:
        assert raw.is_hung_up()
        raw.close()
    assert not any(thread.is_alive() for thread in where.background._threads)
    assert "closed" in repr(where)


def test_many_handshakes_leave_nothing_behind(listeners):
    fd = os.memfd_create("shared")
    where = listeners(serve=lambda request: Reply({}, fds=[fd] if request.local else ()))
    threads = threading.active_count() + SERVING  # which are made when they are first needed
    open_files = len(os.listdir("/proc/self/fd"))
    for i in range(200):
        answer = ask("unix:" + where.unix if i % 2 else where)
        answer.sock.close()
        for each in answer.fds:
            os.close(each)
        if i % 10 == 0:
            with closing(Raw(where)) as raw:
                raw.send(b"?")
                assert raw.is_hung_up()
    until(lambda: len(os.listdir("/proc/self/fd")) == open_files, "all closed")
    assert threading.active_count() <= threads
    os.close(fd)
