"""The optional stores of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from mooncache.cli.checks.base import Finding, check

EXTRAS: Mapping[str, tuple[str, ...]] = {"redis": ("redis",), "etcd": ("etcd3gw", "requests", "urllib3")}
"""The packages that `pip install 'mooncache[NAME]'` brings."""


@check("discovery")
def names(extras: Mapping[str, tuple[str, ...]] = EXTRAS) -> Iterator[Finding]:
    """Check which stores of names this environment can talk to. None is needed: peers can be called by host:port."""
    for extra, packages in extras.items():
        try:
            there = ", ".join(f"{package} {version(package)}" for package in packages)
        except PackageNotFoundError as missing:
            install = f"pip install 'mooncache[{extra}]'"
            text = f"{extra}: not available, {missing.name} is not installed ({install}); only needed for {extra}://"
            yield Finding("discovery", "ok", text)
        else:
            yield Finding("discovery", "ok", f"{extra}: {there}")
