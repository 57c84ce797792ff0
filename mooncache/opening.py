"""Opening an engine: the provider and settings that callers ask for by name, its own name, the system's refusals."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mooncache import plugins
from mooncache.discovery.fields import NAME_LENGTH, is_name
from mooncache.errors import UsageError, came
from mooncache.kernels.enums import Policy, Store
from mooncache.kernels.settings import Settings
from mooncache.providers.base import Provider
from mooncache.providers.inprocess.emulated import Emulated
from mooncache.providers.inprocess.loopback import Loopback
from mooncache.providers.shm.provider import Shm
from mooncache.providers.stream.tcp import Tcp


def _rdma() -> Provider:
    from mooncache.providers.rdma.provider import Rdma  # only who asks for it needs its libraries

    return Rdma()


PROVIDERS: dict[str, Callable[[], Provider]] = {
    "loopback": Loopback,
    "emulated": Emulated,
    "tcp": Tcp,
    "shm": Shm,
    "rdma": _rdma,
    "auto": partial(Shm, elsewhere=True),
}


TEXTS = {  # what each is, and whether None stands for a default
    "name": ("what peers call this engine", True),
    "store": ("one of " + ", ".join(repr(s.name.lower()) for s in Store), False),
    "policy": ("one of " + ", ".join(repr(p.name.lower()) for p in Policy), False),
    "listen": ("an address such as '127.0.0.1:0'", False),
    "discovery": ("a URL such as 'redis://host:6379' or 'etcd://host:2379'", True),
    "advertise": ("where peers reach this engine", True),
}


def provider(provider: Any) -> Provider:
    """Return the provider of that name, or the one given. Raises UsageError if there is none."""
    if isinstance(provider, Provider):
        return provider
    if isinstance(provider, str) and provider in PROVIDERS:
        return PROVIDERS[provider]()
    others = plugins.offered(plugins.PROVIDERS)
    if not isinstance(provider, str) or provider not in others:
        known = ", ".join(map(repr, [*PROVIDERS, *others]))
        raise UsageError(f"expected a Provider or one of {known}, got {came(provider)}")
    return plugins.make(plugins.PROVIDERS, provider, Provider)  # type: ignore[type-abstract]


def check_texts(**texts: object) -> None:
    """Raise UsageError for an argument of `Engine` that is no str, nor None where TEXTS allows it."""
    for name, value in texts.items():
        what, optional = TEXTS[name]
        if not (isinstance(value, str) or (optional and value is None)):
            raise UsageError(f"expected {name} to be {what}{', or None' if optional else ''}, got {came(value)}")


def check_name(name: str | None) -> None:
    """Raise UsageError for a name that no engine can have."""
    if name is not None and (not is_name(name) or ":" in name):
        raise UsageError(
            f"expected an engine's name to be 1 to {NAME_LENGTH} printable characters without ':' (peers would take it "
            f"for host:port), got {came(name)}"
        )


def settings(store: str, policy: str, settings: dict[str, Any]) -> Settings:
    """Return the default settings with the caller's. Raises UsageError for a setting that does not exist."""
    check_texts(store=store, policy=policy)
    known = Settings.__dataclass_fields__.keys() - {"store", "policy"}
    for name in settings:
        if name not in known:
            raise UsageError(f"unknown setting {name!r}; there are: {', '.join(sorted(known))}")
    changed = {name: int(value) if isinstance(value, np.integer) else value for name, value in settings.items()}
    try:
        return replace(Settings(), store=Store[store.upper()], policy=Policy[policy.upper()], **changed)
    except KeyError as error:
        raise UsageError(
            f"expected a store of {[s.name.lower() for s in Store]} and a policy of "
            f"{[p.name.lower() for p in Policy]}, got {came(store)} and {came(policy)}"
        ) from error


def own_prefix() -> str:
    """Return a prefix of names that no engine of another process has by chance."""
    return f"{socket.gethostname()}-{os.getpid()}"
