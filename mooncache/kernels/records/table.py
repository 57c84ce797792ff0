"""The header of a region table: what one engine has registered; see kernels/regions.py."""

import numpy as np

from mooncache.kernels.records.base import record_at, row

PEER_BITS = 16
TABLE = row(
    [
        ("count", np.int64),
        ("changes", np.int64),  # rises with every change of what is in it
        ("bases", np.int64),  # address of int64[regions], ascending
        ("ends", np.int64),  # address of int64[regions]
        ("slots", np.int64),  # address of int64[regions]
        ("keys", np.int64),  # address of int64[NICS, regions], by NIC and slot: lkey or rkey
        ("access", np.int64),  # address of int64[regions], by slot: bits of Access
        ("gone", np.int64),  # 1: the connection to this peer is broken; set by its provider
        ("renewed", np.int64),  # address of int64[regions], by slot: `renewals` when it had its key
        ("refused", np.int64),  # address of int64[regions], by slot: 1 + `renewals` by which the peer's NIC refused it
        ("refusals", np.int64),  # 1 when there are any; set by workers, like those
        ("peer", np.int64),  # how submits name the peer: its row, and above PEER_BITS how often that had been another's
        ("epoch", np.int64),  # rises when a connection to this peer ends: what was submitted before is posted no more
        ("breaks", np.int64),  # rises when a connection ends on which slices had been sent and were not answered
        ("confirmed", np.int64),  # of those, how many are known to land nothing any more; by the provider's threads
        ("asked", np.int64),  # 1: workers want the owner to be asked what is registered; see kernels/look.py
        ("begun", np.int64),  # looks begun
        ("looked", np.int64),  # number of the latest that has ended
        ("renewals", np.int64),  # how often a region has taken over a former one's slot
    ]
)
table_at = record_at(TABLE)
