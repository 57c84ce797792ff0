"""Both sides of the handshake over real sockets: secrets, errors, opening and closing."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace

import pytest

from mooncache.discovery import dial as dialling
from mooncache.discovery import handshake
from mooncache.discovery.handshake import Call, Hello
from mooncache.discovery.messages import Reply, Request
from mooncache.discovery.secret import key_of, of_user
from mooncache.errors import (
    CapacityError,
    DiscoveryError,
    EngineClosed,
    MooncacheError,
    TransportError,
    UsageError,
)
from tests.discovery.handshakes import SECRET, Impostor, Raw, ask, asked, receive, said
from tests.helpers import LIMIT, until
from tests.servers import has_ipv6


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
    assert receive(taken[0], 19) == b"first of the client"
    assert answer.sock.getblocking()
    assert receive(answer.sock, 19) == b"first of the server"
    where.close()  # which leaves it alone
    taken[0].sendall(b"still open")
    assert receive(answer.sock, 10) == b"still open"
    for each in (*taken, answer.sock):
        each.close()
    for each in (fd, *answer.fds):
        os.close(each)


def test_bytes_sent_together_with_the_call_belong_to_the_one_who_takes_over(listeners):
    taken: list[socket.socket] = []
    where = listeners(serve=lambda _: Reply({}, then=taken.append))
    with closing(Raw(where)) as raw:
        text = raw.call()
        raw.sock.sendall(handshake.HEADER.pack(handshake.MAGIC, len(text)) + text + b"data")
        raw.receive()
        until(lambda: taken, "the hand-over")
        taken[0].setblocking(True)
        assert receive(taken[0], 4) == b"data"
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
