"""Opening an engine: the provider and settings that callers ask for by name, its own name, what the system refuses."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from mooncache.descriptors import none_left
from mooncache.errors import TransportError, UsageError
from mooncache.kernels.layout import Policy, Store
from mooncache.kernels.state import Settings
from mooncache.providers.base import Provider
from mooncache.providers.emulated import Emulated
from mooncache.providers.loopback import Loopback
from mooncache.providers.shm import Shm
from mooncache.providers.tcp import Tcp


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


def provider(provider: str | Provider) -> Provider:
    """The provider of that name, or the one given. Raises UsageError if there is none."""
    if isinstance(provider, Provider):
        return provider
    if provider not in PROVIDERS:
        raise UsageError(f"expected a Provider or one of {', '.join(map(repr, PROVIDERS))}, got {provider!r}")
    return PROVIDERS[provider]()


def settings(store: str, policy: str, settings: dict[str, int]) -> Settings:
    """The defaults with what callers ask for. Raises UsageError for what there is not."""
    known = Settings.__dataclass_fields__.keys() - {"store", "policy"}
    for name in settings:
        if name not in known:
            raise UsageError(f"unknown setting {name!r}; there are: {', '.join(sorted(known))}")
    changed: dict[str, Any] = {**settings}
    try:
        return replace(Settings(), store=Store[store.upper()], policy=Policy[policy.upper()], **changed)
    except KeyError as error:
        raise UsageError(
            f"expected a store of {[s.name.lower() for s in Store]} and a policy of "
            f"{[p.name.lower() for p in Policy]}, got {store!r} and {policy!r}"
        ) from error


@contextmanager
def system_errors() -> Iterator[None]:
    """While an engine is opened: what the system refuses is a TransportError, no descriptor left a CapacityError."""
    try:
        yield
    except OSError as error:
        what = "no engine can be opened"
        raise none_left(error, what) or TransportError(f"{what}: {error.strerror}") from error


def own_prefix() -> str:
    """Names that no engine of another process has by chance."""
    return f"{socket.gethostname()}-{os.getpid()}"
