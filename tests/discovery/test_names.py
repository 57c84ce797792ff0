"""The contract of a store of names, over both, with real servers."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from mooncache.descriptor import Descriptor, RemoteRegion
from mooncache.discovery.base import Names
from mooncache.discovery.record import encode
from mooncache.discovery.stores import open_names
from mooncache.errors import DiscoveryError, UsageError
from tests.helpers import run_python, until
from tests.servers import Server

LEASE = 1.0  # seconds: etcd has no shorter ones
LONG = 600.0  # for tests in which nothing may be refreshed or expire meanwhile
_generations = itertools.count(2**62 + 1)


@pytest.fixture
def stores(server: Server) -> Iterator[Callable[..., Names]]:
    """Opens the store as one engine after the other would, and closes all."""
    opened: list[Names] = []

    def open_one(lease: float = LEASE, timeout: float = 5.0) -> Names:
        opened.append(open_names(server.url, lease=lease, timeout=timeout))
        return opened[-1]

    yield open_one
    for names in opened:
        names.close()


def described(name: str, **changes: Any) -> Descriptor:
    region = RemoteRegion(1 << 40, 1 << 20, (0x1234567,), 3)
    return replace(
        Descriptor(name, next(_generations), "127.0.0.1:7000", "tcp", (region,), {"lanes": 4}), **changes
    )  # fmt: skip


class Seen:
    """What a watcher was told."""

    def __init__(self, names: Names) -> None:
        self.events: list[tuple[str, int | None]] = []
        names.watch(lambda name, generation: self.events.append((name, generation)))

    def of(self, name: str) -> list[int | None]:
        return [generation for who, generation in self.events if who == name]


def known(names: Names, name: str) -> bool:
    return name in names._generations()


def test_what_was_announced_is_found_by_others_without_keys(stores):
    own = described("prefill-α/*?[0]")
    stores().announce(lambda: own)
    found = stores().look_up(own.name)
    assert found == replace(own, regions=(own.regions[0]._replace(rkeys=()),))


def test_keys_never_reach_the_store(stores, monkeypatch):
    names = stores()
    written: list[bytes] = []
    publish = names._publish
    monkeypatch.setattr(names, "_publish", lambda *a, **o: (written.append(a[2]), publish(*a, **o))[1])
    names.announce(lambda: described("keyless"))
    assert written
    assert all(str(0x1234567).encode() not in record for record in written)


def test_a_name_that_is_not_there_is_refused_with_similar_ones(stores):
    stores().announce(lambda: described("decode-17"))
    with pytest.raises(DiscoveryError, match=r"no engine named 'decode-71' at \w+://127.*decode-17"):
        stores().look_up("decode-71")


def test_a_record_that_is_none_of_ours_is_refused_naming_the_store(stores):
    names = stores()
    names._publish("strange", 5, b"\x80\x04pickle", take=True)
    with pytest.raises(DiscoveryError, match="the record of 'strange' at"):
        names.look_up("strange")
    other = described("another")
    names._publish("strange", 5, encode(other), take=True)
    with pytest.raises(DiscoveryError, match="expected its own name"):
        names.look_up("strange")
    names._remove("strange", 5)


def test_withdrawn_names_are_gone_and_can_be_announced_again(stores):
    names, other = stores(), stores()
    own = described("comes-and-goes")
    for _ in range(2):
        names.announce(lambda: own)
        assert known(other, own.name)
        with pytest.raises(UsageError, match="announced"):
            names.announce(lambda: own)
        names.withdraw()
        names.withdraw()
        assert not known(other, own.name)


def test_closing_withdraws_ends_the_threads_and_may_be_repeated(stores):
    names, other = stores(), stores()
    names.announce(lambda: described("closes"))
    names.watch(lambda *_: None)
    threads = list(names._threads.values())
    assert all(thread.is_alive() for thread in threads)
    names.close()
    names.close()
    assert not any(thread.is_alive() for thread in threads)
    assert not known(other, "closes")


def test_a_change_is_published_soon_and_many_become_few(stores):
    names, other = stores(LONG), stores()
    current = [described("changes")]
    calls = []
    names.announce(lambda: (calls.append(1), current[0])[1])
    current[0] = replace(current[0], regions=(), data={"lanes": 8})
    for _ in range(1000):
        names.changed()
    until(lambda: other.look_up("changes").data == {"lanes": 8}, "the change")
    assert other.look_up("changes").regions == ()
    assert len(calls) < 500


def test_records_live_as_long_as_they_are_refreshed(stores):
    names, other = stores(), stores()
    own = described("kept-alive")
    names.announce(lambda: own)
    refreshed = []
    refresh = names._refresh
    names._refresh = lambda *a: (refreshed.append(refresh(*a)), refreshed[-1])[1]  # type: ignore[method-assign]
    until(lambda: len(refreshed) >= 5, "five refreshes, more than a lease")
    assert set(refreshed) == {own.generation}
    assert known(other, own.name)


def test_the_record_of_a_vanished_engine_goes_with_its_lease_and_watchers_hear(stores):
    seen = Seen(stores())
    vanished = stores()
    own = described("vanishes")
    vanished._publish(own.name, own.generation, b"{}", take=True)  # and never refreshed
    until(lambda: seen.of(own.name) == [own.generation, None], "name and end of it")


def test_watchers_hear_of_what_is_there_what_comes_and_what_goes(stores):
    first, second = described("watched-1"), described("watched-2")
    names = stores(LONG)
    names.announce(lambda: first)
    seen = Seen(stores(LONG))  # what it hears later, the store has told it
    until(lambda: seen.of(first.name) == [first.generation], "what was there")
    other = stores(LONG)
    other.announce(lambda: second)
    until(lambda: seen.of(second.name) == [second.generation], "what came")
    other.withdraw()
    until(lambda: seen.of(second.name) == [second.generation, None], "what went")
    assert seen.of(first.name) == [first.generation]


def test_a_watcher_that_fails_is_logged_and_does_not_stop_the_others(stores, caplog):
    names = stores()

    def fails(*_: Any) -> None:
        raise RuntimeError("mine")

    names.watch(fails)
    seen = Seen(names)
    names.announce(lambda: described("heard-anyway"))
    until(lambda: seen.of("heard-anyway"), "the other watcher")
    assert "a watcher of names failed" in caplog.text


def test_the_last_to_announce_a_name_has_it_and_the_one_before_lets_go(stores, caplog):
    old, new, other = stores(), stores(), stores()
    seen = Seen(other)
    before, after = described("restarted"), described("restarted")
    old.announce(lambda: before)
    until(lambda: seen.of("restarted") == [before.generation], "the first")
    new.announce(lambda: after)
    until(lambda: "taken over by another engine" in caplog.text, "the warning")
    until(lambda: seen.of("restarted") == [before.generation, after.generation], "the second")
    old.changed()
    old.withdraw()  # must not remove what is not its own
    assert other.look_up("restarted").generation == after.generation
    assert caplog.text.count("taken over") == 1


def test_withdrawing_does_not_remove_the_record_of_a_successor(stores):
    old, new = stores(LONG), stores(LONG)
    before, after = described("succeeded"), described("succeeded")
    old.announce(lambda: before)
    until(lambda: not old._due.is_set(), "the keeper at rest")
    new.announce(lambda: after)
    old.withdraw()
    assert new.look_up("succeeded").generation == after.generation


def test_a_publication_does_not_take_a_name_that_another_holds(stores):
    names = stores()
    assert names._publish("held", 7, b"7", take=True) == 7
    assert names._publish("held", 8, b"8", take=False) == 7
    assert names._refresh("held", 8) == 7
    names._remove("held", 8)
    assert names._fetch("held") == b"7"
    assert names._publish("held", 7, b"7+", take=False) == 7
    assert names._fetch("held") == b"7+"
    names._remove("held", 7)
    assert names._fetch("held") is None
    assert names._refresh("held", 7) is None
    assert names._publish("held", 8, b"8", take=False) == 8
    names._remove("held", 8)


# ------------------------------------------------------------------------------ bad records
def write_raw(names: Names, key: bytes, generation: bytes, record: bytes) -> None:
    """As somebody else may write to the store."""
    if names.where.startswith("redis"):
        client: Any = names._redis  # type: ignore[attr-defined]
        if generation == b"another type":
            client.set(b"mooncache/segments/" + key, record)
        else:
            client.hset(b"mooncache/segments/" + key, mapping={b"generation": generation, b"record": record})
        client.sadd("mooncache/segments", key)  # last: a name without a record is taken off the list by who looks
    else:
        names._etcd.put(b"mooncache/segments/" + key, record)  # type: ignore[attr-defined]


BAD = {
    b"no-number": (b"not a number", b"{}"),
    b"\xff\xfe": (b"5", b"{}"),
    b"no-json": (b"-1", b"\x80\x04"),
    b"too-large": (b"0", b"9" * 1_000_000),
    b"of-another-type": (b"another type", b"{}"),
    b"beyond": (b"9" * 30, b"[]"),
    b"bell\x07": (b"7", b"{}"),
    b"x" * 300: (b"7", b"{}"),
    b"wrong-types": (b"0x10", b'{"version": 1, "name": 5}'),
}


@pytest.mark.parametrize("key", BAD)
def test_a_bad_record_is_told_of_once_and_harms_nobody_else(stores, caplog, key):
    names, other = stores(), stores()
    own, came = described("beside-a-bad-one"), described("comes-later")
    names.announce(lambda: own)
    seen = Seen(names)
    write_raw(other, key, *BAD[key])
    until(lambda: names.background.trouble, "the trouble")
    assert "1 are no engine's and are skipped" in names.background.trouble[0]
    refreshed = []
    refresh = names._refresh
    names._refresh = lambda *a: (refreshed.append(refresh(*a)), refreshed[-1])[1]  # type: ignore[method-assign]
    until(lambda: len(refreshed) >= 5, "five refreshes, more than a lease")
    assert set(refreshed) == {own.generation}
    assert other.look_up(own.name).generation == own.generation
    other.announce(lambda: came)
    until(lambda: seen.of(came.name) == [came.generation], "what came")
    with pytest.raises(DiscoveryError):
        other.look_up(key.decode(errors="replace"))
    assert len([line for line in caplog.messages if "are skipped" in line]) == 1 + (other.background.trouble != ())
    (other._redis.delete if "redis" in other.where else other._etcd.delete)(b"mooncache/segments/" + key)  # type: ignore[attr-defined]
    until(lambda: not names.background.trouble, "the end of the trouble")


# ------------------------------------------------------------------------------ outages
def test_an_outage_is_logged_once_outlasted_and_nobody_counts_as_gone(server, stores, caplog):
    caplog.set_level(logging.INFO, "mooncache")
    names, other = stores(), stores()
    own = described("outlasts")
    names.announce(lambda: own)
    seen = Seen(other)
    until(lambda: seen.of(own.name) == [own.generation], "the name")
    server.kill()
    try:
        until(lambda: caplog.text.count("are not kept up to date") >= 2, "both warnings")
        with pytest.raises(DiscoveryError, match=rf"{server.url} cannot be asked .*is it up"):
            other.look_up(own.name)
        with pytest.raises(DiscoveryError, match=server.url):
            stores().announce(lambda: described("too-early"))
        failed = []
        refresh = names._refresh
        names._refresh = lambda *a: (failed.append(1), refresh(*a))[1]  # type: ignore[method-assign]
        until(lambda: len(failed) >= 4, "retries that last longer than the lease")
    finally:
        server.start()
    until(lambda: caplog.text.count("answers again") >= 2, "both back")
    until(lambda: known(other, own.name), "the record published again")
    assert caplog.text.count("are not kept up to date") == 2
    latest = described("after-the-outage")
    names.withdraw()
    names.announce(lambda: latest)
    until(lambda: seen.of(latest.name) == [latest.generation], "news after the outage")
    until(lambda: seen.of(own.name) == [own.generation, None], "the withdrawal, once things have settled")


def test_a_frozen_server_blocks_nobody_for_long(server, stores):
    names = stores(timeout=0.2)
    names.announce(lambda: described("frozen"))
    server.freeze()
    try:
        with pytest.raises(DiscoveryError, match="cannot be asked"):
            names.look_up("frozen")
        names.changed()
        names.withdraw()
        names.close()
    finally:
        server.thaw()


def test_something_else_behind_the_port_is_said_to_be_no_store(server, stores):
    other = "etcd" if server.url.startswith("redis") else "redis"
    names = open_names(server.url.replace(server.url.partition(":")[0], other, 1), timeout=1.0)
    with pytest.raises(DiscoveryError, match="cannot be asked"):
        names.look_up("anything")
    names.close()


# ------------------------------------------------------------------------------ opening
@pytest.mark.parametrize(
    "url",
    ["", "redis", "redis://", "http://host:1", "redis://host:port", "etcd://:2379", "redis://h:0", "etcd://[::1"],
)  # fmt: skip
def test_other_urls_are_refused_saying_what_there_is(url):
    with pytest.raises(UsageError, match=r"redis://host:port/db, rediss://host:port/db or etcd://host:port"):
        open_names(url)


def test_passwords_are_not_shown():
    with pytest.raises(UsageError) as refused:
        open_names("http://user:hunter2@host:1")
    names = open_names("redis://user:hunter2@127.0.0.1:1/0", timeout=1.0)
    with pytest.raises(DiscoveryError, match=r"redis://127\.0\.0\.1:1/0") as down:
        names.look_up("anything")
    names.close()
    assert "hunter2" not in f"{refused.value} {down.value} {names!r}"


@pytest.mark.parametrize(("scheme", "library"), [("redis", "redis"), ("rediss", "redis"), ("etcd", "etcd3gw.client")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(scheme, library, monkeypatch):
    extra = "redis" if scheme == "rediss" else scheme
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"mooncache.discovery.{extra}", raising=False)
    with pytest.raises(DiscoveryError, match=rf"pip install 'mooncache\[{extra}\]'"):
        open_names(f"{scheme}://host")


def test_importing_the_package_loads_no_store():
    script = (
        "import sys, mooncache, mooncache.discovery.base\n"
        "assert not {'redis', 'etcd3gw', 'requests'} & sys.modules.keys()"
    )
    done = run_python(script)
    assert done.returncode == 0, done.stderr
