"""Queues of an opened port: completion queues, the channels that wake their owners, and queue pairs."""

from __future__ import annotations

import errno
import os
from typing import Any, NamedTuple

from mooncache.errors import TransportError
from mooncache.providers.rdma.device import Device
from mooncache.providers.rdma.failure import UNREACHABLE, asking
from mooncache.providers.rdma.gids import SUBNET_BYTES, text_of
from mooncache.providers.rdma.library import (
    ACCESS_LOCAL_WRITE,
    ACCESS_REMOTE_READ,
    ACCESS_REMOTE_WRITE,
    QP_STATE,
    QPT_RC,
)
from mooncache.providers.rdma.pointers import CHANNEL_FD, channel_pointer, cq_pointer, half, qp_pointer

STATES = ("RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR")  # by value of ibv_qp_state
HOP_LIMIT = 255  # routers that a packet may pass: all that there are
MIN_RNR_TIMER = 12  # the peer waits 0.64 ms before it sends again what found no receive posted (IBTA 9.7.5.2.8)
INLINE_STEP = 64  # bytes; devices grant inline data in steps of this size


class Remote(NamedTuple):
    """The peer's end of a connection.

    Attributes:
        number: of its queue pair.
        gid: of its port, as `Nic.gid`.
        lid: of its port on InfiniBand; 0 on Ethernet.
    """

    number: int
    gid: bytes
    lid: int


class Channel:
    """A descriptor that is readable when an armed completion queue gets a completion. By `Nic.completion_channel`.

    Attributes:
        address: of the `ibv_comp_channel`. `ibv_get_cq_event` takes an event from it, without waiting, and tells the
            device's driver, which a plain read of `fd` would not: then it may not arm the queue again. Each event has
            to be acknowledged (`CompletionQueue.acknowledge`).
        fd: the descriptor.
    """

    def __init__(self, nic: Device) -> None:
        self._nic = nic
        with asking(nic.port.device, "make a completion channel"):
            self.pyverbs: Any = nic.verbs.CompChannel(nic.context)
        self.address = channel_pointer(self.pyverbs, nic.context_address)
        self.fd = half(self.address + CHANNEL_FD)
        os.set_blocking(self.fd, False)
        nic.hold(self)

    def close(self) -> None:
        """Close the descriptor. The completion queues made with this channel must be closed before."""
        self._nic.let_go(self)
        with asking(self._nic.port.device, "close a completion channel"):
            self.pyverbs.close()


class CompletionQueue:
    """A queue in which finished work requests are reported. Made by `Nic.completion_queue`.

    Attributes:
        address: of the `ibv_cq`.
        capacity: completions it holds: what was asked, or more.
    """

    def __init__(self, nic: Device, entries: int, channel: Channel | None) -> None:
        self._nic = nic
        _within(nic, "completion queue entries", entries, nic.limits.max_cqe)
        with asking(nic.port.device, f"make a completion queue of {entries} entries"):
            self.pyverbs: Any = nic.verbs.CQ(nic.context, entries, channel=channel and channel.pyverbs)
        self.capacity = int(self.pyverbs.cqe)
        self.address = cq_pointer(self.pyverbs, nic.context_address)
        nic.hold(self)

    def acknowledge(self, events: int) -> None:
        """Acknowledge `events` more of this queue's events; `close` would wait for the others forever."""
        self._nic.verbs.c.ibv_ack_cq_events(self.address, events)

    def close(self) -> None:
        """Destroy the queue; all its events must be acknowledged. Closes queue pairs that still use it."""
        self._nic.let_go(self)
        with self._nic.telling, asking(self._nic.port.device, "close a completion queue"):
            self.pyverbs.close()


class QueuePair:
    """One end of a reliable connection (RC), in state INIT at first. Made by `Nic.queue_pair`.

    Only work requests that ask for it are reported when they succeed (sq_sig_all = 0).

    Attributes:
        address: of the `ibv_qp`.
        number: what the peer connects to.
        send_depth, recv_depth: work requests that fit: what was asked, or more.
        sges: ranges of memory that one work request can gather from: what was asked, or more.
        inline: bytes that a work request can carry in itself; may be less than asked, or 0.
    """

    def __init__(
        self,
        nic: Device,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        send_depth: int,
        recv_depth: int,
        sges: int,
        inline: int,
    ) -> None:
        self._nic = nic
        _within(nic, "work requests in a send queue", send_depth, nic.limits.max_qp_wr)
        _within(nic, "work requests in a receive queue", recv_depth, nic.limits.max_qp_wr)
        _within(nic, "ranges in a work request", sges, nic.limits.max_sge)
        while True:
            cap = nic.verbs.QPCap(
                max_send_wr=send_depth,
                max_recv_wr=recv_depth,
                max_send_sge=sges,
                max_recv_sge=1,
                max_inline_data=inline,
            )
            try:
                self.pyverbs, made = self._made(send_cq, recv_cq, cap)
                break
            except TransportError:
                if inline == 0:
                    raise
                inline = inline // 2 // INLINE_STEP * INLINE_STEP
        self.number = int(self.pyverbs.qp_num)
        self.send_depth = int(made.max_send_wr)
        self.recv_depth = int(made.max_recv_wr)
        self.sges = int(made.max_send_sge)
        self.inline = int(made.max_inline_data)
        self.address = qp_pointer(self.pyverbs, nic.context_address, nic.pd_address, send_cq.address, recv_cq.address)
        self._init()
        nic.hold(self)

    def _made(self, send_cq: CompletionQueue, recv_cq: CompletionQueue, cap: Any) -> tuple[Any, Any]:
        verbs = self._nic.verbs
        attributes = verbs.QPInitAttr(qp_type=QPT_RC, scq=send_cq.pyverbs, rcq=recv_cq.pyverbs, cap=cap, sq_sig_all=0)
        what = (
            f"make a queue pair with {cap.max_send_wr} sends of {cap.max_send_sge} ranges, {cap.max_recv_wr} "
            f"receives and {cap.max_inline_data} bytes inline"
        )
        with asking(self._nic.port.device, what, {errno.EINVAL: "fewer or smaller work requests may do"}):
            return verbs.QP(self._nic.pd, attributes), attributes

    def connect(
        self,
        remote: Remote,
        *,
        psn: int,
        remote_psn: int,
        mtu: int,
        rd_atomic: int,
        timeout: int,
        retry_count: int,
        rnr_retry: int,
    ) -> None:
        """Connect to the peer's queue pair: INIT to RTR to RTS. The peer does the same with this end.

        Args:
            psn: first packet sequence number sent, 24 bits; the peer's `remote_psn`.
            remote_psn: the first that will come.
            mtu: bytes of payload in a packet; not more than either `Nic.mtu`.
            rd_atomic: reads under way at once, in each direction; not more than either `limits.max_rd_atomic`.
            timeout: the acknowledgement is waited for 4.096 µs * 2**timeout; 0 waits forever.
            retry_count: how often it is sent again after that, 0 to 7.
            rnr_retry: how often it is sent again when the peer has no receive posted; 7 means forever.

        Raises:
            TransportError: the peer's GID cannot be reached, or the device refused a figure.
        """
        cures = {
            errno.EINVAL: f"mtu {mtu}, rd_atomic {rd_atomic} or GID index {self._nic.gid_index} is not possible here. "
            "If the addresses of its network interface changed, open a new engine",
            errno.ENODEV: UNREACHABLE,  # no network interface leads there
        }
        what = f"connect GID {text_of(self._nic.gid)} to queue pair {remote.number} at {text_of(remote.gid)}"
        with asking(self._nic.port.device, what, cures):
            attributes = self._nic.verbs.QPAttr(port_num=self._nic.port.number)
            attributes.path_mtu = mtu.bit_length() - 8  # ibv_mtu: 1 is 256 bytes
            attributes.dest_qp_num = remote.number
            attributes.rq_psn = remote_psn
            attributes.max_dest_rd_atomic = rd_atomic
            attributes.min_rnr_timer = MIN_RNR_TIMER
            attributes.ah_attr = self._way(remote)
            attributes.sq_psn = psn
            attributes.timeout = timeout
            attributes.retry_cnt = retry_count
            attributes.rnr_retry = rnr_retry
            attributes.max_rd_atomic = rd_atomic
            self.pyverbs.to_rtr(attributes)
            self.pyverbs.to_rts(attributes)

    def _way(self, remote: Remote) -> Any:
        """Return the address of the peer's port: by GID on Ethernet and between InfiniBand subnets, else by LID."""
        nic, verbs = self._nic, self._nic.verbs
        routed = not nic.lid or nic.gid[:SUBNET_BYTES] != remote.gid[:SUBNET_BYTES]
        route = verbs.GlobalRoute(dgid=verbs.GID(text_of(remote.gid)), sgid_index=nic.gid_index, hop_limit=HOP_LIMIT)
        return verbs.AHAttr(port_num=nic.port.number, dlid=remote.lid, is_global=int(routed), gr=route)

    def reset(self) -> None:
        """Forget the connection and all work requests on it, which will not be reported; INIT again.

        Raises:
            TransportError: the device refused.
        """
        self._modify("RESET")
        self._init()

    def fail(self) -> None:
        """Break the connection: all work requests on it are reported as flushed. Raises TransportError."""
        self._modify("ERR")

    @property
    def state(self) -> str:
        """The state that the device reports now: one of STATES. Raises TransportError."""
        with asking(self._nic.port.device, f"tell the state of queue pair {self.number}"):
            attributes, _ = self.pyverbs.query(QP_STATE)
        return STATES[int(attributes.qp_state)]

    def close(self) -> None:
        """Destroy the queue pair. Nothing may post to it meanwhile."""
        self._nic.let_go(self)
        with self._nic.telling, asking(self._nic.port.device, f"close queue pair {self.number}"):
            self.pyverbs.close()

    def _init(self) -> None:
        attributes = self._nic.verbs.QPAttr(port_num=self._nic.port.number)
        attributes.pkey_index = 0
        attributes.qp_access_flags = ACCESS_LOCAL_WRITE | ACCESS_REMOTE_READ | ACCESS_REMOTE_WRITE
        with asking(self._nic.port.device, f"bring queue pair {self.number} to INIT"):
            self.pyverbs.to_init(attributes)

    def _modify(self, state: str) -> None:
        attributes = self._nic.verbs.QPAttr(qp_state=STATES.index(state))
        with asking(self._nic.port.device, f"bring queue pair {self.number} to {state}"):
            self.pyverbs.modify(attributes, QP_STATE)


def _within(nic: Device, what: str, asked: int, most: int) -> None:
    if not 1 <= asked <= most:
        raise TransportError(f"RDMA device {nic.port.device} has room for 1 to {most} {what}, {asked} were asked for")
