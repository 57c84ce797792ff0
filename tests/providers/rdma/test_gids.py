"""A GID is its 16 bytes, whatever its text looks like."""

import ipaddress
import json

import pytest

from mooncache.descriptor import Descriptor
from mooncache.providers.rdma import gids
from mooncache.providers.rdma.paths import VERSION, End, ends_of

IPV4 = bytes(10) + b"\xff\xff" + bytes([10, 0, 1, 5])
LOCAL = bytes.fromhex("fe80000000000000505400fffe000001")


@pytest.mark.parametrize(
    ("gid", "texts"),
    [
        (
            IPV4,
            [
                "0000:0000:0000:0000:0000:ffff:0a00:0105",
                "0000:0000:0000:0000:0000:ffff:10.0.1.5",
                "::ffff:10.0.1.5",
                "::FFFF:a00:105",
            ],
        ),
        (LOCAL, ["fe80:0000:0000:0000:5054:00ff:fe00:0001", "fe80::5054:ff:fe00:1"]),
    ],
)
def test_all_texts_of_a_gid_mean_the_same_and_one_is_written(gid, texts):
    assert {gids.parse(text) for text in texts} == {gid}
    assert gids.text_of(gid) == texts[0]
    assert gids.parse(ipaddress.IPv6Address(gid).exploded) == gid  # as this Python prints it


@pytest.mark.parametrize("text", ["", "10.0.1.5", "fe80::1::2", "fe80", "0a000105", "5", "None"])
def test_what_is_no_gid_is_refused(text):
    with pytest.raises(ipaddress.AddressValueError):
        gids.parse(text)


def test_what_a_gid_is():
    assert (gids.is_ipv4(IPV4), gids.is_link_local(IPV4), gids.address_of(IPV4)) == (True, False, "10.0.1.5")
    assert (gids.is_ipv4(LOCAL), gids.is_link_local(LOCAL)) == (False, True)
    assert gids.address_of(LOCAL) == "fe80::5054:ff:fe00:1"


@pytest.mark.parametrize("text", ["0000:0000:0000:0000:0000:ffff:0a00:0105", "0000:0000:0000:0000:0000:ffff:10.0.1.5"])
def test_a_peer_may_write_its_gid_in_either_form(text):
    end = End(IPV4, 0, 1024, 16, 100.0)
    told = json.loads(json.dumps(end.told()))
    assert told[0] == "0000:0000:0000:0000:0000:ffff:0a00:0105"
    data = {"rdma": VERSION, "instance": 1, "nics": [[text, *told[1:]]]}
    assert ends_of(Descriptor("peer", 1, "", "rdma", (), data)) == [end]
