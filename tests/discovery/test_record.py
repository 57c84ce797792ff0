from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.descriptor import Descriptor, RemoteRegion
from mooncache.discovery.fields import WORD
from mooncache.discovery.record import RECORD_BYTES, decode, encode
from mooncache.errors import CapacityError, DiscoveryError, UsageError
from mooncache.limits import NICS, REGIONS_MOST

OWN = Descriptor(
    "decode-3", 0x1234, "[::1]:7000", "tcp",
    (RemoteRegion(4096, 8192, (77,), 3), RemoteRegion(0, 1, (0, 5), 1)), {"lanes": [1, 2]},
)  # fmt: skip
LARGEST = replace(
    OWN,
    name="\U0001f600" * 255,
    address="x" * 253 + ":65535",
    generation=WORD - 1,
    provider="\U0001f600" * 255,
    regions=(RemoteRegion(WORD // 2, WORD // 2 - 1, (WORD - 1,) * NICS, 3),) * REGIONS_MOST,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=255)
regions = st.tuples(
    st.integers(0, WORD - 2),
    st.integers(0, WORD - 1),
    st.lists(st.integers(0, WORD - 1), max_size=NICS).map(tuple),
    st.integers(1, 3),
).map(lambda r: RemoteRegion(r[0], max(1, min(r[1], WORD - 1 - r[0])), *r[2:]))


@given(names, st.integers(1, WORD - 1), names, st.lists(regions, max_size=5), json_values)
def test_records_come_back_as_they_were(name, generation, provider, regions, data):
    own = Descriptor(name, generation, "", provider, tuple(regions), data)
    assert decode(encode(own), "here") == own


def test_a_record_without_keys_has_none():
    assert decode(encode(OWN, keys=False), "here").regions == (
        RemoteRegion(4096, 8192, (), 3),
        RemoteRegion(0, 1, (), 1),
    )


def test_the_largest_of_everything_fits_with_the_data_that_providers_may_have():
    assert decode(encode(replace(LARGEST, data="x" * (64 << 10))), "here").name == LARGEST.name


def test_a_record_that_is_too_large_is_not_made():
    with pytest.raises(CapacityError, match=rf"limit {RECORD_BYTES}"):
        encode(replace(OWN, data="x" * RECORD_BYTES))


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb", "a\0", "\ud800"])
def test_a_name_that_nobody_would_read_is_not_written(name):
    with pytest.raises(UsageError, match="printable"):
        encode(replace(OWN, name=name))


def changed(*path: Any, to: Any) -> bytes:
    """OWN's record with one field changed."""
    record = value = json.loads(encode(OWN))
    for key in path[:-1]:
        value = value[key]
    if to is ...:
        del value[path[-1]]
    else:
        value[path[-1]] = to
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    "record",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"NaN", b"9" * 5000, b"[" * RECORD_BYTES, b" " * (RECORD_BYTES + 1),
        b"\x80\x04\x95", "{\"versiön\":1}".encode(),
        changed("version", to="1"), changed("version", to=True), changed("version", to=...),
        changed("name", to=...), changed("name", to=3), changed("name", to=""), changed("name", to="x" * 256),
        changed("name", to="a\x1b[2J"), changed("more", to=1),
        changed("generation", to=0), changed("generation", to=WORD), changed("generation", to=1.0),
        changed("generation", to=True), changed("generation", to="5"),
        changed("address", to="host"), changed("address", to=None), changed("provider", to=None),
        changed("regions", to={}), changed("regions", to=[[0, 1, 2, 3]]),
        changed("regions", to=[{}] * (REGIONS_MOST + 1)),
        changed("regions", 0, "address", to=-1), changed("regions", 0, "address", to=WORD - 8192),
        changed("regions", 0, "length", to=0), changed("regions", 0, "length", to=-8192),
        changed("regions", 0, "rkeys", to=[-1]), changed("regions", 0, "rkeys", to=[WORD]),
        changed("regions", 0, "rkeys", to=5),
        changed("regions", 0, "rkeys", to=[1] * (NICS + 1)), changed("regions", 0, "rkeys", to=["1"]),
        changed("regions", 0, "access", to=0), changed("regions", 0, "access", to=4),
        changed("regions", 1, "access", to=...), changed("data", to=...),
    ],
)  # fmt: skip
def test_anything_else_is_refused_naming_the_source_in_a_short_message(record):
    with pytest.raises(DiscoveryError, match=r"^the store: ") as refused:
        decode(record, "the store")
    assert len(str(refused.value)) < 500


def test_another_version_is_refused_naming_both():
    with pytest.raises(DiscoveryError, match="peer speaks version 7, this engine 1: use the same release on both ends"):
        decode(changed("version", to=7), "the store")


@pytest.mark.fuzz
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_nothing_but_discovery_errors_from_any_bytes(record):
    with pytest.raises(DiscoveryError):
        decode(record, "the store")


@pytest.mark.fuzz
@given(st.data())
def test_nothing_but_discovery_errors_from_a_record_with_anything_in_it(data):
    path = data.draw(
        st.sampled_from([("name",), ("generation",), ("address",), ("provider",), ("regions",), ("regions", 0)])
        | st.sampled_from(RemoteRegion._fields).map(lambda key: ("regions", 0, key))
    )
    record = changed(*path, to=data.draw(json_values))
    try:
        described = decode(record, "the store")
    except DiscoveryError:
        return
    assert decode(encode(described), "here") == described  # so what was let in is in range
