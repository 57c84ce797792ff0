"""One rank in virtual time: the product's own state, kernels and NIC, turned by SimPy.

    layer ready --> tasks --> thread: submit ......... waits ........ close --> next task
                                  |  publish              ^  finished
                                  v                       |
                              worker: pump ( take, post, poll, complete, reclaim )
                                         |  post_send, poll_cq
                                         v
                                       NIC in virtual time

A thread takes a layer, submits it, sleeps until it is done, and closes it, as synchronous serving code does. The
worker's `pump` runs ahead of SimPy's clock only as far as nothing else can act on this rank: up to the horizon, or to
the end of a batch. Slices never become SimPy events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simpy

from mooncache.descriptor import Descriptor
from mooncache.errors import Status
from mooncache.kernels import calls, enums, submit
from mooncache.kernels.arrays import address_of
from mooncache.kernels.enums import Kind, Opcode, Policy, Store
from mooncache.kernels.pump import Pump, pump
from mooncache.kernels.reclaim import leak
from mooncache.kernels.reclaim.dispatch import reap
from mooncache.kernels.reclaim.policies import traits_of
from mooncache.kernels.reclaim.traits import FreesIn
from mooncache.kernels.settings import Settings
from mooncache.kernels.state import Block, State
from mooncache.kernels.tables import RegionTable
from mooncache.providers.base import HERE
from mooncache.providers.inprocess import emulated
from mooncache.providers.inprocess import nic as nic_kernels
from mooncache.providers.inprocess.faults import PS_PER_NS
from sim.clock import Environment
from sim.config import Scenario
from sim.costs import Prices

PEER = 0
BASE = 1 << 40  # where the made-up source and target regions begin; no byte of them is ever touched
SPAN = 1 << 44
FOREVER = (1 << 62) - 1
LATE = 2  # SimPy priority of a worker's turn: at the same instant, everybody else acts first
Steps = Generator[simpy.Event, Any, None]


@dataclass
class Layer:
    """One layer of one request on one rank, with the times of its steps (ps)."""

    request: int
    layer: int
    slices: int
    slice_bytes: int
    ready_ps: int
    done: Callable[[Layer], None]
    published_ps: int = 0  # its submit was over
    done_ps: int = 0
    close_ps: int = 0  # what closing it cost the thread


class Figures(NamedTuple):
    """The figures of a rank beside its transfers."""

    busy_ps: int  # worker's time with something to do
    freeing_ps: int  # of that, inside the reclaim policy
    all_freeing_ps: int  # the same of all threads: worker, callers, reaper
    submit_ps: int  # callers' time in submit
    transfer_ps: int  # from a submit's end to the batch's, over all batches
    close_ps: int  # callers' time in close
    closes: int
    high_water_slices: int  # most slices that existed at once
    leaked_slices: int


def nics_of(scenario: Scenario) -> list[emulated.Nic]:
    """Return the scenario's NICs, one a rail."""
    nic = emulated.Nic(
        bits_per_s=scenario.nic.rate,
        messages_per_s=scenario.nic.message_rate,
        latency_ns=scenario.nic.latency / PS_PER_NS,
        move_bytes=False,
        signal=scenario.nic.signal,
        gathers=scenario.nic.gathers,
    )
    return [nic] * scenario.nic.rails


def settings_of(scenario: Scenario, store: str, policy: str) -> Settings:
    """Return the engine settings that the scenario describes."""
    return Settings(
        store=Store[store.upper()],
        policy=Policy[policy.upper()],
        slices=scenario.engine.pool_slices,
        peers=1,
        slice_bytes=scenario.engine.slice_bytes,
        queue_depth=scenario.engine.queue_depth,
        chain=scenario.engine.chain,
        poll_lot=scenario.engine.poll_lot,
        cache_slices=scenario.reclaim.cache_slices,
        reaper_lot=scenario.reclaim.lot,
    )


class VirtualEngine:
    """An engine's state with virtual clocks: one worker, `threads` callers, a reaper, emulated NICs to one peer."""

    def __init__(self, settings: Settings, nics: Sequence[emulated.Nic], prices: Prices, threads: int) -> None:
        self.state = State(settings, virtual=True)
        self.worker = self._block(prices, 0)
        self.callers = [self._block(prices) for _ in range(threads)]
        self.reaper = self._block(prices)
        clock = self.worker.row.where("now")
        self.provider = emulated.Emulated(*nics, clocks=[clock])
        (queues,) = self.provider.open(1, settings.queue_depth, np.zeros(0, np.int64))
        self.state.poll_from(0, queues)
        self.cqs = [queue.address for queue in queues]
        self.worker.row["next_completion"] = nic_kernels.next_completion.address
        self.remote = RegionTable("the decode side")
        keys = self.provider.register(BASE, SPAN, enums.Access.WRITE)
        self.state.regions.add(BASE, SPAN, keys.lkeys, enums.Access.WRITE)
        self.remote.add(BASE, SPAN, keys.rkeys, enums.Access.WRITE)
        peer = Descriptor("decode", 1, "", self.provider.name, (), self.provider.describe())
        self.state.connect(PEER, self.remote, self.provider.connect(peer, HERE))
        self._gathers = max(nic.gathers for nic in nics) > 1
        self._operands: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _block(self, prices: Prices, actor: int = -1) -> Block:
        block = Block(self.state, actor)
        block.row["cost_fixed"] = address_of(prices.fixed)
        block.row["cost_each"] = address_of(prices.each)
        self._prices = prices  # keeps the arrays alive
        return block

    def prepare(self, caller: Block, slices: int, slice_bytes: int) -> int:
        """Fill an open batch of so many scattered slices; returns its handle, or minus a Status."""
        operands = self._operands.get((slices, slice_bytes))
        if operands is None:
            if len(self._operands) > 64:
                self._operands.clear()
            source = BASE + 2 * slice_bytes * np.arange(slices, dtype=np.int64)  # gaps, so that nothing is adjacent
            target = BASE + slice_bytes * np.arange(slices, dtype=np.int64) if self._gathers else source
            operands = self._operands[slices, slice_bytes] = source, target, np.full(1, slice_bytes, np.int64)
        return int(submit.prepare(caller.ctl, PEER, Opcode.WRITE.value, 0, *operands))

    def row(self, handle: int) -> np.ndarray:
        """Return the batch row that a handle names, a record of BATCH."""
        row: np.ndarray = self.state.batch_rows[handle & 0xFFFFFFFF]
        return row

    @property
    def counts(self) -> np.ndarray:
        """The work done by all actors; int64[KINDS]."""
        return sum((b.counters for b in [*self.callers, self.worker, self.reaper]), np.zeros(len(Kind), np.int64))


class Rank:
    """A virtual engine with its threads, worker and reaper as SimPy actors."""

    def __init__(
        self, env: Environment, scenario: Scenario, store: str, policy: str, prices: Prices, wake_ps: int,
        next_ready: Callable[[], int],
    ) -> None:  # fmt: skip
        threads = scenario.engine.submit_threads
        self.env, self.wake_ps, self.next_ready = env, wake_ps, next_ready
        self.engine = VirtualEngine(settings_of(scenario, store, policy), nics_of(scenario), prices, threads)
        self.traits = traits_of(policy)
        self.period_ps = scenario.reclaim.period
        self.tasks = simpy.Store(env)
        self.running: dict[int, simpy.Event] = {}  # handle -> event of its end
        self.ends = [FOREVER] * (threads + 1)  # when each thread, and the reaper, is done with what it does now
        self.starved: deque[simpy.Event] = deque()  # threads that wait for slots
        self.submit_ps = self.transfer_ps = self.close_ps = self.closes = 0
        self.turn_number = 0
        self.asleep = True
        self.reaping: simpy.Event = env.event()
        for index, caller in enumerate(self.engine.callers):
            env.process(self._thread(index, caller))
        if self.traits.needs_reaper:
            env.process(self._reaper())

    @property
    def filled(self) -> int:
        """The slices that went through the kernels."""
        return int(self.engine.counts[Kind.SLICES_FILLED])

    def figures(self) -> Figures:
        """Return the figures of this rank so far."""
        engine, worker, leaked = self.engine, self.engine.worker, int(self.engine.counts[Kind.SLICES_LEAKED])
        return Figures(
            busy_ps=int(worker.spent.sum()),
            freeing_ps=worker.row["time_freeing"],
            all_freeing_ps=sum(block.row["time_freeing"] for block in (*engine.callers, worker, engine.reaper)),
            submit_ps=self.submit_ps,
            transfer_ps=self.transfer_ps,
            close_ps=self.close_ps,
            closes=self.closes,
            high_water_slices=max(leaked, engine.state.high_water_slices),
            leaked_slices=leaked,
        )

    # ------------------------------------------------------------------------------ threads
    def _spend(self, index: int, caller: Block) -> simpy.Event:
        """Let the virtual time that a kernel has just cost its thread pass."""
        end = caller.row["now"]
        self.ends[index] = end
        return self.env.timeout(end - self.env.now)

    def _thread(self, index: int, caller: Block) -> Steps:
        engine, env = self.engine, self.env
        while True:
            self.ends[index] = FOREVER
            task: Layer = yield self.tasks.get()
            while True:
                caller.row["now"] = env.now
                handle = engine.prepare(caller, task.slices, task.slice_bytes)
                if handle >= 0:
                    break
                yield from self._wait_for_slots(index, caller, -handle)
            self.submit_ps += caller.row["now"] - env.now
            yield self._spend(index, caller)
            self.ends[index] = FOREVER
            task.published_ps = env.now
            self.running[handle] = env.event()
            submit.publish(caller.ctl, handle)
            self._ring()
            task.done_ps = yield self.running[handle]
            self.transfer_ps += task.done_ps - task.published_ps
            task.done(task)
            self.ends[index] = env.now + self.wake_ps
            yield env.timeout(self.wake_ps)
            caller.row["now"] = env.now
            calls.close(caller.ctl, handle, False)
            task.close_ps = caller.row["now"] - env.now
            self.close_ps += task.close_ps
            self.closes += 1
            yield self._spend(index, caller)
            self._slots_came_back()
            if self.traits.needs_reaper and not self.reaping.triggered:
                self.reaping.succeed()
            if self.traits.retires and not self.traits.needs_reaper:
                self._ring()

    def _wait_for_slots(self, index: int, caller: Block, status: int) -> Steps:
        if status not in (Status.POOL_EMPTY, Status.BATCHES_EMPTY):
            raise AssertionError(f"submit was refused with {Status(status).name}")  # the scenario was checked before
        if not self.traits.frees and leak.restart(caller.ctl):
            return
        self.ends[index] = FOREVER
        waiting = self.env.event()
        self.starved.append(waiting)
        yield waiting

    def _slots_came_back(self) -> None:
        while self.starved:
            self.starved.popleft().succeed()

    # ------------------------------------------------------------------------------ worker
    def _ring(self) -> None:
        """Give the worker a turn as soon as its last one is over, if it sleeps."""
        if self.asleep:
            self._schedule(max(self.env.now, self.engine.worker.row["now"]))

    def _at(self, time: int) -> simpy.Event:
        """Make an event at a given time, behind all others of that instant."""
        event = simpy.Event(self.env)
        event._ok, event._value = True, None
        self.env.schedule(event, priority=LATE, delay=time - self.env.now)  # type: ignore[arg-type]
        return event

    def _schedule(self, at: int) -> None:
        """Let the worker's next turn be at `at`; a turn that was scheduled before is off."""
        self.turn_number += 1
        self.asleep = False
        number = self.turn_number
        self._at(at).callbacks.append(lambda _: self._turn() if number == self.turn_number else None)

    def _turn(self) -> None:
        worker = self.engine.worker.row
        worker["now"] = max(worker["now"], self.env.now)
        watched = bool(self.starved) and self.traits.frees_in == FreesIn.WORKER  # a turn may free what they want
        worker["horizon"] = 0 if watched else min(self.next_ready(), *self.ends)
        why = pump(self.engine.worker.ctl)
        now = worker["now"]
        if why == Pump.FINISHED:
            self._finish_batches()
        if watched:
            self._at(now).callbacks.append(lambda _: self._slots_came_back())
        if why == Pump.IDLE:
            due = min(int(nic_kernels.next_completion.ready().ctypes(cq)) for cq in self.engine.cqs)
            if due < nic_kernels.NEVER:
                self._schedule(max(due, self.env.now))
            self.asleep = True  # a new batch may still come before `due`
        else:
            self._schedule(now)

    def _finish_batches(self) -> None:
        for handle in list(self.running):
            row = self.engine.row(handle)
            if row["remaining"] == 0:
                at = int(row["finished_at"])
                self.env.process(self._announce(self.running.pop(handle), at))

    def _announce(self, event: simpy.Event, at: int) -> Steps:
        yield self.env.timeout(at - self.env.now)
        event.succeed(at)

    # ------------------------------------------------------------------------------ reaper
    def _reaper(self) -> Steps:
        block = self.engine.reaper
        while True:
            block.row["now"] = self.env.now
            if reap(block.ctl) == 0:
                self.ends[-1] = FOREVER
                self.reaping = self.env.event()
                yield self.reaping
                continue
            yield self._spend(-1, block)
            self._slots_came_back()
            self.ends[-1] = self.env.now + self.period_ps
            yield self.env.timeout(self.period_ps)
