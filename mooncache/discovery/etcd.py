"""Names in etcd 3.4 or later, through its JSON gateway.

    mooncache/segments/<name>   the record

A record's lease has its engine's generation as id. So who holds a name stands in the key's metadata: finding out reads
no record, and every write can be made to depend on it.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import ceil
from typing import Any
from urllib.parse import SplitResult

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception
from etcd3gw.lease import Lease
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import HTTPError, ReadTimeoutError

from mooncache import forks
from mooncache.discovery.base import Names, unreachable, where_of

PREFIX = "mooncache/segments/"
PREFIX_END = "mooncache/segments0"  # '0' follows '/'
PORT = 2379

QUIET_S = 60.0
"""A watch that said nothing for so long is made anew: etcd's host may be gone without a word."""


class _Connection(HTTPConnection):
    """A connection that no forked child keeps."""

    def connect(self) -> None:
        """Connect, and enter the socket."""
        super().connect()
        if self.sock is not None:
            forks.private(self.sock)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class Etcd(Names):
    """The store of names in etcd, see `stores.open_names`. Leases are whole seconds, at least 1.5 elections."""

    def __init__(self, parts: SplitResult, lease: float, timeout: float) -> None:
        super().__init__(where_of(parts), lease)
        self._etcd = Etcd3Client(str(parts.hostname), parts.port or PORT, timeout=timeout)
        self._etcd.session.trust_env = False  # a proxy for the world outside does not lead to the cluster's etcd
        adapter = HTTPAdapter()
        adapter.poolmanager.pool_classes_by_scheme = {"http": _Pool}
        self._etcd.session.mount("http://", adapter)
        self._watching: requests.Response | None = None

    def close(self) -> None:
        """Close the store, see `Names.close`."""
        self._closing.set()
        if self._watching is not None:
            with suppress(OSError, RuntimeError, ValueError):  # it has just ended by itself
                self._watching.raw.shutdown()
        super().close()

    def _publish(self, name: str, generation: int, record: bytes, *, take: bool) -> int:
        with self._asking():
            lease = Lease(generation, self._etcd)
            if lease.refresh() < 0:
                self._etcd.post(self._etcd.get_url("/lease/grant"), json={"ID": generation, "TTL": ceil(self.lease)})
            if take:
                self._etcd.put(_key(name), record, lease)
                return generation
            put = {"request_put": {"key": _base64(_key(name)), "value": _base64(record), "lease": generation}}
            while True:
                if self._transact(_unheld(name), put) or self._transact(_held_by(name, generation), put):
                    return generation
                holder = self._holder(name)
                if holder is not None:  # else that one went between these requests
                    return holder

    def _refresh(self, name: str, generation: int) -> int | None:
        with self._asking():
            Lease(generation, self._etcd).refresh()
            return self._holder(name)

    def _remove(self, name: str, generation: int) -> None:
        with self._asking():
            self._transact(_held_by(name, generation), {"request_delete_range": {"key": _base64(_key(name))}})

    def _fetch(self, name: str) -> bytes | None:
        with self._asking():
            return next(iter(self._etcd.get(_key(name))), None)

    def _generations(self) -> dict[str, int]:
        with self._asking():
            found = self._etcd.get(PREFIX, metadata=True, range_end=PREFIX_END, keys_only=True)
            return self._holders(
                (about["key"].removeprefix(PREFIX.encode()), about.get("lease", 0)) for _, about in found
            )

    def _listen(self, heard: Callable[[], None]) -> None:
        # Not etcd3gw's watch: it does not say when its connection breaks, and loses events that arrive together. What
        # happened is of no interest here, only that something did.
        request = {"create_request": {"key": _base64(PREFIX.encode()), "range_end": _base64(PREFIX_END.encode())}}
        with self._asking(), self._etcd.session.post(
            self._etcd.get_url("/watch"), json=request, stream=True, timeout=(self._etcd.timeout, QUIET_S)
        ) as watching:  # fmt: skip
            watching.raise_for_status()
            self._watching = watching
            with suppress(ReadTimeoutError):
                while not self._closing.is_set() and watching.raw.read1():
                    heard()

    def _disconnect(self) -> None:
        self._etcd.session.close()

    def _holder(self, name: str) -> int | None:
        found = self._etcd.get(_key(name), metadata=True, keys_only=True)
        return int(found[0][1].get("lease", 0)) if found else None

    def _transact(self, condition: dict[str, Any], then: dict[str, Any]) -> bool:
        """Do it if the condition holds; return whether it did."""
        done = self._etcd.transaction({"compare": [condition], "success": [then], "failure": []})
        return bool(done.get("succeeded"))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        # The last three: what answers there is no etcd, and its JSON has another shape.
        except (Etcd3Exception, requests.RequestException, HTTPError, LookupError, TypeError, ValueError) as error:
            raise unreachable(self.where, error) from error


def _unheld(name: str) -> dict[str, Any]:
    return {"key": _base64(_key(name)), "target": "CREATE", "result": "EQUAL", "create_revision": 0}


def _held_by(name: str, generation: int) -> dict[str, Any]:
    return {"key": _base64(_key(name)), "target": "LEASE", "result": "EQUAL", "lease": generation}


def _key(name: str) -> bytes:
    return (PREFIX + name).encode()  # etcd3gw would take str for Latin-1


def _base64(value: bytes) -> str:
    return b64encode(value).decode()
