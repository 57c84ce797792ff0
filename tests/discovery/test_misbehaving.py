"""Callers and listeners that misbehave in a handshake: each is told from the others, and none is waited for."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
from collections import deque
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.deadline import Deadline
from mooncache.discovery import handshake, listener, visitors
from mooncache.discovery.handshake import Answered, Call, Hello
from mooncache.discovery.messages import Reply, Request
from mooncache.errors import (
    CapacityError,
    DiscoveryError,
    TransportError,
)
from tests.discovery.handshakes import HELLO, SECRET, Impostor, Raw, ask, asked, said
from tests.helpers import LIMIT, Task, until

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
