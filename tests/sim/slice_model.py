"""A slice-level model of one rank in plain SimPy: every message is a process, every unit of work a timeout.

It is written from the description of the engine (the docstrings of kernels/pump, post, complete, reclaim/*, of
providers/emulated and of sim/rank) and shares no code with it: Python objects, lists and SimPy resources instead of
words, kernels and due times. `tests/sim/test_oracle.py` wants both to agree to the picosecond.

    tasks --> threads: take slots, fill, publish ......... sleep, wake, close
                              |                              ^
                              v                              |
    worker, round by round: take, post whole chains, poll one lot, complete, free; an empty round sleeps
                              |                              ^
                              v                              |
    NIC, a process each message: [message server] --> [byte server] --> latency --> completions, in order

When things count. What a call does to memory that others see (slots taken or given back, a batch handed to the reaper
or to an epoch) counts from the call's start; three things have a tick of their own: a publication, at the end of the
submit; a batch's end, when its last slice is applied; and the bells at the end of a close. A worker's round begins
after everything else that happens at the same tick, takes what is published by then, and polls what has arrived
when the poll has been paid for.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import simpy

from mooncache.kernels.enums import Kind, Policy, Store
from mooncache.limits import CHUNK_SLICES

CHUNK = 256  # slots that are taken and given back together
LATE = 2  # SimPy priority behind all ordinary events of a tick
Steps = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True)
class Spec:
    """One layer: when it is ready, and what it sends."""

    ready_ps: int
    slices: int
    slice_bytes: int


@dataclass(frozen=True)
class Case:
    """Everything a rank needs to know. Times are integer picoseconds."""

    store: Store
    policy: Policy
    layers: tuple[Spec, ...]
    threads: int
    pool_chunks: int
    queue_depth: int
    chain: int
    poll_lot: int
    cache_slices: int
    reaper_lot: int
    reaper_period_ps: int
    wake_ps: int
    message_ps: int
    byte_ps: int
    latency_ps: int
    fixed: dict[Kind, int]
    each: dict[Kind, int]


@dataclass(eq=False)
class Batch:
    """A layer on its way. `live` holds the slices of each of its chunks that are not freed yet."""

    index: int
    slices: int
    slice_bytes: int
    ended: simpy.Event
    unposted: int = 0
    remaining: int = 0
    arrived: int = 0
    live: list[int] = field(default_factory=list)
    end_ps: int = -1
    close_ps: int = -1


@dataclass
class Actor:
    """A thread, the worker or the reaper: what it counted, and the time it spent."""

    spent_ps: int = 0
    counts: Counter[Kind] = field(default_factory=Counter)
    cached_chunks: int = 0  # thread_cache on the pool
    cached_objects: int = 0  # thread_cache on the heap


class Nic:
    """Two servers and a delay; completions come out in the order of the posts."""

    def __init__(self, env: simpy.Environment, case: Case, arrived: Any) -> None:
        self.env, self.case, self.arrived = env, case, arrived
        self.messages, self.bytes = simpy.Resource(env), simpy.Resource(env)
        self.completions: deque[Batch] = deque()

    def post(self, batch: Batch) -> None:
        self.env.process(self._message(batch))

    def _message(self, batch: Batch) -> Steps:
        for server, time in (
            (self.messages, self.case.message_ps),
            (self.bytes, batch.slice_bytes * self.case.byte_ps),
        ):
            with server.request() as turn:
                yield turn
                yield self.env.timeout(time)
        yield self.env.timeout(self.case.latency_ps)
        self.completions.append(batch)
        self.arrived()


class SliceModel:
    """Run a case; afterwards `batches`, `threads`, `worker`, `reaper` and `most_chunks` tell what happened."""

    def __init__(self, case: Case) -> None:
        self.case, self.env = case, simpy.Environment(initial_time=0)
        env = self.env
        self.chain = max(1, min(case.chain, case.queue_depth // 2))
        self.nic = Nic(env, case, self._stir)
        self.threads = [Actor() for _ in range(case.threads)]
        self.worker, self.reaper = Actor(), Actor()
        self.batches = [Batch(i, spec.slices, spec.slice_bytes, env.event()) for i, spec in enumerate(case.layers)]
        self.tasks = simpy.Store(env)
        self.free_chunks = self.fewest_chunks = case.pool_chunks
        self.leaked_chunks = 0
        self.starved: list[simpy.Event] = []
        self.waits_for_slots = 0
        self.published: list[Batch] = []
        self.queue: deque[Batch] = deque()
        self.outstanding = 0
        self.retired: list[Batch] = []
        self.bells = 0
        self.stirred = env.event()
        self.reaper_bell = env.event()
        env.process(self._feed())
        for thread in self.threads:
            env.process(self._thread(thread))
        env.process(self._work())
        if case.policy == Policy.DEFERRED:
            env.process(self._reap())

    def run(self) -> SliceModel:
        self.env.run()
        return self

    @property
    def most_chunks(self) -> int:
        return self.case.pool_chunks - self.fewest_chunks

    @property
    def counts(self) -> Counter[Kind]:
        return sum((actor.counts for actor in (*self.threads, self.worker, self.reaper)), Counter())

    # ------------------------------------------------------------------------------ time
    def _spend(self, actor: Actor, *work: tuple[Kind, int]) -> Steps:
        """Do so much of each kind of work. Of two actors done at the same tick the one that began first goes first."""
        total = 0
        for kind, n in work:
            actor.counts[kind] += n
            total += self.case.fixed.get(kind, 0) + n * self.case.each.get(kind, 0)
        actor.spent_ps += total
        yield self.env.timeout(total)

    def _after_all_others(self) -> simpy.Event:
        """An event at this tick, behind the ordinary ones."""
        event = simpy.Event(self.env)
        event._ok, event._value = True, None
        self.env.schedule(event, priority=LATE)
        return event

    # ------------------------------------------------------------------------------ slots
    def _take_slots(self, thread: Actor, batch: Batch) -> bool:
        needed = -(-batch.slices // CHUNK)
        own = min(needed, thread.cached_chunks)
        if needed - own > self.free_chunks:
            return False
        thread.cached_chunks -= own
        self.free_chunks -= needed - own
        self.fewest_chunks = min(self.fewest_chunks, self.free_chunks)
        batch.live = [min(CHUNK, batch.slices - CHUNK * i) for i in range(needed)]
        return True

    def _give_back(self, batch: Batch) -> None:
        self.free_chunks += len(batch.live)
        batch.live = []

    def _slots_came_back(self) -> None:
        for waiting in self.starved:
            waiting.succeed()
        self.starved = []

    # ------------------------------------------------------------------------------ threads
    def _feed(self) -> Steps:
        for batch, spec in zip(self.batches, self.case.layers, strict=True):
            yield self.env.timeout(spec.ready_ps - self.env.now)
            yield self.tasks.put(batch)

    def _thread(self, thread: Actor) -> Steps:
        while True:
            batch = yield self.tasks.get()
            yield from self._slots(thread, batch)
            yield from self._fill(thread, batch)
            self.published.append(batch)
            self._ring()
            yield batch.ended
            yield self.env.timeout(self.case.wake_ps)
            yield from self._close(thread, batch)
            batch.close_ps = self.env.now

    def _slots(self, thread: Actor, batch: Batch) -> Steps:
        while not self._take_slots(thread, batch):
            if self.leaked_chunks:  # a leaking process that is out of memory is started anew
                self.free_chunks, self.leaked_chunks = self.free_chunks + self.leaked_chunks, 0
                continue
            self.waits_for_slots += 1
            self.starved.append(self.env.event())
            yield self.starved[-1]

    def _fill(self, thread: Actor, batch: Batch) -> Steps:
        batch.unposted = batch.remaining = batch.slices
        objects = []
        for n in batch.live if self.case.store == Store.HEAP else ():
            reused = min(n, thread.cached_objects)
            thread.cached_objects -= reused
            objects += [(Kind.HEAP_REUSED, reused)] if reused else []
            objects += [(Kind.HEAP_ALLOCATED, n - reused)]
        yield from self._spend(
            thread,
            (Kind.CHUNKS_ACQUIRED, len(batch.live)),
            *objects,
            (Kind.BATCHES_SUBMITTED, 1),
            (Kind.REQUESTS, batch.slices),
            (Kind.SLICES_FILLED, batch.slices),
        )

    def _close(self, thread: Actor, batch: Batch) -> Steps:
        policy, heap = self.case.policy, self.case.store == Store.HEAP
        work: list[tuple[Kind, int]] = [(Kind.BATCHES_CLOSED, 1)]
        if policy == Policy.LEAK:
            work += [(Kind.SLICES_LEAKED, batch.slices)]
            self.leaked_chunks += len(batch.live)
            batch.live = []
        elif policy in (Policy.DEFERRED, Policy.EPOCH):
            work += [(Kind.RETIRED, 1)]
            self.retired.append(batch)
        elif policy == Policy.BULK:
            work += self._free_whole(batch)
        else:
            for n in batch.live:
                work += [(Kind.SLICES_FREED, n)]
                kept = 0
                if policy == Policy.THREAD_CACHE and heap:
                    kept = min(n, self.case.cache_slices - thread.cached_objects)
                    thread.cached_objects += kept
                    work += [(Kind.HEAP_CACHED, kept)]
                if heap:
                    work += [(Kind.HEAP_FREED, n - kept)]
                elif policy == Policy.THREAD_CACHE and (thread.cached_chunks + 1) * CHUNK <= self.case.cache_slices:
                    thread.cached_chunks += 1
                    self.free_chunks -= 1  # `_give_back` below counts it
            self._give_back(batch)
        yield from self._spend(thread, *work)
        self._slots_came_back()
        if policy == Policy.DEFERRED and not self.reaper_bell.triggered:
            self.reaper_bell.succeed()
        if policy == Policy.EPOCH:
            self._ring()

    def _free_whole(self, batch: Batch) -> list[tuple[Kind, int]]:
        work = [(Kind.SLICES_DROPPED, batch.slices)]
        if self.case.store == Store.HEAP:
            work += [(Kind.HEAP_FREED, n) for n in batch.live]
        work += [(Kind.CHUNKS_FREED, len(batch.live))]
        self._give_back(batch)
        return work

    # ------------------------------------------------------------------------------ worker
    def _ring(self) -> None:
        self.bells += 1
        self._stir()

    def _stir(self) -> None:
        if not self.stirred.triggered:
            self.stirred.succeed()

    def _work(self) -> Steps:
        while True:
            yield self._after_all_others()
            bells, retired = self.bells, list(self.retired)
            happened = yield from self._take()
            happened += yield from self._post()
            if self.outstanding:
                happened += yield from self._poll()
            if not happened and self.case.policy == Policy.EPOCH:
                happened = yield from self._free_epochs(retired)
            if not happened and self.bells == bells:
                self.stirred = self.env.event()
                yield self.stirred

    def _take(self) -> Steps:
        taken, self.published = self.published, []
        for batch in taken:
            yield from self._spend(self.worker, (Kind.BATCHES_TAKEN, 1))
            self.queue.append(batch)
        return len(taken)

    def _post(self) -> Steps:
        posted = 0
        while self.queue:
            batch = self.queue[0]
            n = min(self.chain, batch.unposted)
            if n > self.case.queue_depth - self.outstanding:
                break
            yield from self._spend(self.worker, (Kind.WORK_REQUESTS, n), (Kind.DOORBELLS, 1))
            for _ in range(n):
                self.nic.post(batch)
            self.outstanding += n
            posted += n
            batch.unposted -= n
            if batch.unposted == 0:
                self.queue.popleft()
        return posted

    def _poll(self) -> Steps:
        yield from self._spend(self.worker, (Kind.POLLS, 1))
        yield self._after_all_others()
        arrived = self.nic.completions
        lot = [arrived.popleft() for _ in range(min(self.case.poll_lot, len(arrived)))]
        if lot:
            yield from self._spend(self.worker, (Kind.COMPLETIONS, len(lot)))
        for batch, run in groupby(lot):
            left = len(list(run))
            while left > 0:  # side by side in one chunk: what is answered in one go
                n = min(left, CHUNK_SLICES - (batch.slices - batch.remaining) % CHUNK_SLICES)
                yield from self._complete(batch, n)
                left -= n
        return len(lot)

    def _complete(self, batch: Batch, n: int) -> Steps:
        self.outstanding -= n
        yield from self._spend(self.worker, (Kind.COMPLETED, n))
        batch.remaining -= n
        if self.case.policy == Policy.INLINE:
            yield from self._spend(self.worker, (Kind.SLICES_FREED, n))
            if self.case.store == Store.HEAP:
                yield from self._spend(self.worker, (Kind.HEAP_FREED, n))
            batch.arrived += n
            while batch.live and batch.arrived >= batch.live[0]:  # in order, so the first chunk is free first
                batch.arrived -= batch.live.pop(0)
                self.free_chunks += 1
        if batch.remaining == 0:
            yield from self._spend(self.worker, (Kind.BATCHES_FINISHED, 1))
            batch.end_ps = self.env.now
            batch.ended.succeed()

    def _free_epochs(self, retired: list[Batch]) -> Steps:
        """Free what was retired before this round began: no round can still hold it."""
        for batch in retired:
            self.retired.remove(batch)
            yield from self._spend(self.worker, *self._free_whole(batch))
        return len(retired)

    # ------------------------------------------------------------------------------ reaper
    def _reap(self) -> Steps:
        while True:
            work: list[tuple[Kind, int]] = []
            freed = 0
            while self.retired and freed < self.case.reaper_lot:
                batch = self.retired[0]
                n = batch.live.pop(0)
                self.free_chunks += 1
                freed += n
                work += [(Kind.SLICES_FREED, n)]
                work += [(Kind.HEAP_FREED, n)] if self.case.store == Store.HEAP else []
                if not batch.live:
                    self.retired.pop(0)
            if freed == 0:
                self.reaper_bell = self.env.event()
                yield self.reaper_bell
                continue
            yield from self._spend(self.reaper, *work)
            self._slots_came_back()
            yield self.env.timeout(self.case.reaper_period_ps)
