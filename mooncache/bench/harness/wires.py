"""The wires that transfer benches measure: our engine, and other packages in its place, behind one small interface.

A `Wire` is one process's end. The initiator's moves a plan of blocks, the target's lends its memory.
"""

from __future__ import annotations

import base64
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mooncache import Batch, Engine
from mooncache.bench.harness.measure import expect, expect_counts, slots_of, wait_until_quiet
from mooncache.bench.harness.process import ProcessError
from mooncache.errors import UsageError
from mooncache.limits import SLICE_BYTES, TAIL_BYTES
from mooncache.operands import Operand

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Case:
    """One combination of the bench's options."""

    provider: str  # ours, or the name of another package
    transport: str  # what carries the bytes: tcp, shm or loopback; "" until `auto` has chosen
    op: str
    ranks: int
    workers: int
    slices: int
    block: int  # bytes
    layers: int  # batches of a sample, one after another

    @property
    def sample_bytes(self) -> int:
        """The bytes that all ranks together move in a sample."""
        return self.ranks * self.layers * self.slices * self.block


class Plan(NamedTuple):
    """The blocks to move: int64[n] addresses here and at the target, and their length."""

    local: np.ndarray
    remote: np.ndarray
    length: int


class Wire(ABC):
    """One end of a wire. `transfer` is timed; everything that can be prepared is prepared in `plan`."""

    @property
    def transport(self) -> str:
        """The transport that carries the bytes, where only the connected initiator's end knows it; else ""."""
        return ""

    @property
    @abstractmethod
    def address(self) -> str:
        """The address by which the initiator finds this target."""

    @abstractmethod
    def register(self, buffer: np.ndarray) -> None:
        """Make a buffer usable by transfers."""

    @abstractmethod
    def connect(self, address: str) -> None:
        """Connect to the target."""

    @abstractmethod
    def plan(self, op: str, plan: Plan) -> None:
        """Prepare what each `transfer` is to move."""

    @abstractmethod
    def transfer(self) -> None:
        """Move the whole plan; return when the bytes are in the target's memory (of a read: in this end's)."""

    def transfer_one(self, at: int) -> None:
        """Move the plan's block `at` alone."""
        raise UsageError(f"{type(self).__name__} is not measured with single operations")

    def release(self) -> None:  # noqa: B027  (not all hold anything)
        """Release what the last transfer held."""

    def check(self, batches: int, blocks: int) -> None:  # noqa: B027  (not all count)
        """Raise FingerprintError unless this end counted exactly so many batches and blocks."""

    def close(self) -> None:  # noqa: B027  (not all can be closed before their process ends)
        """Close this end."""


def slices_of(length: int) -> int:
    """Return how many slices the engine cuts one request of so many bytes into."""
    return 1 + max(0, -(-(length - SLICE_BYTES - TAIL_BYTES) // SLICE_BYTES))


class Ours(Wire):
    """The engine, with any of its providers."""

    def __init__(self, case: Case, role: str) -> None:
        self.case = case
        slots = slots_of(case.slices * slices_of(case.block)) if role == "initiator" else 1
        self.engine = Engine(f"bench-{role}-{os.getpid()}", provider=case.provider, workers=case.workers, slices=slots)
        self.batch: Batch | None = None

    @property
    def address(self) -> str:
        """The address of the engine; within one process its name."""
        return self.engine.name if self.case.provider == "loopback" else self.engine.address

    @property
    def transport(self) -> str:
        """The transport that the engine's description of its peer names."""
        wire: str = self.engine.describe()["peers"][self.peer.name]
        return wire.partition(",")[0]

    def register(self, buffer: np.ndarray) -> None:
        """Register a buffer with the engine."""
        self.engine.register(buffer)

    def connect(self, address: str) -> None:
        """Connect the engine to the target."""
        self.peer = self.engine.connect(address)

    def plan(self, op: str, plan: Plan) -> None:
        """Prepare operands: `write` takes local and remote addresses, `read` remote and local ones."""
        self.move = self.engine.write if op == "write" else self.engine.read
        ends = (plan.local, plan.remote) if op == "write" else (plan.remote, plan.local)
        self.each = [(*pair, plan.length) for pair in zip(*(end.tolist() for end in ends), strict=True)]
        self.operands: tuple[Operand, Operand, int] = (*ends, plan.length) if len(self.each) > 1 else self.each[0]

    def transfer(self) -> None:
        """Submit the plan as one batch, and wait for it."""
        self.batch = self.move(self.peer, *self.operands)
        self.batch.wait(PATIENCE_S)

    def transfer_one(self, at: int) -> None:
        """Submit one block as a batch, and wait for it."""
        self.batch = self.move(self.peer, *self.each[at])
        self.batch.wait(PATIENCE_S)

    def release(self) -> None:
        """Close the batch."""
        if self.batch is not None:
            self.batch.close()
        self.batch = None

    def check(self, batches: int, blocks: int) -> None:
        """Compare the engine's counters."""
        slices = blocks * slices_of(self.case.block)
        expect_counts(wait_until_quiet(self.engine), slices, batches, "pool", "bulk")

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


class Nothing(Wire):
    """No wire: these processes run a reference only."""

    address = ""

    def register(self, buffer: np.ndarray) -> None:
        """Do nothing."""

    def connect(self, address: str) -> None:
        """Do nothing."""

    def plan(self, op: str, plan: Plan) -> None:
        """Do nothing."""

    def transfer(self) -> None:
        """Do nothing."""


# ------------------------------------------------------------------------------ other packages
class Mooncake(Wire):
    """`mooncake.engine.TransferEngine` over TCP, without a metadata server."""

    def __init__(self, case: Case, role: str) -> None:
        from mooncake.engine import TransferEngine  # type: ignore[import-not-found]

        self.engine: Any = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", case.transport, ""):
            raise ProcessError("mooncake's engine does not initialize")

    @property
    def address(self) -> str:
        """The id of its session."""
        return f"127.0.0.1:{self.engine.get_rpc_port()}"

    def register(self, buffer: np.ndarray) -> None:
        """Register a buffer as one region."""
        if code := self.engine.register_memory(buffer.ctypes.data, buffer.nbytes):
            raise ProcessError(f"mooncake's engine does not register memory: {code}")

    def connect(self, address: str) -> None:
        """Keep the address: the package connects at the first transfer."""
        self.session = address

    def plan(self, op: str, plan: Plan) -> None:
        """Make the lists that the package takes."""
        self.move = getattr(self.engine, f"batch_transfer_sync_{op}")
        self.lists = plan.local.tolist(), plan.remote.tolist(), [plan.length] * plan.local.size

    def transfer(self) -> None:
        """Move the plan by one call."""
        if code := self.move(self.session, *self.lists):
            raise ProcessError(f"mooncake's engine refuses {len(self.lists[0])} slices with {code}")


class Nixl(Wire):
    """A NIXL agent on UCX. Descriptors of all blocks are prepared once, each transfer picks them by index."""

    def __init__(self, case: Case, role: str) -> None:
        from nixl_cu12._api import nixl_agent, nixl_agent_config  # type: ignore[import-not-found]

        # The initiator makes progress while it polls: a thread that polls as well only takes its core away.
        config = nixl_agent_config(enable_prog_thread=role == "target", backends=["UCX"])
        self.agent: Any = nixl_agent(f"{role}-{os.getpid()}", config)
        self.handle: Any = None
        self.lists: tuple[Any, ...] = ()

    @property
    def address(self) -> str:
        """The agent's metadata, as text."""
        return base64.b64encode(self.agent.get_agent_metadata()).decode()

    def register(self, buffer: np.ndarray) -> None:
        """Register a buffer as one region."""
        descriptors = self.agent.get_reg_descs([(buffer.ctypes.data, buffer.nbytes, 0, "")], "DRAM")
        self.agent.register_memory(descriptors)

    def connect(self, address: str) -> None:
        """Learn the target's metadata."""
        self.target = self.agent.add_remote_agent(base64.b64decode(address))

    def plan(self, op: str, plan: Plan) -> None:
        """Prepare both lists of descriptors."""

        def prepared(agent: str, addresses: np.ndarray) -> Any:
            rows = np.zeros((addresses.size, 3), np.uint64)
            rows[:, 0], rows[:, 1] = addresses, plan.length
            return self.agent.prep_xfer_dlist(agent, rows, "DRAM")

        self.op, self.indices = op.upper(), np.arange(plan.local.size, dtype=np.int32)
        self.lists = prepared("NIXL_INIT_AGENT", plan.local), prepared(self.target, plan.remote)

    def transfer(self) -> None:
        """Post the transfer, and poll until it is done."""
        local, remote = self.lists
        self.handle = self.agent.make_prepped_xfer(self.op, local, self.indices, remote, self.indices)
        state = self.agent.transfer(self.handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(self.handle)
        expect("nixl's transfer", state, "DONE")

    def release(self) -> None:
        """Release the transfer's handle."""
        if self.handle is not None:
            self.agent.release_xfer_handle(self.handle)
        self.handle = None

    def close(self) -> None:
        """Release the descriptors; the agent ends with its process."""
        for prepared in self.lists:
            self.agent.release_dlist_handle(prepared)


def open_wire(case: Case, role: str) -> Wire:
    """Open one end of the wire that the case names. Role: initiator or target."""
    others: dict[str, Callable[[Case, str], Wire]] = {
        "": lambda case, role: Nothing(), "mooncake": Mooncake, "nixl": Nixl,
    }  # fmt: skip
    return others.get(case.provider, Ours)(case, role)
