"""The shortage behind a system call's failure: the limit, how much of it is in use, and the cure."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mooncache.errors import CapacityError, TransportError


def memory() -> str:
    """Explain a lack of memory or address space."""
    return (
        "the system grants this process no more memory: ask for less (an engine: for fewer `slices` or `batches`), or "
        "raise its limit (`ulimit -v`, the container's memory, vm.max_map_count)"
    )


def threads() -> str:
    """Explain a lack of threads."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    most = "any number of them" if soft == resource.RLIM_INFINITY else f"{soft} in all processes"
    return (
        f"this process has{_used('task')} threads, and its user may have {most}: raise `ulimit -u`, or the container's "
        "pids limit"
    )


def watches() -> str:
    """Explain a lack of watches for epoll sets."""
    return "this user watches as many descriptors as fs.epoll.max_user_watches permits: raise that by sysctl"


def _used(what: str) -> str:
    try:
        return f" {len(os.listdir(f'/proc/self/{what}'))}"
    except OSError:  # looking takes one, too
        return " as many"


CURES: dict[int, Callable[[], str]] = {
    errno.ENOMEM: memory,
    errno.EAGAIN: threads,
    errno.ENOSPC: watches,
}


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what the system refuses inside into an error of ours: `what` says what cannot be done then.

    Raises:
        CapacityError: it has run out of something. TransportError: any other reason.
    """
    try:
        yield
    except OSError as error:
        none = none_left(error, what)
        if none is not None:
            raise none from error
        if error.errno in CURES:
            raise CapacityError(f"{what}: {error.strerror}; {CURES[error.errno]()}") from error
        raise TransportError(
            f"{what}: {error}; does a sandbox, a security module or the user's rights forbid it?"
        ) from error
    except MemoryError as error:
        raise CapacityError(f"{what}: {str(error) or 'no memory'}; {memory()}") from error
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise CapacityError(f"{what}: {error}; {threads()}") from error


def none_left(error: OSError, what: str) -> CapacityError | None:
    """Return the error to raise when `error` says that no file descriptor is left; None when it says something else.

    Args:
        what: could not be done, as the beginning of a sentence.
    """
    if error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return CapacityError(
            f"{what}: all {limit} file descriptors that this process may have are in use; raise the limit (ulimit -n, "
            "LimitNOFILE= of systemd, docker run --ulimit nofile=); `mooncache doctor` says how many engines need"
        )
    if error.errno == errno.ENFILE:
        return CapacityError(
            f"{what}: all file descriptors of this system are in use; raise it: sysctl -w fs.file-max=N"
        )
    return None
