"""The engine: what serving code holds. Composes state, kernels, worker threads and a provider."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import reprlib
import secrets
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from time import monotonic, monotonic_ns, sleep
from types import TracebackType
from typing import Any

import numpy as np

from mooncache import forks, opening, shortage
from mooncache.awaiting import Awaiting
from mooncache.batch import NAP_NS, Batch
from mooncache.bells import Bells
from mooncache.deadline import Deadline
from mooncache.errors import (
    CapacityError,
    EngineClosed,
    EngineInherited,
    MooncacheError,
    Status,
    TransportError,
    UsageError,
    came,
)
from mooncache.inbox import Inbox, pack
from mooncache.kernels import calls, hand, jit, look, publication, pump, submit
from mooncache.kernels.enums import Opcode, Policy
from mooncache.kernels.reclaim import thread_cache
from mooncache.kernels.state import Block, State
from mooncache.limits import CHUNK_SLICES
from mooncache.looker import Looker
from mooncache.memory import ACCESS, Region, allocate, range_of
from mooncache.operands import (
    Call,
    Operand,
    as_arrays,
    as_words,
    check_called,
    deadline_at,
    deadline_ns,
    deadline_of,
    is_text,
    refusal,
)
from mooncache.peer import Peer, directory
from mooncache.providers.base import HERE, Descriptor, Link, Provider
from mooncache.providers.inprocess.base import InProcessProvider
from mooncache.registry import Registry
from mooncache.service import Service
from mooncache.stats import Stats, collect
from mooncache.ways import Asked, Ways

log = logging.getLogger("mooncache")

JOIN_SECONDS = 5.0
REST_SECONDS = 5.0
ROOM_SECONDS = 0.5  # that a peer which is gone may take to make room for another
PATIENCE_NS = 5 * 10**9  # after which a call that may wait for ever for slots or batch rows says so, once

FENCE_S = 1.0
"""What `fence` may take: microseconds mostly; a copy of a megabyte by a process that has to share its core, some ms."""

SETTLE_S = 1.0
"""What `close` waits for peers to confirm that nothing of broken connections lands any more; they answer within ms."""


class Engine:
    """Moves ranges of registered memory to and from peers.

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
        settings: capacities and limits, see `kernels.state.Settings`: workers, slices, batches, peers, regions (of
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
        self._ending = threading.RLock()  # held while it is closed; again by a signal handler that closes it, too
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._peers: dict[str, Peer] = {}
        self._vacant = list(range(self._settings.peers - 1, -1, -1))  # rows that no peer has
        self._blocks: dict[int, Block] = {}
        self._local = threading.local()
        forks.private(self)
        with shortage.told("no engine can be opened"), ExitStack() as undo:  # if it fails, all is given back
            undo.callback(setattr, self, "closed", True)
            self.awaiting = Awaiting()
            undo.callback(self.awaiting.close)
            self._looker = Looker()
            undo.callback(self._looker.close)
            self._state = State(self._settings, event_fd=self.awaiting.event_fd, look_fd=self._looker.event_fd)
            self._registry = Registry(self._state.regions, self.provider)
            self._workers = [Block(self._state, i) for i in range(self._settings.workers)]
            self._reaper = Block(self._state)
            self._orders = Block(self._state)  # of the thread that looks after connections
            self.awaiting.ctl = self._reaper.ctl
            self._inbox = Inbox(self._settings)
            undo.callback(self._inbox.close)
            s = self._settings
            queues = self.provider.open(s.workers, s.queue_depth, self._inbox.words, s.peers)
            undo.callback(self.provider.close)
            for worker, polled in enumerate(queues):
                self._state.poll_from(worker, polled)
            self._state.worker_rows["trouble_fd"] = self.provider.trouble_fd
            self._bells = Bells(self._state, self.provider.descriptors, spins=self.provider.spins)
            undo.callback(self._bells.close)
            jit.prewarm()
            self._set_turn()
            networked = bool(self.provider.descriptors)
            self.name = directory.enter(self, name, opening.own_prefix() if networked else "engine")
            undo.callback(directory.leave, self)
            self._ways = Ways(self.name)
            self.generation = secrets.randbits(62) + 1
            self._service: Service | None = None
            if networked:
                self._service = Service(self, listen, secret, insecure, discovery, advertise)
                undo.callback(self._service.close)
            self._threads: list[threading.Thread] = []
            undo.callback(self._end_threads)
            self._start_threads()
            undo.pop_all()
            self._ended = False
            _open.add(self)
        if self._service is not None:
            try:
                self._service.announce()
            except BaseException:
                self.close()
                raise

    def _set_turn(self) -> None:
        """Tell all actors, those yet to come as well, how to turn a worker: compiled only now."""
        blocks = (self._reaper, self._orders, *self._workers)
        self._state.template["turn"] = hand.turn_once.address
        for block in blocks:
            block.row["turn"] = hand.turn_once.address

    def _start_threads(self) -> None:
        # The threads hold the blocks, not the engine: one that is forgotten can be collected, which closes it.
        actors = [(f"worker-{i}", pump.pump, block) for i, block in enumerate(self._workers)]
        if self._settings.policy == Policy.DEFERRED:
            actors.append(("reaper", pump.reaper, self._reaper))
        for role, kernel, block in actors:
            thread = threading.Thread(target=kernel, args=(block.ctl,), name=f"{self.name}-{role}", daemon=True)
            self._threads.append(thread)  # first: a signal handler may raise while it is started
            thread.start()
        self._looker.start(self.name, self._look_where_asked)

    def _end_threads(self) -> None:
        """Nothing was ever submitted: let those leave that were started."""
        calls.stop(self.ctl)
        calls.stop_reaper(self.ctl)
        for thread in self._threads:
            if thread.ident is not None:  # else it was never started
                thread.join()
        self._looker.stop()

    # ------------------------------------------------------------------------------ who calls
    @property
    def ctl(self) -> int:
        """Address of the calling thread's control block."""
        try:
            return self._local.ctl  # type: ignore[no-any-return]
        except AttributeError:
            self._local.ctl = self._block_of_thread().ctl
            return self._local.ctl  # type: ignore[no-any-return]

    def _block_of_thread(self) -> Block:
        """A block for a thread that calls for the first time; blocks of threads that ended are used again."""
        self.check_own()
        with self._lock:
            own = threading.current_thread().ident or 0  # also makes a thread that Python did not start known below
            # A new thread may have the number of one that ended.
            ended = own if own in self._blocks else next(iter(self._left_behind()), None)
            block = Block(self._state) if ended is None else self._blocks.pop(ended)
            self._blocks[own] = block
            return block

    def _left_behind(self) -> list[int]:
        """Threads that have ended and left a block behind. Under the lock."""
        alive = {thread.ident for thread in threading.enumerate()}
        return [ident for ident in self._blocks if ident not in alive]

    def _inherit_caches(self) -> None:
        """Give back what threads that have ended keep for themselves, under the policy `thread_cache`."""
        with self._lock:
            for ident in self._left_behind():
                thread_cache.drop(self._blocks[ident].ctl)

    # ------------------------------------------------------------------------------ memory
    def allocate(self, nbytes: int, *, huge: bool = False) -> np.ndarray:
        """Zeroed memory that peers on the same host can map, which is their fastest way; see `memory.allocate`.

        Register it, or parts of it, before use.
        """
        self._check_open()
        return allocate(nbytes, huge=huge)

    def register(self, buffer: Any, *, access: str = "both") -> Region:
        """Let transfers use a buffer, and peers reach it.

        Args:
            buffer: a contiguous NumPy array, torch tensor (of a GPU too with provider "rdma"), DLPack object, writable
                or read-only buffer, or `(address, length)`. It is kept alive until `Region.unregister` (a pair: by the
                caller; it must be mapped when this is called, and slices in what is unmapped later fail).
            access: what peers may do: "read", "write" or "both". Read-only memory takes "read" only.

        Raises:
            UsageError: not such a buffer, empty, overlapping a registered region, or read-only with write access.
            CapacityError: too many regions. EngineClosed: the engine is closed.

        A NIC pins memory, which may take seconds; peers are answered meanwhile, and other threads go on.
        """
        self._check_open()
        if not is_text(access) or access not in ACCESS:
            raise UsageError(f"access must be one of {', '.join(map(repr, ACCESS))}, got {came(access)}")
        memory = range_of(buffer)
        if memory.device and not self.provider.reaches_gpus:
            raise UsageError(
                f"expected memory of the host, got memory of {memory.device}; provider {self.provider.name!r} copies "
                "with the CPU, which cannot reach it: 'rdma' can, or copy it to the host first"
            )
        if not memory.writable and access != "read":
            raise UsageError(f"this {type(buffer).__name__} is read-only; register it with access='read'")
        region = self._registry.register(self, memory, access)
        if self._service is not None:
            self._service.changed()
        return region

    def unregister(self, region: Any) -> None:
        """What `Region.unregister` does."""
        self.check_own()
        if not isinstance(region, Region) or region._engine is not self:
            raise UsageError(f"{came(region)} is not registered with engine {self.name!r}")
        self._registry.unregister(region, self.ctl)
        if self._service is not None:
            self._service.changed()
        self._registry.release(region)

    async def aregister(self, buffer: Any, *, access: str = "both") -> Region:
        """`register` in a thread, which goes on with it when this is cancelled: see `regions`."""
        return await asyncio.to_thread(partial(self.register, buffer, access=access))

    async def aunregister(self, region: Any) -> None:
        """`unregister` in a thread, which goes on with it when this is cancelled."""
        await asyncio.to_thread(self.unregister, region)

    @property
    def regions(self) -> dict[int, Region]:
        """What is registered, by the slot of its first part."""
        return self._registry.regions

    # ------------------------------------------------------------------------------ peers
    @property
    def address(self) -> str:
        """Where it answers peers, "host:port"; empty when they are all in this process."""
        return "" if self._service is None else self._service.address

    @property
    def near(self) -> str:
        """Where it answers others of this machine, who may not reach what it advertises; empty likewise."""
        return "" if self._service is None else self._service.near

    def descriptor(self) -> Descriptor:
        """What peers are told, keys included. Waits for nobody."""
        self.check_own()
        regions = self._registry.described  # before the rest: what they lie in is described, too
        data = self.provider.describe(self._service.unix if self._service is not None else "")
        return Descriptor(self.name, self.generation, self.address, self.provider.name, regions, data)

    def describe(self) -> dict[str, Any]:
        """This engine in plain values: name, address, provider, regions, and how bytes travel to each peer."""
        self.check_own()
        with self._lock:
            return {
                "name": self.name,
                "generation": self.generation,
                "address": self.address,
                "provider": self.provider.name,
                "regions": [
                    {"address": r.address, "length": r.length, "access": r.access} for r in list(self.regions.values())
                ],
                "peers": {peer.name: self.provider.wire(peer.name) for peer in self._peers.values()},
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
        self._check_open()
        deadline = deadline_of(timeout)
        return self._connected(name) or self._ask(name, patient=False).result(deadline)

    async def aconnect(self, name: str, timeout: float | None = None) -> Peer:
        """`connect` for a coroutine, whose event loop goes on meanwhile. Cancelling it leaves the try to others."""
        self._check_open()
        deadline = deadline_of(timeout)
        return self._connected(name) or await self._ask(name, patient=False).aresult(deadline)

    def _connected(self, name: str) -> Peer | None:
        """The peer, if nothing has to be asked of it first."""
        if not is_text(name):
            raise UsageError(
                f"expected a peer's name, its 'host:port', or what this engine's connect() returned, got {came(name)}"
            )
        peer = self._peers.get(name)
        return None if peer is None or self._has_ended(peer) else peer

    def _ask(self, name: str, *, patient: bool = True, news: bool = False) -> Asked:
        check_called(name)
        return self._ways.begin(name, partial(self._reach, name), patient=patient, news=news)

    def _reach(self, name: str, deadline: Deadline) -> Peer:
        """Connect to a peer, or learn what it has registered by now; it may even be another engine, opened under the
        same name. In a thread of `Ways`."""
        while True:
            described = self._look_up(name, deadline)  # asks the peer, so never while holding one's own lock
            peer = self._enter(name, described)
            try:
                if self._meet(peer, described, deadline):
                    return peer
            except BaseException:
                if not peer.connecting.locked():  # or another thread has it yet to find out
                    self._give_back(peer, lambda peer: not peer.met)
                raise

    def _meet(self, peer: Peer, described: Descriptor, deadline: Deadline) -> bool:
        """Connect, or look again; False when the peer was forgotten meanwhile."""
        deadline.waits_for(f"another try to reach peer {peer.name!r}, by another of its names")
        if not peer.connecting.acquire(timeout=deadline.left()):
            raise TimeoutError
        try:
            if not peer.forgotten:
                self._learn(peer, described, deadline)
            return not peer.forgotten
        finally:
            peer.connecting.release()

    def _look_up(self, name: str, deadline: Deadline) -> Descriptor:
        self.check_own()
        if self._service is None:
            return directory.look_up(name, self.provider.name)
        return self._service.look_up(name, deadline)

    def _enter(self, name: str, described: Descriptor) -> Peer:
        """A peer not connected to yet, or one known by another name."""
        while True:
            with self._lock:
                self._check_open()
                known = [p for p in self._peers.values() if p.name == name or p.generation == described.generation]
                if known:
                    self._peers[name] = known[0]
                    return known[0]
                if self._vacant:
                    peer = Peer(self._vacant.pop(), name, self._settings.regions)
                    peer.generation = described.generation
                    self._state.connect(peer.index, peer.table, [])
                    peer.handle = self._state.handle(peer.index)
                    self._peers[name] = peer
                    return peer
                gone = sorted(filter(self._is_gone, set(self._peers.values())), key=lambda peer: peer.met)
            if not any(self._give_back(peer, self._is_gone) for peer in gone):
                raise CapacityError(
                    f"engine {self.name!r} is connected to {self._settings.peers} peers, as many as it may: forget() "
                    "those that are not needed, or open it with more `peers`"
                )

    def _is_gone(self, peer: Peer) -> bool:
        """Whether a peer has to be connected to anew, and nobody is at it."""
        return self._has_ended(peer) and not (peer.connecting.locked() and not peer.met)

    def _has_ended(self, peer: Peer) -> bool:
        """Whether a connection to a peer has ended, or never was, so that it has to be connected to anew."""
        return peer.gone or (peer.met > 0 and not self.provider.connected(peer.name))

    def _look_where_asked(self) -> None:
        """Look again at peers that refused what workers believed they had; each in a thread, which may have to wait."""
        for peer in set(self._peers.values()):
            if number := look.begin(peer.table.header.address):
                try:
                    self._looker.background.start(f"{self.name}-look", partial(self._look, peer, number))
                except BaseException:
                    look.end(self.ctl, peer.table.header.address, number)
                    raise

    def _look(self, peer: Peer, number: int) -> None:
        try:
            self._ask(peer.name, news=True).result(Deadline())
        except MooncacheError as error:
            log.info("peer %r refused a range and could not be asked again: %s", peer.name, error)
        finally:
            if not self.closed:
                look.end(self.ctl, peer.table.header.address, number)

    def _learn(self, peer: Peer, described: Descriptor, deadline: Deadline) -> None:
        dial = HERE.dial if self._service is None else partial(self._service.dial, described.address)
        # Providers keep the link, and their threads do: it must not hold the engine.
        link = Link(peer.table.header, dial, self.name, deadline)
        queue_pairs = self.provider.connect(replace(described, name=peer.name), link)
        if not self._state.fits(peer.index, queue_pairs):
            peer.gone = True  # nothing is submitted meanwhile
            self._await_rest(peer, lambda: True, deadline)
            self._take_rows(peer, self._state.take_rows)
        with self._lock:
            self._check_open()
            peer.refresh(described, calls.oldest_submit(self.ctl, peer.index))
            queues = self._state.connect(peer.index, peer.table, queue_pairs)
            peer.handle = self._state.handle(peer.index)
        self.provider.start(peer.name, queues, self._orders.ctl)
        with self._lock:
            peer.gone, peer.met = False, monotonic()
            superseded = self._service is not None and self._service.superseded(peer.name, peer.generation)
            if superseded or not self.provider.connected(peer.name):  # it broke meanwhile
                peer.gone = True

    def forget(self, peer: str | Peer) -> None:
        """Give back all that belongs to a peer: connections, mapped memory, descriptors, its place among the `peers`.

        What is under way to it fails as PEER_GONE, or ends as it would have: blocks until then, and until nothing of it
        can land there any more, 5 s at most. Batches to it stay as they are. Connecting to it again makes a new `Peer`;
        this one is refused from now on.

        Raises:
            UsageError: there is no such peer. EngineClosed: the engine is closed.
            TransportError: something under way did not come back in time. The connection has ended; forget it later.
        """
        self._check_open()
        known = self._peers.get(peer) if isinstance(peer, str) else self._own(peer)
        if known is None:
            raise UsageError(
                f"engine {self.name!r} is not connected to {came(peer)}; its peers: {reprlib.repr(sorted(self._peers))}"
            )
        self._forget(known, lambda peer: True)

    async def aforget(self, peer: str | Peer) -> None:
        """`forget` for a coroutine, in a thread of its event loop, which goes on with it when this is cancelled."""
        await asyncio.to_thread(self.forget, peer)

    def _give_back(self, peer: Peer, still: Callable[[Peer], bool]) -> bool:
        """`_forget`, where it is no matter if that cannot be done now."""
        try:
            return self._forget(peer, still, ROOM_SECONDS)
        except TransportError:
            return False

    def _forget(self, peer: Peer, still: Callable[[Peer], bool], seconds: float = REST_SECONDS) -> bool:
        """Forget a peer; False if another thread has, or `still` does not hold."""
        with peer.connecting:
            if peer.forgotten or not still(peer):
                return False
            peer.gone = True  # nothing is submitted from here on
            self.provider.disconnect(peer.name)
            self._await_rest(peer, lambda: self.provider.quiet(peer.name), Deadline(seconds))
            self._take_rows(peer, self._state.disconnect)
            self.provider.forget(peer.name)
            with self._lock:
                peer.forgotten = True
                self._peers = {name: known for name, known in self._peers.items() if known is not peer}
                self._vacant.append(peer.index)
        if self._service is not None:
            self._service.forget(peer.name)
        return True

    def _await_rest(self, peer: Peer, quiet: Callable[[], bool], deadline: Deadline) -> None:
        """Return when no batch to a peer is under way, its queue pairs rest, and so says `quiet`."""
        limit = deadline.within(REST_SECONDS)
        limit.waits_for(f"what is under way to peer {peer.name!r}")
        if not limit.until(
            lambda: (
                calls.oldest_submit(self.ctl, peer.index) == calls.NEVER
                and all(row.at_rest for row in self._state.rows_of(peer.index))
                and quiet()
            )
        ):
            raise TransportError(
                f"what is under way to peer {peer.name!r} did not come back within {limit.seconds:.3g} s; try again"
            )
        self._let_workers_turn()

    def _take_rows(self, peer: Peer, take: Callable[[int], object]) -> None:
        """Take a peer's rows, which rest, from the workers."""
        with self._lock:
            self.provider.stop(peer.name, self._state.rows_of(peer.index))
            peer.kept.append(take(peer.index))
        self._let_workers_turn()
        peer.kept.clear()

    def _let_workers_turn(self) -> None:
        """Return when every worker has begun a new round: what was withdrawn before is in nobody's hands."""
        epoch = calls.grace(self.ctl)
        if not Deadline(REST_SECONDS).until(lambda: bool(calls.graced(self.ctl, epoch)), 1e-4):
            raise TransportError(f"workers of engine {self.name!r} do not get on; try again")

    def supersede(self, name: str, generation: int) -> None:
        """A peer's name is another engine's now: the next submit connects anew. What is under way goes on."""
        self._ways.hurry(name)
        peer = self._peers.get(name)
        if peer is not None and peer.generation != generation:
            peer.gone = True

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
        return self._submit(Opcode.WRITE, peer, source, target, length, timeout, notify)

    def read(
        self, peer: str | Peer, source: Operand, target: Operand, length: Operand, *, timeout: float | None = None,
        notify: bytes | str | None = None,
    ) -> Batch:  # fmt: skip
        """Copy a peer's ranges here: `source` are addresses at the peer, `target` local ones. Else like `write`."""
        return self._submit(Opcode.READ, peer, target, source, length, timeout, notify)

    async def awrite(
        self, peer: str | Peer, source: Operand, target: Operand, length: Operand, *, timeout: float | None = None,
        notify: bytes | str | None = None,
    ) -> Batch:  # fmt: skip
        """`write` for a coroutine: its event loop goes on while the peer is connected to or slots are waited for.

        Cancelled meanwhile, it has submitted nothing.
        """
        return await self._asubmit(Opcode.WRITE, peer, source, target, length, timeout, notify)

    async def aread(
        self, peer: str | Peer, source: Operand, target: Operand, length: Operand, *, timeout: float | None = None,
        notify: bytes | str | None = None,
    ) -> Batch:  # fmt: skip
        """`read` for a coroutine, as `awrite`."""
        return await self._asubmit(Opcode.READ, peer, target, source, length, timeout, notify)

    def notifications(self) -> Inbox:
        """What peers have sent along with batches: iterate to take out what is there, `async for` to wait for more."""
        self.check_own()
        return self._inbox

    def _submit(
        self, opcode: Opcode, peer: str | Peer, local: Operand, remote: Operand, length: Operand,
        timeout: float | None, notify: bytes | str | None,
    ) -> Batch:  # fmt: skip
        """`local` and `remote` are what the kernels call source and target: a read's bytes flow the other way."""
        call = self._call(opcode, peer, local, remote, length, timeout, notify)
        done = self._attempt(call)
        if done is None:
            steps = self._attempts(call)
            try:
                while True:
                    self._wait(next(steps), call)
            except StopIteration as last:
                done = last.value
        return done

    async def _asubmit(self, *arguments: Any) -> Batch:
        """`_submit`, which awaits what that waits for."""
        call = self._call(*arguments)
        done = self._attempt(call)
        if done is None:
            steps = self._attempts(call)
            try:
                while True:
                    await self._await(next(steps), call)
            except StopIteration as last:
                done = last.value
        return done

    def _call(
        self, opcode: Opcode, peer: str | Peer, local: Operand, remote: Operand, length: Operand,
        timeout: float | None, notify: bytes | str | None,
    ) -> Call:  # fmt: skip
        if self.closed:
            self._check_open()
        name, given = (peer, None) if isinstance(peer, str) else (self._own(peer).name, peer)
        deadline = deadline_ns(timeout)
        if type(local) is int and type(remote) is int and type(length) is int and notify is None:
            words = as_words(local, remote, length)
            return Call(name, submit.submit_one, opcode, deadline, words, 1, False, timeout, given)
        arrays = as_arrays(local, remote, length)
        requests = max(a.size for a in arrays)
        if notify is None:
            return Call(name, submit.submit, opcode, deadline, arrays, requests, False, timeout, given)
        operands = (*arrays, pack(notify, self._settings.note_bytes))
        return Call(name, submit.submit_noted, opcode, deadline, operands, requests, True, timeout, given)

    def _attempt(self, call: Call) -> Batch | None:
        """The batch, unless the kernel refuses it or the peer has to be connected to first."""
        to = self._peers.get(call.peer)
        if to is None or (to.name != call.peer and to.gone):  # two names of one engine may be of two later on
            return None
        breaks = to.breaks
        handle = call.kernel(self.ctl, to.handle, int(call.opcode), call.deadline, *call.operands)
        return Batch(self, handle, to, call.requests, call.noted, breaks) if handle >= 0 else None

    def _own(self, peer: Any) -> Peer:
        if not isinstance(peer, Peer):
            raise UsageError(f"expected a peer's name, or what this engine's connect() returned, got {came(peer)}")
        if peer.forgotten:
            raise UsageError(f"{peer!r} was forgotten; give its name, or connect() again")
        if self._peers.get(peer.name) is not peer:
            raise UsageError(f"{peer!r} belongs to another engine; give its name, or what this one's connect() returns")
        return peer

    def _attempts(self, call: Call) -> Generator[Asked | int, None, Batch]:
        """A submit was refused, or its peer is not known: yields what has to be waited for before the next attempt (a
        way to the peer, or the value of the capacity bell that must change), or says what is wrong."""
        ctl, looked, connects, told = self.ctl, False, 0, False
        since = monotonic_ns()
        while True:
            self._check_open()
            if call.given is not None:
                self._own(call.given)  # unless it was forgotten meanwhile
            to = self._peers.get(call.peer)
            if to is None or (to.name != call.peer and to.gone and connects == 0):
                connects += 1
                yield self._ask(call.peer)
                continue
            bell = calls.capacity_bell(ctl)  # read before the attempt, so that what comes back meanwhile is not missed
            breaks = to.breaks
            handle = int(call.kernel(ctl, to.handle, int(call.opcode), call.deadline, *call.operands))
            if handle >= 0:
                return Batch(self, handle, to, call.requests, call.noted, breaks)
            status = Status(-handle)
            if status in (Status.POOL_EMPTY, Status.BATCHES_EMPTY):
                self._check_patience(status, call.deadline)
                if not told and not call.deadline and monotonic_ns() - since > PATIENCE_NS:
                    told = True
                    log.warning("%s: a call without a timeout waits for them", self._too_few(status))
                yield bell
            elif status in (Status.TARGET_NOT_REGISTERED, Status.ACCESS_DENIED) and not looked:
                looked = True
                yield self._ask(call.peer, news=True)
            elif status == Status.STALE_PEER:
                continue  # its row is another's now, or it has another
            elif status == Status.PEER_GONE and connects < 2:
                connects += 1
                yield self._ask(call.peer)
            else:
                raise refusal(
                    status, call.opcode, calls.refused_request(ctl), call.operands[:3], self._state.regions, to.table,
                    self._settings.chunks * CHUNK_SLICES,
                )  # fmt: skip

    def _check_patience(self, status: Status, deadline: int) -> None:
        """Raise CapacityError when there is no use in waiting for slots or batch rows, or no time."""
        if self._settings.policy == Policy.LEAK:
            why = "the leak policy never frees any"
        elif deadline and monotonic_ns() >= deadline:
            why = "none came back before the timeout"
        else:
            self._inherit_caches()
            return
        raise CapacityError(f"{self._too_few(status)}; {why}")

    def _too_few(self, status: int) -> str:
        what, setting = ("batch rows", "batches") if status == Status.BATCHES_EMPTY else ("slots", "slices")
        held = int(np.count_nonzero(self._state.batch_rows["state"]))
        return (
            f"too few free {what}: {self!r}, {held} of {self._settings.batches} batches are open; close finished ones, "
            f"or give the engine more `{setting}`"
        )

    def _wait(self, awaited: Asked | int, call: Call) -> None:
        if isinstance(awaited, Asked):
            awaited.result(deadline_at(call.deadline, call.timeout))
        else:
            left = min(NAP_NS, call.deadline - monotonic_ns()) if call.deadline else NAP_NS
            calls.wait_capacity(self.ctl, awaited, max(1, left))

    async def _await(self, awaited: Asked | int, call: Call) -> None:
        if isinstance(awaited, Asked):
            await awaited.aresult(deadline_at(call.deadline, call.timeout))
        else:
            await self.awaiting.room(awaited, (call.deadline - monotonic_ns()) / 1e9 if call.deadline else None)

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
                finish when it goes on, having no restartable sequences (`kernels/restart.py`): end it first.
            UsageError: not such a name or timeout. EngineClosed: the engine is closed.
        """
        self._check_open()
        limit_s = ((deadline_ns(timeout) or deadline_ns(FENCE_S)) - monotonic_ns()) / 1e9
        known = self._peers.get(peer) if isinstance(peer, str) else self._own(peer)
        names = {known.name, known.engine} if known is not None else {str(peer)}
        if self._service is not None:
            return sum(self.provider.fence(name, limit_s) for name in names if name)
        return sum(engine.retract_from(self, limit_s) for engine in directory.engines() if engine.name in names)

    async def afence(self, peer: str | Peer, *, timeout: float = FENCE_S) -> int:
        """`fence`, in a thread, so that the event loop goes on."""
        return await asyncio.to_thread(partial(self.fence, peer, timeout=timeout))

    def retract_from(self, target: Engine, limit_s: float) -> int:
        """An engine of this process fences this one. Returns how many queue pairs lead there."""
        assert isinstance(self.provider, InProcessProvider)
        ours = {peer for peer in self._peers.values() if peer.generation == target.generation}
        for peer in ours:
            publication.rise(peer.table.header.where("epoch"))
        return sum(self.provider.retract(peer.name, limit_s) for peer in ours)

    # ------------------------------------------------------------------------------ looking
    def stats(self) -> Stats:
        """Counters and levels; see `Stats`. Costs some microseconds and disturbs nobody."""
        self.check_own()
        with self._lock:
            callers = list(self._blocks.values())
        trouble = self.provider.background.trouble + self._looker.background.trouble
        if self._service is not None:
            trouble += self._service.trouble
        return collect(self._state, callers, self._workers, self._reaper, trouble, self.provider.unsettled)

    def __repr__(self) -> str:
        if self.inherited:
            return f"<Engine {self.name!r} of process {self._process}, which this one was forked from>"
        s = self._settings
        state = "closed" if self.closed else f"{self._state.free_slices} of {s.chunks * 256} slots free"
        return (
            f"<Engine {self.name!r} on {self.provider.name}, {s.store.name.lower()} + {s.policy.name.lower()}, "
            f"{len(self.regions)} regions, {len(self._peers)} peers, {state}>"
        )

    # ------------------------------------------------------------------------------ the end
    def disown(self) -> None:
        """See `forks.Holder`: as if closed, but without touching anything. No thread gets a control block any more."""
        self.closed = self.inherited = self._ended = True
        self._lock, self._ending, self._local = threading.RLock(), threading.RLock(), threading.local()

    def check_own(self) -> None:
        """Raise EngineInherited in a process that was forked from the engine's."""
        if self.inherited:
            raise EngineInherited(
                f"engine {self.name!r} belongs to process {self._process}, which this one ({os.getpid()}) was forked "
                "from: open an engine here, after the fork, or have multiprocessing 'spawn' its processes"
            )

    def _check_open(self) -> None:
        self.check_own()
        if self.closed:
            raise EngineClosed(f"engine {self.name!r} is closed")

    def close(self) -> None:
        """Cancel what runs, wait for the NIC's last answers, stop the workers. A second close waits for the first.

        Connections on which answers are missing after 5 s are broken. Raises TransportError where a NIC does not answer
        even then; its buffers are not quiesced. A close that an exception of a signal handler interrupts can be called
        again, and is at exit. In a process that was forked from the engine's it does nothing.
        """
        with self._lock:
            self.closed = True
        with self._ending:
            if not self._ended:
                self._end()

    async def aclose(self) -> None:
        """`close` in a thread, which goes on with it when this is cancelled."""
        await asyncio.to_thread(self.close)

    def _end(self) -> None:
        directory.leave(self)
        self._ways.stop()
        self._inbox.close()
        if self._service is not None:
            self._service.close()
        calls.stop(self.ctl)
        while self._state.shared["filling"]:  # threads on their way back from a submit without the GIL
            sleep(0.001)
        self._ways.close(JOIN_SECONDS)
        workers, reapers = self._threads[: len(self._workers)], self._threads[len(self._workers) :]
        hanging = _join(workers, JOIN_SECONDS)
        if hanging:
            self.provider.hang_up()
            hanging = _join(workers, JOIN_SECONDS / 10)
        if hanging:
            calls.abandon(self.ctl)
            _join(workers, JOIN_SECONDS / 10)
        calls.stop_reaper(self.ctl)
        _join(reapers, JOIN_SECONDS)
        self._looker.stop()
        self.awaiting.release()
        if self._ended:  # a signal handler has closed it in the midst of this
            return
        self._ended = True
        if hanging:  # the NIC may still use these, and a worker that could not leave as well
            actors = (self._workers, self._reaper, self._orders)
            _abandoned.append((self._state, actors, self.provider, self._peers, self._bells, self._inbox, self._looker))
            raise TransportError(f"{', '.join(hanging)} still wait for the NIC; buffers in flight are not quiesced")
        for block in [*self._blocks.values(), *self._workers]:
            thread_cache.drop(block.ctl)
        self._looker.close()
        self.provider.settle(SETTLE_S)
        self.provider.close()
        self._bells.close()
        self.awaiting.close()
        with self._lock:  # regions, peers and this engine hold each other; batches may be held for long
            self.regions.clear()
            self._peers.clear()
            self._state.release([*self._blocks.values(), *self._workers, self._reaper, self._orders])
        self._inbox.release()

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
    senders_first = sorted(_open, key=lambda engine: not engine._peers)  # lest they warn of peers that end here as well
    for engine in senders_first:
        try:
            engine.close()
        except MooncacheError as error:  # the others are closed all the same
            log.warning("engine %r was not closed in order when the process ended: %s", engine.name, error)


def _join(threads: list[threading.Thread], seconds: float) -> list[str]:
    """Wait for threads to end, all together for so long; names of those that did not."""
    deadline = monotonic_ns() + round(seconds * 1e9)
    for thread in threads:
        thread.join(max(0.0, (deadline - monotonic_ns()) / 1e9))
    return [thread.name for thread in threads if thread.is_alive()]
