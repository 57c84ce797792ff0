"""The least that moves bytes by RDMA, through pyverbs alone: to prove the bed, not the product.

As a program, `python -m tests.testbed.verbs DEVICE`, it is the far end of a connection: it prints its address, reads
the peer's, prints `ready`, and then answers every line it reads with the first bytes of its memory, in hex.
"""

from __future__ import annotations

import json
import sys
from time import monotonic
from typing import Any

import pyverbs.enums as e
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ, cqe_status_to_str
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

from mooncache.providers.rdma.gids import is_ipv4, parse

BYTES = 64 << 10
ACCESS = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
LIMIT = 60.0  # seconds for one work request: retries give up long before


class Endpoint:
    """`BYTES` of registered memory and one reliable queue pair on a device."""

    def __init__(self, device: str) -> None:
        self._context = Context(name=device)
        self._domain = PD(self._context)
        self.memory = MR(self._domain, BYTES, ACCESS)
        self._completions = CQ(self._context, 16)
        attributes = QPInitAttr(
            qp_type=e.IBV_QPT_RC, scq=self._completions, rcq=self._completions,
            cap=QPCap(max_send_wr=16, max_recv_wr=1), sq_sig_all=1,
        )  # fmt: skip
        self._pair = QP(self._domain, attributes)
        self._gid_index, gid = self._ipv4_gid()
        self.address = {
            "gid": gid, "pair": self._pair.qp_num, "key": self.memory.rkey, "bytes_at": self.memory.buf,
        }  # fmt: skip

    def _ipv4_gid(self) -> tuple[int, str]:
        """Index and text of the GID made of the interface's IPv4 address."""
        for index in range(self._context.query_port(1).gid_tbl_len):
            gid = str(self._context.query_gid(1, index))
            if is_ipv4(parse(gid)):
                return index, gid
        raise AssertionError("the port has no GID of an IPv4 address")

    def active(self) -> bool:
        """Whether the port is up."""
        return bool(self._context.query_port(1).state == e.IBV_PORT_ACTIVE)

    def connect(self, there: dict[str, Any]) -> None:
        """Connect to the endpoint with that address, which does the same."""
        self._there = there
        attributes = QPAttr(qp_state=e.IBV_QPS_INIT, port_num=1)
        attributes.qp_access_flags = ACCESS
        self._pair.to_init(attributes)
        attributes.path_mtu, attributes.dest_qp_num = e.IBV_MTU_1024, there["pair"]
        attributes.max_dest_rd_atomic = attributes.max_rd_atomic = 1
        attributes.min_rnr_timer = 12
        # Gives up after some tenths of a second. Seven is as many retries as can be said, and Soft-RoCE takes it for
        # ever.
        attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = 14, 3, 3
        route = GlobalRoute(dgid=GID(there["gid"]), sgid_index=self._gid_index)
        attributes.ah_attr = AHAttr(port_num=1, is_global=1, gr=route)
        self._pair.to_rts(attributes)

    def write(self, data: bytes) -> str:
        """Write it to the start of the other's memory; the completion's status, "success" or why not."""
        self.memory.write(data, len(data))
        here = SGE(self.memory.buf, len(data), self.memory.lkey)
        request = SendWR(1, opcode=e.IBV_WR_RDMA_WRITE, num_sge=1, sg=[here])
        request.set_wr_rdma(self._there["key"], self._there["bytes_at"])
        self._pair.post_send(request)
        deadline = monotonic() + LIMIT
        while monotonic() < deadline:
            count, completions = self._completions.poll(1)
            if count:
                return str(cqe_status_to_str(completions[0].status))
        raise AssertionError(f"a work request was not completed within {LIMIT} s")


def main() -> None:
    """The far end."""
    endpoint = Endpoint(sys.argv[1])
    print(json.dumps(endpoint.address), flush=True)
    endpoint.connect(json.loads(sys.stdin.readline()))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(endpoint.memory.read(64, 0).hex(), flush=True)


if __name__ == "__main__":
    main()
