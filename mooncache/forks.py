"""Forks: an engine's resources stay with the process that opened it.

A child of os.fork (multiprocessing's "fork", a data loader's worker) has a copy of every object and shares every open
file, but has none of the threads. Used there, an engine would read from its parent's sockets; ending there, it would
take back its parent's keys and names; and a child that outlives its parent would keep the port, and keep peers from
noticing. So whoever holds such things enters itself here as `private`, and in a child, before anything else runs there,
each is told to `disown` them:

    refuse every further call, take no lock that a thread of the parent may have held,
    close every descriptor, and do nothing but that: a shutdown, or a change of an epoll set, is the parent's as well.

Descriptors are close-on-exec throughout, so that programs which are started inherit none either.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Protocol, TypeVar


class Holder(Protocol):
    """An owner of resources that a forked child must not have."""

    def disown(self) -> None:
        """Let go of the resources in a forked child, once. They may have been half opened or half closed."""


T = TypeVar("T", bound="Holder | socket.socket")
_private: weakref.WeakSet[Holder | socket.socket] = weakref.WeakSet()


def private(thing: T) -> T:
    """Enter a holder or a socket, until it is garbage; return it. In a child a socket is closed, a holder disowns."""
    _private.add(thing)
    return thing


def drop(descriptors: Iterable[int]) -> None:
    """Close what nobody has closed yet, for `disown` and for a close that may be a second one; below 0: none."""
    for descriptor in descriptors:
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)


def _in_child() -> None:
    inherited = list(_private)
    _private.clear()  # numbers of what is closed now may be others' in a child of this one
    with ExitStack() as all_of_them:  # one that fails keeps none of the others
        for thing in inherited:
            if isinstance(thing, socket.socket):
                drop([thing.detach()])  # its close would wait for files that were made of it
            else:
                all_of_them.callback(thing.disown)


os.register_at_fork(after_in_child=_in_child)
