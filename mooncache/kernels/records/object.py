"""The heap store's slice object, as large as the upstream engine's."""

import numpy as np

from mooncache.kernels.records.base import record_at, sized

OBJECT_BYTES = 216
OBJECT = sized(
    [
        ("source", np.int64),
        ("target", np.int64),
        ("length", np.int64),
        ("state", np.int64),
        ("batch", np.int64),
        ("string", np.int64),  # address of the path string
        ("string_length", np.int64),
    ],
    OBJECT_BYTES,
)
STRING_BYTES = 32  # "hostname:12345@mlx5_0" and its terminator: past the small-string buffer, so on the heap
object_at = record_at(OBJECT)
