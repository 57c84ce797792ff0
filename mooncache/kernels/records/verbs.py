"""The structs of libibverbs that kernels write and read (LP64 Linux)."""

import numpy as np

from mooncache.kernels.records.base import record_at

SEND_WR = np.dtype(
    {
        "names": ["wr_id", "next", "sg_list", "num_sge", "opcode", "send_flags", "remote_addr", "rkey"],
        # rkey is a uint32 with padding behind it: a NIC reads the low half, a software wire all of it
        "formats": ["<i8", "<i8", "<i8", "<i4", "<i4", "<u4", "<i8", "<i8"],
        "offsets": [0, 8, 16, 24, 28, 32, 40, 48],
        "itemsize": 128,
    },
    align=True,
)  # struct ibv_send_wr
SGE = np.dtype([("addr", np.int64), ("length", np.uint32), ("lkey", np.uint32)], align=True)  # struct ibv_sge
WC = np.dtype(
    {"names": ["wr_id", "status"], "formats": ["<i8", "<u4"], "offsets": [0, 8], "itemsize": 48}, align=True
)  # struct ibv_wc
send_wr_at, sge_at, wc_at = record_at(SEND_WR), record_at(SGE), record_at(WC)
