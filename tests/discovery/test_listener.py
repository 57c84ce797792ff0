"""A listener: where it can be opened, what it advertises, and what its end leaves behind."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import closing

import pytest

from mooncache.deadline import Deadline
from mooncache.discovery.listener import SERVING
from mooncache.discovery.messages import Reply
from mooncache.errors import (
    DiscoveryError,
    TransportError,
    UsageError,
)
from tests.discovery.handshakes import SECRET, Raw, ask, asked
from tests.helpers import until


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
