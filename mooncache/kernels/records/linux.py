"""The structs of system calls that kernels write and read (LP64 Linux)."""

import platform

import numpy as np

from mooncache.kernels.records.base import record_at

IOVEC = np.dtype([("base", np.int64), ("length", np.int64)])  # struct iovec
MSGHDR = np.dtype(
    {"names": ["iov", "iovlen"], "formats": ["<i8", "<i8"], "offsets": [16, 24], "itemsize": 56}, align=True
)  # struct msghdr
_PACKED = platform.machine() in ("x86_64", "AMD64")  # there only
EPOLL_EVENT = np.dtype(
    {
        "names": ["events", "data"],
        "formats": ["<u4", "<i8"],
        "offsets": [0, 4 if _PACKED else 8],
        "itemsize": 12 if _PACKED else 16,
    }
)  # struct epoll_event
POLLFD = np.dtype([("fd", np.int32), ("events", np.int16), ("revents", np.int16)])  # struct pollfd
iovec_at, msghdr_at = record_at(IOVEC), record_at(MSGHDR)
epoll_event_at, pollfd_at = record_at(EPOLL_EVENT), record_at(POLLFD)
