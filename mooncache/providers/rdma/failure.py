"""Errors of libibverbs as this package's: the device, the call, what the system said, and what to do."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mooncache.errors import TransportError
from mooncache.providers.rdma.library import load

_ACCESS = (
    "this user needs to read and write /dev/infiniband/uverbs*; a container needs them passed in "
    "(docker run --device=/dev/infiniband)"
)
_GONE = "the device is gone or was reset; see `rdma link` and the kernel's log, and open a new engine"
UNREACHABLE = "the peer's GID cannot be reached from here: are both ports in one network, with GIDs of one family?"
_UNABLE = "this device, its driver or the kernel cannot do that"

_CURES = {
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.ENOENT: _ACCESS,
    errno.ENODEV: _GONE,
    errno.EIO: _GONE,
    errno.ETIMEDOUT: UNREACHABLE,
    errno.ENETUNREACH: UNREACHABLE,
    errno.EHOSTUNREACH: UNREACHABLE,
    errno.ENOSYS: _UNABLE,
    errno.EOPNOTSUPP: _UNABLE,
    errno.EPROTONOSUPPORT: _UNABLE,
}


@contextmanager
def asking(device: str, operation: str, cures: Mapping[int, str] | None = None) -> Iterator[None]:
    """Turn what pyverbs raises inside into a `TransportError`; `refused` describes the arguments."""
    try:
        yield
    except (load().Error, OverflowError) as error:  # the latter for figures that do not fit into a C struct
        code = getattr(error, "error_code", -1)
        raise refused(device, operation, code, cures, said=str(error)) from error


def refused(
    device: str, operation: str, code: int, cures: Mapping[int, str] | None = None, said: str = ""
) -> TransportError:
    """Return the error for a refusal of libibverbs.

    Args:
        operation: what was asked, with its figures, as it follows "could not".
        code: errno; -1 when there is none.
        cures: what to do by errno, where that is known better than in general.
        said: the words to use when there is no errno.
    """
    why = f"{os.strerror(code)} (errno {code})" if code > 0 else said
    cure = (cures or {}).get(code) or (memlock() if code == errno.ENOMEM else _CURES.get(code, ""))
    return TransportError(f"RDMA device {device} could not {operation}: {why}" + (f"; {cure}" if cure else ""))


def memlock() -> str:
    """Explain what to do when memory cannot be locked: devices pin what they reach, Linux limits that by process."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return "locked memory is not limited (ulimit -l), so the device or the machine itself has run out"
    return (
        f"this process may lock {limit >> 10} KiB of memory (ulimit -l). Raise that: 'USER - memlock unlimited' in "
        "/etc/security/limits.conf, LimitMEMLOCK=infinity in a systemd unit, docker run --ulimit memlock=-1"
    )
