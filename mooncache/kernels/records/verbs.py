"""The structs of libibverbs that kernels write and read (LP64 Linux)."""

import numpy as np

from mooncache.kernels.records.base import record_at

SEND_WR = np.dtype(
    {
        "names": [
            "wr_id",
            "next",
            "sg_list",
            "num_sge",
            "opcode",
            "num_sge_opcode",
            "send_flags",
            "imm_data",
            "remote_addr",
            "rkey",
        ],
        # num_sge_opcode is both in one store, which a chain of work requests is built with (6.2 ns each, else 6.9);
        # rkey is a uint32 with padding behind it: a NIC reads the low half, a software wire all of it
        "formats": ["<i8", "<i8", "<i8", "<i4", "<i4", "<i8", "<u4", "<u4", "<i8", "<i8"],
        "offsets": [0, 8, 16, 24, 28, 24, 32, 36, 40, 48],
        "itemsize": 128,
    },
    align=True,
)  # struct ibv_send_wr
SGE = np.dtype(
    {
        "names": ["addr", "length", "lkey", "length_lkey"],
        "formats": ["<i8", "<u4", "<u4", "<i8"],
        "offsets": [0, 8, 12, 8],
    },
    align=True,
)
WC = np.dtype(
    {"names": ["wr_id", "status", "imm_data"], "formats": ["<i8", "<u4", "<u4"], "offsets": [0, 8, 24], "itemsize": 48},
    align=True,
)  # struct ibv_wc
IBV_CONTEXT = np.dtype(
    {
        "names": ["poll_cq", "req_notify_cq", "post_send", "post_recv"],
        "formats": ["<i8"] * 4,
        "offsets": [96, 104, 208, 216],
        "itemsize": 328,
    },
    align=True,
)  # struct ibv_context: of its operations those that kernels call
IBV_QP = np.dtype(
    {"names": ["context", "qp_context"], "formats": ["<i8", "<i8"], "offsets": [0, 8], "itemsize": 160}, align=True
)  # struct ibv_qp
IBV_CQ = np.dtype(
    {"names": ["context", "cq_context"], "formats": ["<i8", "<i8"], "offsets": [0, 16], "itemsize": 128}, align=True
)  # struct ibv_cq
RECV_WR = np.dtype(
    {
        "names": ["wr_id", "next", "sg_list", "num_sge"],
        "formats": ["<i8", "<i8", "<i8", "<i4"],
        "offsets": [0, 8, 16, 24],
        "itemsize": 32,
    },
    align=True,
)  # struct ibv_recv_wr
ibv_context_at, ibv_qp_at, ibv_cq_at = record_at(IBV_CONTEXT), record_at(IBV_QP), record_at(IBV_CQ)
send_wr_at, sge_at, wc_at = record_at(SEND_WR), record_at(SGE), record_at(WC)
