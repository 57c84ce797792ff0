from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.discovery.address import is_loopback, join_address, parse_address
from mooncache.errors import UsageError


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("prefill-3.cluster_a.local:65535", "prefill-3.cluster_a.local", 65535),
        ("[::1]:7000", "::1", 7000),
        ("[fe80::1%eth0]:7000", "fe80::1%eth0", 7000),
        ("[::FFFF:a00:1]:7000", "::ffff:10.0.0.1", 7000),
        ("[::ffff:10.0.0.1]:7000", "::ffff:10.0.0.1", 7000),
    ],
)
def test_addresses_are_parsed_and_joined_again(address, host, port):
    assert parse_address(address) == (host, port)
    assert parse_address(join_address(*parse_address(address))) == parse_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "", ":", "host", "host:", ":7000", "host:port", "host:-1", "host:65536", "host:7000 ", " host:7000",
        "host:7000\n", "::1:7000", "[::1]", "[::1]7000", "[host]:7000", "[]:7000", "[::g]:1",
        "a b:1", "höst:1", "host:٣", "x" * 254 + ":1", "user@host:1", "host/path:1", "tcp://host:1",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_it_and_an_example(address):
    with pytest.raises(UsageError, match="expected"):
        parse_address(address)


@pytest.mark.parametrize(
    ("host", "within"),
    [
        ("127.0.0.1", True), ("127.8.9.10", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False),
        ("0.0.0.0", False), ("::", False), ("fe80::1%lo", False), ("::ffff:10.0.0.1", False),
    ],
)  # fmt: skip
def test_what_leads_to_this_host_alone(host, within):
    assert is_loopback(host) is within


@given(st.text(max_size=40))
def test_nothing_but_usage_errors(address):
    try:
        host, port = parse_address(address)
    except UsageError:
        return
    assert join_address(host, port)
