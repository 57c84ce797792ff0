"""The stores of names, by the schemes of their URLs."""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult, urlsplit

from mooncache import plugins
from mooncache.discovery.base import LEASE_S, TIMEOUT_S, Names
from mooncache.errors import DiscoveryError, UsageError, came

SCHEMES = ("redis", "rediss", "etcd")


def open_names(url: str, *, lease: float = LEASE_S, timeout: float = TIMEOUT_S) -> Names:
    """Open the store at "redis://host:port/db", "rediss://..." (TLS) or "etcd://host:port", or one of `plugins.NAMES`.

    It is not asked yet.

    Args:
        lease: seconds, see `Names`. timeout: seconds, for one request.

    Raises:
        UsageError: not such a URL. DiscoveryError: the store's library is not installed.
    """
    parts = _split(url)
    if parts.scheme not in SCHEMES:
        return plugins.make(plugins.NAMES, parts.scheme, Names, parts, lease, timeout)  # type: ignore[type-abstract]
    try:
        if parts.scheme == "etcd":
            from mooncache.discovery.etcd import Etcd

            return Etcd(parts, lease, timeout)
        from mooncache.discovery.redis import Redis

        return Redis(parts, lease, timeout)
    except ImportError as error:
        extra = parts.scheme.removesuffix("s") if parts.scheme == "rediss" else parts.scheme
        raise DiscoveryError(
            f"names at {parts.scheme}:// need a library: {error}; pip install 'mooncache[{extra}]'"
        ) from error


def _split(url: Any) -> SplitResult:
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        known = parts.scheme in SCHEMES or parts.scheme in plugins.offered(plugins.NAMES)
        valid = known and parts.hostname and (parts.port is None or parts.port)
    except ValueError:  # a port that is no number, brackets that do not match
        valid = False
    if not valid:
        raise UsageError(
            "expected the URL of a store of names, redis://host:port/db, rediss://host:port/db"
            f"{''.join(f', {scheme}://...' for scheme in plugins.offered(plugins.NAMES))} or etcd://host:port; "
            f"got {came(url.rpartition('@')[2] if isinstance(url, str) else url)}"
        )
    return parts
