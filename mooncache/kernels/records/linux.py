"""The structs of system calls that kernels write and read (LP64 Linux)."""

import numpy as np

from mooncache.kernels.atomics import X86
from mooncache.kernels.records.base import record_at

IOVEC = np.dtype([("base", np.int64), ("length", np.int64)])  # struct iovec
MSGHDR = np.dtype(
    {"names": ["iov", "iovlen"], "formats": ["<i8", "<i8"], "offsets": [16, 24], "itemsize": 56}, align=True
)  # struct msghdr
EPOLL_EVENT = np.dtype(
    {
        "names": ["events", "data"],
        "formats": ["<u4", "<i8"],
        "offsets": [0, 4 if X86 else 8],  # packed on x86-64 only
        "itemsize": 12 if X86 else 16,
    }
)  # struct epoll_event
iovec_at, epoll_event_at = record_at(IOVEC), record_at(EPOLL_EVENT)
