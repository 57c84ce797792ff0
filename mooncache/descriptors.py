"""File descriptors: the error for when there are none left."""

from __future__ import annotations

import errno
import resource

from mooncache.errors import CapacityError


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
