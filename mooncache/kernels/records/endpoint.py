"""An endpoint's row: a worker's side of one peer."""

import numpy as np

from mooncache.kernels.records.base import ENDS, record_at, row

ENDPOINT = row(
    [
        ("queues", np.int64),  # address of int64[count], its queue rows for data
        ("count", np.int64),
        ("notes", np.int64),  # address of the queue row for notifications; may be one of those for data
        ("to_post", ENDS),  # batches with slices to post
        ("to_notify", ENDS),  # batches with a notification, in the order of submission
        ("lost", np.int64),  # 1: the peer is gone, fail whatever is for it
    ]
)
endpoint_at = record_at(ENDPOINT)
