"""Submitting writes and reads: a call becomes a batch at once, or once its peer is connected and slots are free."""

from __future__ import annotations

import logging
from collections.abc import Generator
from time import monotonic_ns
from typing import Any

import numpy as np

from mooncache.batch import NAP_NS, Batch
from mooncache.callers import Callers
from mooncache.errors import CapacityError, Status
from mooncache.inbox import pack
from mooncache.kernels import calls, submit, waits
from mooncache.kernels.enums import Opcode
from mooncache.kernels.reclaim.policies import TRAITS
from mooncache.kernels.state import State
from mooncache.limits import CHUNK_SLICES
from mooncache.operands import Call, Operand, as_arrays, as_words, deadline_at, deadline_ns, refusal
from mooncache.owner import Owner
from mooncache.peer import Peer
from mooncache.peers import Peers
from mooncache.ways import Asked

log = logging.getLogger("mooncache")

PATIENCE_NS = 5 * 10**9  # after which a call that may wait for ever for slots or batch rows says so, once


class Transfers:
    """The maker of batches from an engine's calls. Methods may be called from any thread."""

    def __init__(self, state: State, callers: Callers, peers: Peers) -> None:
        self._state, self._settings, self._callers, self._peers = state, state.settings, callers, peers

    def submit(
        self, engine: Owner, opcode: Opcode, peer: str | Peer, local: Operand, remote: Operand, length: Operand,
        timeout: float | None, notify: bytes | str | None,
    ) -> Batch:  # fmt: skip
        """Submit a call of `engine`; blocks as `Engine.write` says, and raises what that does.

        `local` and `remote` are what the kernels call source and target: a read's bytes flow the other way.
        """
        call = self._call(engine, opcode, peer, local, remote, length, timeout, notify)
        done = self._attempt(engine, call)
        if done is None:
            steps = self._attempts(engine, call)
            try:
                while True:
                    self._wait(next(steps), call)
            except StopIteration as last:
                done = last.value
        return done

    async def asubmit(self, engine: Owner, *arguments: Any) -> Batch:
        """Submit from a coroutine, which awaits what `submit` waits for."""
        call = self._call(engine, *arguments)
        done = self._attempt(engine, call)
        if done is None:
            steps = self._attempts(engine, call)
            try:
                while True:
                    await self._await(engine, next(steps), call)
            except StopIteration as last:
                done = last.value
        return done

    def _call(
        self, engine: Owner, opcode: Opcode, peer: str | Peer, local: Operand, remote: Operand, length: Operand,
        timeout: float | None, notify: bytes | str | None,
    ) -> Call:  # fmt: skip
        if engine.closed:
            engine.check_open()
        name, given = (peer, None) if isinstance(peer, str) else (self._peers.own(peer).name, peer)
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

    def _attempt(self, engine: Owner, call: Call) -> Batch | None:
        """Try to submit; return None if the kernel refuses, or the peer has to be connected to first."""
        to = self._peers.known.get(call.peer)
        if to is None or (to.name != call.peer and to.gone):  # two names of one engine may be of two later on
            return None
        breaks = to.breaks
        handle = call.kernel(self._callers.ctl, to.handle, int(call.opcode), call.deadline, *call.operands)
        return Batch(engine, handle, to, call.requests, call.noted, breaks) if handle >= 0 else None

    # ------------------------------------------------------------------------------ when the first attempt fails
    def _attempts(self, engine: Owner, call: Call) -> Generator[Asked | int, None, Batch]:
        """Yield what has to be waited for before the next attempt: a way to the peer, or the value of the capacity bell
        that must change. Raises the error if waiting does not help.
        """
        ctl, looked, connects, told = self._callers.ctl, False, 0, False
        since = monotonic_ns()
        while True:
            engine.check_open()
            if call.given is not None:
                self._peers.own(call.given)  # unless it was forgotten meanwhile
            to = self._peers.known.get(call.peer)
            if to is None or (to.name != call.peer and to.gone and connects == 0):
                connects += 1
                yield self._peers.ask(call.peer)
                continue
            bell = waits.capacity_bell(ctl)  # read before the attempt, so that what comes back meanwhile is not missed
            breaks = to.breaks
            handle = int(call.kernel(ctl, to.handle, int(call.opcode), call.deadline, *call.operands))
            if handle >= 0:
                return Batch(engine, handle, to, call.requests, call.noted, breaks)
            status = Status(-handle)
            if status in (Status.POOL_EMPTY, Status.BATCHES_EMPTY):
                self._check_patience(engine, status, call.deadline)
                if not told and not call.deadline and monotonic_ns() - since > PATIENCE_NS:
                    told = True
                    log.warning("%s: a call without a timeout waits for them", self._too_few(engine, status))
                yield bell
            elif status in (Status.TARGET_NOT_REGISTERED, Status.ACCESS_DENIED) and not looked:
                looked = True
                yield self._peers.ask(call.peer, news=True)
            elif status == Status.STALE_PEER:
                continue  # its row is another's now, or it has another
            elif status == Status.PEER_GONE and connects < 2:
                connects += 1
                yield self._peers.ask(call.peer)
            else:
                raise refusal(
                    status, call.opcode, calls.refused_request(ctl), call.operands[:3], self._state.regions, to.table,
                    self._settings.chunks * CHUNK_SLICES,
                )  # fmt: skip

    def _check_patience(self, engine: Owner, status: Status, deadline: int) -> None:
        """Raise CapacityError when there is no use in waiting for slots or batch rows, or no time."""
        policy = self._settings.policy
        if not TRAITS[policy].frees:
            why = f"the {policy.name.lower()} policy never frees any"
        elif deadline and monotonic_ns() >= deadline:
            why = "none came back before the timeout"
        else:
            self._callers.drop_caches_left_behind()
            return
        raise CapacityError(f"{self._too_few(engine, status)}; {why}")

    def _too_few(self, engine: Owner, status: int) -> str:
        what, setting = ("batch rows", "batches") if status == Status.BATCHES_EMPTY else ("slots", "slices")
        held = int(np.count_nonzero(self._state.batch_rows["state"]))
        return (
            f"too few free {what}: {engine!r}, {held} of {self._settings.batches} batches are open; close finished "
            f"ones, or give the engine more `{setting}`"
        )

    def _wait(self, awaited: Asked | int, call: Call) -> None:
        if isinstance(awaited, Asked):
            awaited.result(deadline_at(call.deadline, call.timeout))
        else:
            left = min(NAP_NS, call.deadline - monotonic_ns()) if call.deadline else NAP_NS
            waits.wait_capacity(self._callers.ctl, awaited, max(1, left))

    async def _await(self, engine: Owner, awaited: Asked | int, call: Call) -> None:
        if isinstance(awaited, Asked):
            await awaited.aresult(deadline_at(call.deadline, call.timeout))
        else:
            left_s = (call.deadline - monotonic_ns()) / 1e9 if call.deadline else None
            await engine.awaiting.room(awaited, left_s)
