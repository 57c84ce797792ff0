"""The engine: what serving code holds. Its parts: `runtime`, `registry`, `peers`, `transfers`, `service`."""

from __future__ import annotations

import asyncio
import atexit
import logging
import secrets
import threading
import weakref
from contextlib import ExitStack
from functools import partial
from time import monotonic_ns, sleep
from types import TracebackType
from typing import Any

import numpy as np

from mooncache import forks, opening, shortage
from mooncache.actors import JOIN_SECONDS
from mooncache.batch import Batch
from mooncache.callers import Callers
from mooncache.descriptor import Descriptor
from mooncache.directory import directory
from mooncache.errors import EngineClosed, MooncacheError, TransportError, UsageError, came
from mooncache.inbox import Inbox
from mooncache.kernels import calls
from mooncache.kernels.enums import Opcode
from mooncache.memory import Region
from mooncache.operands import Operand, deadline_ns, deadline_of
from mooncache.peer import Peer
from mooncache.peers import Peers
from mooncache.providers.base import Provider
from mooncache.registry import Registry
from mooncache.runtime import Runtime
from mooncache.segments import allocate
from mooncache.service import Service
from mooncache.stats import Stats, collect
from mooncache.transfers import Transfers

log = logging.getLogger("mooncache")

FENCE_S = 1.0
"""The time that `fence` may take: microseconds mostly; some ms where a process that copies shares its core."""


class Engine:
    """An engine moves ranges of registered memory to and from peers.

    Args:
        name: how peers call it; must be unique in the process. Default: "engine-<n>".
        provider: how bytes travel.
            "auto": shared memory to peers of this host, TCP to others; `describe` says which.
            "tcp", "shm": only that.
            "rdma": InfiniBand or RoCE, over every active port; `mooncache.providers.rdma.provider.Rdma` chooses.
            "loopback", "emulated": peers in this process, by copying or over an emulated NIC.
            Or a `Provider` of your own making, not opened yet.
        store: "pool" (struct of arrays) or "heap" (one malloc'ed object a slice, for comparison).
        policy: where finished slices are deleted: leak, inline, on_close, thread_cache, deferred, epoch or bulk.
        listen: "host:port" where peers reach this engine, for tcp, shm and auto; port 0 takes a free one.
        secret: shared by all engines that may talk to each other: text or bytes, at least 6, better 16 random ones.
            Without one, engines of the same user on this host know each other, and listening beyond it is refused.
        insecure: without a secret answer everybody, also beyond this host.
        discovery: "redis://host:port" or "etcd://host:port", where names are announced and looked up. Without it,
            peers are called by "host:port".
        advertise: "host" or "host:port" that peers are told, if it is not that of `listen`: what a port mapping, NAT or
            a load balancer makes of it.
        settings: capacities and limits, see `kernels.settings.Settings`: workers, slices, batches, peers, regions (of
            this engine, and of each peer), notes (notifications kept until they are fetched), note_bytes (of the
            longest), slice_bytes, queue_depth, chain, poll_lot, retries, signal, cache_slices, reaper_lot,
            reaper_period_ns, spin_ns.

    Attributes:
        name: its own.
        address: "host:port" where it answers peers; empty when they are all in this process.

    All methods may be called from any thread, but of the process that opened the engine only: in a forked child they
    raise EngineInherited, and the engine there holds no descriptor.

    Raises:
        UsageError: a setting out of range, a name in use, or an open port without a secret.
        TransportError: the port is in use, the host unknown, or no file descriptor left.
        DiscoveryError: the store of names does not answer.
    """

    def __init__(
        self, name: str | None = None, *, provider: str | Provider = "auto", store: str = "pool",
        policy: str = "bulk", listen: str = "127.0.0.1:0", secret: str | bytes | None = None, insecure: bool = False,
        discovery: str | None = None, advertise: str | None = None, **settings: int,
    ) -> None:  # fmt: skip
        opening.check_texts(name=name, listen=listen, discovery=discovery, advertise=advertise)
        opening.check_name(name)
        self._settings = opening.settings(store, policy, settings)
        with shortage.told("no engine can be opened"):
            self.provider = opening.provider(provider)
        self.closed = self.inherited = False
        self._ended = True  # nothing is there to be ended yet
        self._ending = threading.RLock()  # held while it is closed; a signal handler in the midst of that gets it, too,
        self._busy = False  # and finds it busy
        forks.private(self)
        with shortage.told("no engine can be opened"), ExitStack() as undo:  # if it fails, all is given back
            undo.callback(setattr, self, "closed", True)
            self._runtime = Runtime(self._settings, self.provider)
            undo.callback(self._runtime.close)
            self.awaiting, self._state = self._runtime.awaiting, self._runtime.state
            self._registry = Registry(self._state.regions, self.provider)
            networked = bool(self.provider.descriptors)
            self.name = directory.enter(self, name, opening.own_prefix() if networked else "engine")
            undo.callback(directory.leave, self)
            self._callers = Callers(self.name, self._state)
            self.generation = secrets.randbits(62) + 1
            self._service: Service | None = None
            if networked:
                self._service = Service(self, listen, secret, insecure, discovery, advertise)
                undo.callback(self._service.close)
            self._peers = Peers(self.name, self._runtime, self._callers, self._service)
            self._transfers = Transfers(self._state, self._callers, self._peers)
            undo.callback(lambda: self._runtime.end_idle(self.ctl))
            self._runtime.start(self.name, self._peers.look_where_asked)
            undo.pop_all()
            self._ended = False
            _open.add(self)
        if self._service is not None:
            try:
                self._service.announce()
            except BaseException:
                self.close()
                raise

    @property
    def ctl(self) -> int:
        """The address of the calling thread's control block."""
        try:
            return self._callers.local.ctl  # type: ignore[no-any-return]
        except AttributeError:
            return self._callers.ctl

    # ------------------------------------------------------------------------------ memory
    def allocate(self, nbytes: int, *, huge: bool = False) -> np.ndarray:
        """Allocate zeroed memory that peers on the same host can map, their fastest way; see `memory.allocate`.

        Register it, or parts of it, before use.
        """
        self.check_open()
        return allocate(nbytes, huge=huge)

    def register(self, buffer: Any, *, access: str = "both") -> Region:
        """Register a buffer, so that transfers may use it and peers reach it.

        Args:
            buffer: a contiguous NumPy array, torch tensor (of a GPU too with provider "rdma"), DLPack object, writable
                or read-only buffer, or `(address, length)`. It is kept alive until `Region.unregister` (a pair: by the
                caller; it must be mapped when this is called, and slices in what is unmapped later fail).
            access: what peers may do: "read", "write" or "both". Read-only memory takes "read" only.

        Raises:
            UsageError: not such a buffer, empty, overlapping a registered region, or read-only with write access.
            CapacityError: too many regions. EngineClosed: the engine is closed.

        A NIC pins memory, which may take seconds; pages of `allocate` that were not touched yet are faulted in, some
        tenths of a second a GiB. Peers are answered meanwhile, and other threads go on.
        """
        self.check_open()
        region = self._registry.register(self, buffer, access)
        if self._service is not None:
            self._service.changed()
        return region

    def unregister(self, region: Any) -> None:
        """Withdraw a registration, as `Region.unregister` does."""
        self.check_own()
        if not isinstance(region, Region) or region._engine is not self:
            raise UsageError(f"{came(region)} is not registered with engine {self.name!r}")
        self._registry.unregister(region, self.ctl)
        if self._service is not None:
            self._service.changed()
        self._registry.release(region)

    async def aregister(self, buffer: Any, *, access: str = "both") -> Region:
        """Register in a thread, which goes on with it when this is cancelled: see `regions`."""
        return await asyncio.to_thread(partial(self.register, buffer, access=access))

    async def aunregister(self, region: Any) -> None:
        """Unregister in a thread, which goes on with it when this is cancelled."""
        await asyncio.to_thread(self.unregister, region)

    @property
    def memory(self) -> object:
        """Whoever holds this keeps the engine's arrays in place, also while it is closed."""
        return self._state.memory

    @property
    def regions(self) -> dict[int, Region]:
        """The registered regions, by the slot of their first part."""
        return self._registry.regions

    # ------------------------------------------------------------------------------ peers
    @property
    def address(self) -> str:
        """The address where it answers peers, "host:port"; empty when they are all in this process."""
        return "" if self._service is None else self._service.address

    @property
    def near(self) -> str:
        """The address for others of this machine, who may not reach the advertised one; empty likewise."""
        return "" if self._service is None else self._service.near

    def descriptor(self) -> Descriptor:
        """Return the description that peers get, keys included. Waits for nobody."""
        self.check_own()
        regions = self._registry.described  # before the rest: what they lie in is described, too
        data = self.provider.describe(self._service.unix if self._service is not None else "")
        return Descriptor(self.name, self.generation, self.address, self.provider.name, regions, data)

    def describe(self) -> dict[str, Any]:
        """Describe this engine in plain values: name, address, provider, regions, and the wire to each peer."""
        self.check_own()
        return {
            "name": self.name,
            "generation": self.generation,
            "address": self.address,
            "provider": self.provider.name,
            "regions": [
                {"address": r.address, "length": r.length, "access": r.access} for r in list(self.regions.values())
            ],
            "peers": self._peers.wires,
        }

    def connect(self, name: str, timeout: float | None = None) -> Peer:
        """Connect to the engine called `name`; the same peer every time. `write` and `read` do this by themselves.

        Threads that want the same peer at the same time share one try, and its failure. It goes on without those whose
        timeout has passed, so that the next call may find the peer connected.

        Args:
            name: as its engine calls itself, in this process or in the store of names; or "host:port".
            timeout: seconds. None: until the try has ended, which takes 30 s at most (`ways.CONNECT_S`), 5 s for each
                answer of the peer.

        Raises:
            DiscoveryError: nobody has that name, or it did not prove to know the secret.
            TransportError: it cannot be reached in time, or uses another provider.
            CapacityError: as many peers as the setting `peers` are connected. Those that are gone make room, the one
                connected to longest ago first; `forget` others.
            EngineClosed: this engine is closed, before or meanwhile.
        """
        self.check_open()
        deadline = deadline_of(timeout)
        return self._peers.connected(name) or self._peers.ask(name, patient=False).result(deadline)

    async def aconnect(self, name: str, timeout: float | None = None) -> Peer:
        """Connect from a coroutine, whose event loop goes on meanwhile. Cancelling it leaves the try to others."""
        self.check_open()
        deadline = deadline_of(timeout)
        return self._peers.connected(name) or await self._peers.ask(name, patient=False).aresult(deadline)

    def forget(self, peer: str | Peer) -> None:
        """Forget a peer, and free all that belongs to it: connections, mapped memory, descriptors, its row.

        What is under way to it fails as PEER_GONE, or ends as it would have: blocks until then, and until nothing of it
        can land there any more, 5 s at most. Batches to it stay as they are. Connecting to it again makes a new `Peer`;
        this one is refused from now on.

        Raises:
            UsageError: there is no such peer. EngineClosed: the engine is closed.
            TransportError: something under way did not come back in time. The connection has ended; forget it later.
        """
        self.check_open()
        self._peers.forget(peer)

    async def aforget(self, peer: str | Peer) -> None:
        """Forget a peer from a coroutine, in a thread, which goes on with it when this is cancelled."""
        await asyncio.to_thread(self.forget, peer)

    def supersede(self, name: str, generation: int) -> None:
        """Note that a peer's name is another engine's: the next submit connects anew. What is under way goes on."""
        self._peers.supersede(name, generation)

    # ------------------------------------------------------------------------------ transfers
    def write(
        self, peer: str | Peer, source: Operand, target: Operand, length: Operand, *, timeout: float | None = None,
        notify: bytes | str | None = None,
    ) -> Batch:  # fmt: skip
        """Copy local ranges to a peer, one request per index.

        Args:
            peer: its name, or what `connect` returned.
            source: local addresses, int64[n] C-contiguous, or one integer that holds for all.
            target: addresses at the peer, likewise.
            length: bytes, each at least 1, likewise.
            timeout: seconds, for the whole batch: until then the peer is connected to if it is not yet, slots are
                waited for if too few are free, and slices are posted. What is not answered by then fails as TIMED_OUT,
                within 100 ms whatever the wire does. A connection that carries bytes of it is made anew, and others'
                slices travel again. None: no limit but those of `connect`.
            notify: up to 64 KiB (the setting note_bytes) that the peer's `notifications` gets when all data is in its
                memory, after those of batches submitted to it before. Never sent for a batch that fails. The batch is
                done when the peer has it; with n = 0 it travels alone.

        Returns a running `Batch`, or a finished one when n is 0. The arrays may be reused at once; the ranges belong
        to the transfer until `Batch.quiesced`.

        Raises (nothing is submitted then):
            UsageError: unequal sizes, wrong dtype, a length that is not positive, a byte that is not registered.
            CapacityError: more slices than the pool can hold, or too few free before the timeout.
            TransportError: the peer is unknown, or was not connected in time; within a short pause after a failure
                to connect, that failure at once. DiscoveryError: see `connect`. EngineClosed: the engine is closed.
        """
        return self._transfers.submit(self, Opcode.WRITE, peer, source, target, length, timeout, notify)

    def read(
        self, peer: str | Peer, source: Operand, target: Operand, length: Operand, *, timeout: float | None = None,
        notify: bytes | str | None = None,
    ) -> Batch:  # fmt: skip
        """Copy a peer's ranges here: `source` are addresses at the peer, `target` local ones. Else like `write`."""
        return self._transfers.submit(self, Opcode.READ, peer, target, source, length, timeout, notify)

    async def awrite(
        self, peer: str | Peer, source: Operand, target: Operand, length: Operand, *, timeout: float | None = None,
        notify: bytes | str | None = None,
    ) -> Batch:  # fmt: skip
        """Write from a coroutine: its event loop goes on while the peer is connected to or slots are waited for.

        Cancelled meanwhile, it has submitted nothing.
        """
        return await self._transfers.asubmit(self, Opcode.WRITE, peer, source, target, length, timeout, notify)

    async def aread(
        self, peer: str | Peer, source: Operand, target: Operand, length: Operand, *, timeout: float | None = None,
        notify: bytes | str | None = None,
    ) -> Batch:  # fmt: skip
        """Read from a coroutine, as `awrite` writes."""
        return await self._transfers.asubmit(self, Opcode.READ, peer, target, source, length, timeout, notify)

    def notifications(self) -> Inbox:
        """Return the inbox of notifications: iterate to take out what is there, `async for` to wait for more."""
        self.check_own()
        return self._runtime.inbox

    # ------------------------------------------------------------------------------ pages given to others
    def fence(self, peer: str | Peer, *, timeout: float = FENCE_S) -> int:
        """Let nothing land here any more that a peer has submitted so far: call it before its pages become another's.

        Its connections to this engine end, frames that have not landed are dropped, and its batches fail over there as
        PEER_GONE; what it submits from then on travels over new connections. It works without the peer's help: also
        where that is stopped, dead or out of reach.

        Args:
            peer: its engine's name (as in `Notification.peer`), what it is connected to by, or what `connect` returned.
            timeout: seconds that the call may block. Mostly it takes microseconds.

        Returns how many connections ended; 0 when the peer had none.

        Raises:
            TransportError: a process of this host was stopped in the middle of a copy into these pages, which it would
                finish when it goes on, having no restartable sequences (`kernels/restartable.py`): end it first.
            UsageError: not such a name or timeout. EngineClosed: the engine is closed.
        """
        self.check_open()
        limit_s = ((deadline_ns(timeout) or deadline_ns(FENCE_S)) - monotonic_ns()) / 1e9
        return self._peers.fence(peer, self.generation, limit_s)

    async def afence(self, peer: str | Peer, *, timeout: float = FENCE_S) -> int:
        """Fence a peer in a thread, so that the event loop goes on."""
        return await asyncio.to_thread(partial(self.fence, peer, timeout=timeout))

    def retract_from(self, generation: int, limit_s: float) -> int:
        """Get back what this engine has in flight to an engine of this process that fences it.

        Return how many queue pairs lead there.
        """
        return self._peers.retract_from(generation, limit_s)

    # ------------------------------------------------------------------------------ looking
    def stats(self) -> Stats:
        """Return counters and levels; see `Stats`. Costs some microseconds and disturbs nobody."""
        self.check_own()
        trouble = self.provider.background.trouble + self._runtime.looker.background.trouble
        if self._service is not None:
            trouble += self._service.trouble
        callers, actors = list(self._callers.blocks.values()), self._runtime.actors
        return collect(self._state, callers, actors.workers, actors.reaper, trouble, self.provider.unsettled)

    def __repr__(self) -> str:
        if self.inherited:
            return f"<Engine {self.name!r} of process {self._callers.process}, which this one was forked from>"
        s = self._settings
        state = "closed" if self.closed else f"{self._state.free_slices} of {s.chunks * 256} slots free"
        return (
            f"<Engine {self.name!r} on {self.provider.name}, {s.store.name.lower()} + {s.policy.name.lower()}, "
            f"{len(self.regions)} regions, {len(self._peers.known)} peers, {state}>"
        )

    # ------------------------------------------------------------------------------ the end
    def disown(self) -> None:
        """Close the engine in a forked child without touching anything; see `forks.Holder`.

        No thread gets a control block any more.
        """
        self.closed = self.inherited = self._ended = True
        self._ending = threading.RLock()

    def check_own(self) -> None:
        """Raise EngineInherited in a process that was forked from the engine's."""
        self._callers.check_own()

    def check_open(self) -> None:
        """Raise EngineClosed or EngineInherited when it takes no calls."""
        self.check_own()
        if self.closed:
            raise EngineClosed(f"engine {self.name!r} is closed")

    def close(self) -> None:
        """Cancel what runs, wait for the NIC's last answers, stop the workers. A second close waits for the first.

        Connections on which answers are missing after 5 s are broken. Raises TransportError where a NIC does not answer
        even then; its buffers are not quiesced. A close that an exception of a signal handler interrupts can be called
        again, and is at exit; called by a signal handler in the midst of a close it returns at once, and that one goes
        on. In a process that was forked from the engine's it does nothing.
        """
        self.closed = True
        self._peers.close()  # also waits for one that is being entered
        with self._ending:
            if not self._ended and not self._busy:
                try:
                    self._busy = True
                    self._end()
                finally:
                    self._busy = False

    async def aclose(self) -> None:
        """Close the engine in a thread, which goes on with it when this is cancelled."""
        await asyncio.to_thread(self.close)

    def _end(self) -> None:
        directory.leave(self)
        self._peers.end_tries()
        self._runtime.inbox.close()
        if self._service is not None:
            self._service.close()
        calls.stop(self.ctl)
        while self._state.shared["filling"]:  # threads on their way back from a submit without the GIL
            sleep(0.001)
        self._peers.join(JOIN_SECONDS)
        hanging = self._runtime.stop(self.ctl)
        if hanging:  # the NIC may still use these, and a worker that could not leave as well
            self._ended = True
            _abandoned.append((self._runtime, self._peers))
            raise TransportError(f"{', '.join(hanging)} still wait for the NIC; buffers in flight are not quiesced")
        callers = self._callers.blocks.values()
        self._runtime.drop_caches(callers)
        self._runtime.close()
        self.regions.clear()  # regions, peers and this engine hold each other; batches may be held for long
        self._peers.known.clear()
        self._runtime.release(callers)
        self._ended = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            # Collected in any thread, an engine's own ones as well, at any moment, with any lock held: so that thread
            # must not wait for others. Python lets this one live until it is closed, and waits for that at exit.
            directory.leave(self)
            try:
                threading.Thread(target=self.close, name=f"{self.name}-closing").start()
            except RuntimeError as error:  # the system has none left, or the process is about to end
                log.warning("engine %r was forgotten and cannot be closed (%s): its memory stays", self.name, error)
                _abandoned.append(self)


_abandoned: list[object] = []
_open: weakref.WeakSet[Engine] = weakref.WeakSet()  # until they have ended


@atexit.register
def _close_all() -> None:
    # Senders first, lest they warn of peers that end here as well.
    senders_first = sorted(_open, key=lambda engine: not engine._peers.known)
    for engine in senders_first:
        try:
            engine.close()
        except MooncacheError as error:  # the others are closed all the same
            log.warning("engine %r was not closed in order when the process ended: %s", engine.name, error)
