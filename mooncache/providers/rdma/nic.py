"""One opened port of an RDMA device, and the memory that the device may reach through it."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import ExitStack
from threading import Lock
from typing import Any, NamedTuple

from mooncache import forks
from mooncache.kernels.enums import Access
from mooncache.providers.rdma.device import Closable, Limits
from mooncache.providers.rdma.failure import asking, refused
from mooncache.providers.rdma.gids import text_of
from mooncache.providers.rdma.library import ACCESS_LOCAL_WRITE, ACCESS_REMOTE_READ, ACCESS_REMOTE_WRITE, load
from mooncache.providers.rdma.pointers import (
    CONTEXT_ASYNC_FD,
    CONTEXT_CMD_FD,
    MR_LKEY,
    MR_RKEY,
    QP_NUMBER,
    context_pointer,
    half,
    operations,
    pd_pointer,
)
from mooncache.providers.rdma.ports import Choice
from mooncache.providers.rdma.queues import Channel, CompletionQueue, QueuePair

EVENTS = (  # by value of ibv_event_type
    *("CQ_ERR", "QP_FATAL", "QP_REQ_ERR", "QP_ACCESS_ERR", "COMM_EST", "SQ_DRAINED", "PATH_MIG", "PATH_MIG_ERR"),
    *("DEVICE_FATAL", "PORT_ACTIVE", "PORT_ERR", "LID_CHANGE", "PKEY_CHANGE", "SM_CHANGE", "SRQ_ERR"),
    *("SRQ_LIMIT_REACHED", "QP_LAST_WQE_REACHED", "CLIENT_REREGISTER", "GID_CHANGE", "WQ_FATAL"),
)
OF_QUEUE_PAIRS = frozenset(EVENTS[1:8]) | {"QP_LAST_WQE_REACHED"}

UNDRIVEN = (
    "is its user-space driver installed (Debian: apt-get install ibverbs-providers), and is /dev/infiniband passed "
    "into the container?"
)


class Event(NamedTuple):
    """An event of the device.

    Attributes:
        name: of the `ibv_event_type`, such as "PORT_ERR" or "QP_FATAL".
        subject: number of the queue pair or of the port, address of the completion queue; 0 for the whole device.
    """

    name: str
    subject: int


class Registration:
    """Memory that the device may reach, until `close`. Made by `Nic.register` and `Nic.register_dmabuf`.

    Attributes:
        lkey: what this end's work requests show.
        rkey: what peers' work requests show.
    """

    def __init__(self, nic: Nic, mr: int) -> None:
        self._nic = nic
        self._mr = mr
        self.lkey = half(mr + MR_LKEY)
        self.rkey = half(mr + MR_RKEY)
        nic.hold(self)

    def close(self) -> None:
        """Withdraw it. When this returns the device does not touch the memory any more. Raises TransportError."""
        mr, self._mr = self._mr, 0
        self._nic.let_go(self)
        if mr and (code := self._nic.verbs.c.ibv_dereg_mr(mr)):
            raise refused(self._nic.port.device, f"withdraw a registration (lkey {self.lkey:#x})", code)


class Nic:
    """One opened port: a context, a protection domain, and all that is made from them.

    Everything made here is closed with it, the newest first; before that by its own `close`. Calls may come from
    several threads as long as each resource is made, used and closed by one at a time.

    Attributes:
        port, gid, gid_index: as chosen.
        lid: of the port on InfiniBand; 0 on Ethernet.
        mtu: bytes of payload in a packet.
        limits: what the device can hold.
        operations: addresses of its driver's functions.
        async_fd: readable when `next_event` has something to tell.
        telling: held from taking an event to acknowledging it, and to destroy a queue: libibverbs waits there for the
            queue's events to be acknowledged, and pyverbs lets no other Python thread do that meanwhile.
        verbs, context, pd, context_address, pd_address: for the queues.
    """

    def __init__(self, choice: Choice) -> None:
        """Open it. Raises TransportError: no pyverbs, no access, no driver, the device is gone."""
        self.port, gid = choice
        self.gid, self.gid_index = gid.gid, gid.index
        self.verbs = load()
        self.telling = Lock()
        self._held: dict[Closable, None] = {}
        with asking(self.port.device, "be opened", {-1: UNDRIVEN}):
            self.context: Any = self.verbs.Context(name=self.port.device)
        try:
            with asking(self.port.device, "be queried"):
                self.pd: Any = self.verbs.PD(self.context)
                device, port = self.context.query_device(), self.context.query_port(self.port.number)
            self.context_address = context_pointer(self.context)
            self.pd_address = pd_pointer(self.pd, self.context_address)
        except BaseException:
            self.context.close()
            raise
        self.lid = int(port.lid) if self.port.link_layer == "InfiniBand" else 0
        self.mtu = 128 << int(port.active_mtu)  # ibv_mtu: 1 is 256 bytes
        self.limits = Limits(
            max_qp_wr=device.max_qp_wr,
            max_sge=device.max_sge,
            max_cqe=device.max_cqe,
            max_mr_size=device.max_mr_size,
            max_rd_atomic=min(device.max_qp_init_rd_atom, device.max_qp_rd_atom),
            max_qp=device.max_qp,
            max_mr=device.max_mr,
            max_msg_sz=port.max_msg_sz,
        )
        self.operations = operations(self.context_address)
        self.async_fd = half(self.context_address + CONTEXT_ASYNC_FD)
        os.set_blocking(self.async_fd, False)
        self._descriptors = [half(self.context_address + CONTEXT_CMD_FD), self.async_fd]
        forks.private(self)

    def disown(self) -> None:
        """Forget the resources in a forked child; they are the parent's, never destroyed here; see `forks.Holder`."""
        channels = [resource.fd for resource in self._held if isinstance(resource, Channel)]
        forks.drop([*self._descriptors, *channels])
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))  # so that pyverbs' objects never end in this process

    def __repr__(self) -> str:
        return f"Nic({self.port.name}, {self.port.link_layer}, GID {text_of(self.gid)}, {len(self._held)} resources)"

    def completion_channel(self) -> Channel:
        """Make a channel that wakes the owners of completion queues. Raises TransportError."""
        return Channel(self)

    def completion_queue(self, entries: int, channel: Channel | None = None) -> CompletionQueue:
        """Make a completion queue of at least `entries` entries. Raises TransportError."""
        return CompletionQueue(self, entries, channel)

    def queue_pair(
        self,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        *,
        send_depth: int,
        recv_depth: int,
        sges: int,
        inline: int,
    ) -> QueuePair:
        """Make a queue pair; its attributes say what the device granted. Raises TransportError.

        Args:
            send_depth, recv_depth: work requests that must fit.
            sges: ranges of memory in a work request that is sent.
            inline: bytes that a work request should be able to carry in itself; less is granted where that is refused.
        """
        return QueuePair(self, send_cq, recv_cq, send_depth, recv_depth, sges, inline)

    # -------------------------------------------------------------- memory
    def register(self, address: int, length: int, access: int) -> Registration:
        """Let the device reach `length` bytes at `address`, which must stay mapped until the registration is closed.

        Pins every page; other Python threads run meanwhile.

        Args:
            access: bits of `enums.Access`; without LOCAL, for read-only memory, the device itself cannot write to it.

        Raises:
            TransportError: the memory cannot be locked, is not mapped, or does not permit such access.
        """
        mr = self.verbs.c.ibv_reg_mr(self.pd_address, address, length, _flags(access))
        return self._registration(mr, f"register {length} bytes at {address:#x} (Access bits {access})")

    def register_dmabuf(self, fd: int, offset: int, length: int, address: int, access: int) -> Registration:
        """Let the device reach memory of another device, such as a GPU's.

        Args:
            fd: of the dma-buf; may be closed afterwards.
            offset: bytes into the dma-buf where the memory begins.
            length: bytes.
            address: by which work requests, here and at peers, will name the first of these bytes.
            access: bits of `enums.Access`.

        Raises:
            TransportError: the device, its driver or the kernel cannot register dma-bufs, or refused this one.
        """
        mr = self.verbs.c.ibv_reg_dmabuf_mr(self.pd_address, offset, length, address, fd, _flags(access))
        what = f"register {length} bytes of a dma-buf for address {address:#x} (Access bits {access})"
        return self._registration(mr, what)

    def _registration(self, mr: int | None, what: str) -> Registration:
        if mr:
            return Registration(self, mr)
        unmapped = "is the whole range mapped, and writable where writing is allowed?"
        too_large = f"{unmapped} The device takes {self.limits.max_mr_size} bytes at most"
        cures = {errno.EFAULT: unmapped, errno.EINVAL: too_large}
        raise refused(self.port.device, what, ctypes.get_errno(), cures)

    # -------------------------------------------------------------- events and the end
    def next_event(self) -> Event | None:
        """Return the device's next event; None when there is none. Does not wait. Raises TransportError."""
        subject_and_type = (ctypes.c_uint64 * 2)()
        with self.telling:
            if self.verbs.c.ibv_get_async_event(self.context_address, subject_and_type):
                if (code := ctypes.get_errno()) in (errno.EAGAIN, errno.EINTR):
                    return None
                raise refused(self.port.device, "tell the next event", code)
            subject, kind = subject_and_type[0], subject_and_type[1] & 0xFFFFFFFF
            name = EVENTS[kind] if kind < len(EVENTS) else f"EVENT_{kind}"
            if name in OF_QUEUE_PAIRS:
                subject = half(subject + QP_NUMBER)
            elif name != "CQ_ERR":
                subject &= 0xFFFFFFFF  # the number of a port is an int
            self.verbs.c.ibv_ack_async_event(subject_and_type)
        return Event(name, subject)

    def hold(self, resource: Closable) -> None:
        """Keep a resource until it is closed, at the latest with this NIC."""
        self._held[resource] = None

    def let_go(self, resource: Closable) -> None:
        """Hold a resource no longer: it closes by itself."""
        self._held.pop(resource, None)

    def close(self) -> None:
        """Close all that was made here, the newest first, and the port. Raises TransportError."""
        with ExitStack() as stack:
            stack.callback(self._close_port)
            for resource in list(self._held):
                stack.callback(resource.close)

    def _close_port(self) -> None:
        self._descriptors.clear()
        with asking(self.port.device, "be closed"):
            self.pd.close()
            self.context.close()


def _flags(access: int) -> int:
    """Return the `ibv_access_flags` for bits of `enums.Access`."""
    pairs = (
        (Access.LOCAL, ACCESS_LOCAL_WRITE),
        (Access.READ, ACCESS_REMOTE_READ),
        (Access.WRITE, ACCESS_REMOTE_WRITE),
    )
    return sum(flag for bit, flag in pairs if access & bit)
