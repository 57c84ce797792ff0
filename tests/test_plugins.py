"""Wires and stores of names that other packages add by entry points."""

import re
import textwrap

import numpy as np
import pytest

import mooncache
from mooncache.discovery.stores import open_names
from mooncache.errors import UsageError
from tests.helpers import LIMIT


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package beside the tests that offers a wire, a store of names, and one thing each that is none."""
    (tmp_path / "pigeons.py").write_text(
        textwrap.dedent(
            """
            from mooncache.discovery.base import Names
            from mooncache.providers.inprocess.loopback import Loopback

            class Pigeon(Loopback):
                name = "pigeon"

            class Loft(Names):
                def __init__(self, parts, lease, timeout):
                    super().__init__(f"loft at {parts.hostname}", lease)
                    self.asked = parts, lease, timeout

            Loft.__abstractmethods__ = frozenset()

            def stone(*_):
                return 5
            """
        )
    )
    info = tmp_path / "pigeons-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeons\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mooncache.providers]\npigeon = pigeons:Pigeon\nstone = pigeons:stone\nlost = ravens:Raven\n"
        "[mooncache.names]\nloft = pigeons:Loft\nstone = pigeons:stone\nlost = pigeons:Raven\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_a_wire_of_another_package_is_opened_by_its_name():
    with mooncache.Engine("a", provider="pigeon") as here, mooncache.Engine("b", provider="pigeon") as there:
        source, target = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
        a, b = here.register(source), there.register(target)
        here.write("b", a.address, b.address, 64).wait(LIMIT).close()
        np.testing.assert_array_equal(target, source)


@pytest.mark.usefixtures("installed")
def test_a_store_of_names_of_another_package_is_opened_by_its_scheme():
    names = open_names("loft://tower:7", lease=9, timeout=3)
    assert (names.where, names.lease, names.asked[0].port, names.asked[2]) == ("loft at tower", 9, 7, 3)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mooncache.Engine(provider="dove"), "'auto', 'pigeon', 'stone', 'lost', got 'dove'"),
        (lambda: mooncache.Engine(provider="stone"), "'stone' of mooncache.providers to make a Provider, got 5"),
        (
            lambda: open_names("dove://tower"),
            "rediss://host:port/db, loft://..., stone://..., lost://... or etcd://host:port",
        ),
        (lambda: open_names("stone://tower"), "'stone' of mooncache.names to make a Names, got 5"),
        (
            lambda: mooncache.Engine(provider="lost"),
            "'lost' of mooncache.providers cannot be imported: No module named",
        ),
        (lambda: open_names("lost://tower"), "'lost' of mooncache.names cannot be imported: "),
    ],
)
def test_what_no_package_offers_and_what_is_none_is_refused(call, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        call()
