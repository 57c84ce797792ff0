"""What other processes do for tests. Engines, memory and regions have names there; only plain values cross."""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import resource
import socket
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from mooncache import Engine, MooncacheError, TransferFailed
from mooncache.memory import Region
from mooncache.providers.shm.provider import Shm
from mooncache.providers.stream import lane as words
from mooncache.providers.stream.tcp import Tcp
from tests.helpers import SMALL, assert_balanced, random_bytes

engines: dict[str, Engine] = {}
memory: dict[str, np.ndarray] = {}
regions: dict[str, Region] = {}
lines: list[str] = []
listening: list[socket.socket] = []


class Log(logging.Handler):
    """Keeps what the engines say."""

    def emit(self, record: logging.LogRecord) -> None:
        lines.append(f"{record.levelname} {record.getMessage()}")


def serve(connection: Connection) -> None:
    """Run what is asked for, until nobody asks any more."""
    log = logging.getLogger("mooncache")
    log.addHandler(Log())
    log.setLevel(logging.DEBUG)
    while True:
        try:
            function, arguments, options = connection.recv()
        except EOFError:
            break
        try:
            answer: tuple[bool, Any] = True, function(*arguments, **options)
        except TransferFailed as failed:
            answer = False, AssertionError(str(failed))
        except MooncacheError as error:
            answer = False, error
        except BaseException:
            answer = False, AssertionError(traceback.format_exc())
        connection.send(answer)
    hammers.clear()
    atexit._run_exitfuncs()  # closes the engines
    os._exit(0)


class Place(NamedTuple):
    """Registered memory of an engine there."""

    address: str  # of the engine
    base: int
    length: int


# ------------------------------------------------------------------------------ engines and memory
def open_engine(
    name: str = "it", *, provider: str = "tcp", lanes: int = 1, stall_s: float | None = None, **options: Any
) -> str:
    """Returns its address."""
    made = {"tcp": Tcp(lanes), "shm": Shm(lanes=lanes), "auto": Shm(lanes=lanes, elsewhere=True)}[provider]
    engine = engines[name] = Engine(None, provider=made, **{**SMALL, **options})
    if stall_s is not None:
        set_stall(engine, stall_s)
    return engine.address


def set_stall(engine: Engine, seconds: float) -> None:
    """Let connections count as stalled sooner."""
    for port in engine.provider.ports:
        port.row["stall"] = round(seconds * 1e9)


def hold(nbytes: int, *, name: str = "it", mapped: bool = False, seed: int | None = None) -> int:
    """Memory of zeros, or random bytes; allocated so that peers can map it, or not. Returns its address."""
    memory[name] = engines["it"].allocate(nbytes) if mapped else np.zeros(nbytes, np.uint8)
    if seed is not None:
        memory[name][:] = random_bytes(nbytes, seed)
    return int(memory[name].ctypes.data)


def register(
    name: str = "it", *, engine: str = "it", access: str = "both", first: int = 0, last: int | None = None
) -> Place:
    """Memory of that name, or a part of it."""
    region = regions[name] = engines[engine].register(memory[name][first:last], access=access)
    return Place(engines[engine].address, region.address, region.length)


def target(
    nbytes: int, *, mapped: bool = False, seed: int | None = None, access: str = "both", **options: Any
) -> Place:
    """An engine with one registered range."""
    open_engine(**options)
    hold(nbytes, mapped=mapped, seed=seed)
    return register(access=access)


def key(name: str = "it") -> int:
    """That peers must show."""
    return regions[name]._parts[0].keys.rkeys[0]


def unregister(name: str = "it", *, fill: int | None = None) -> None:
    regions.pop(name).unregister()
    if fill is not None:
        memory[name][:] = fill


def free(name: str = "it") -> None:
    del memory[name]


def close(name: str = "it") -> None:
    engines.pop(name).close()


def balanced(name: str = "it") -> None:
    """Close it; everything came back."""
    engine = engines.pop(name)
    engine.close()
    assert_balanced(engine)


def reopen(address: str, *, provider: str, mapped: bool) -> int:
    """Close the engine and open another at its address, with memory of the same size; where that lies."""
    size = memory["it"].size
    close()
    regions.clear()
    memory.clear()
    return target(size, mapped=mapped, provider=provider, listen=address).base


def connect(peer: str) -> None:
    engines["it"].connect(peer)


def step_guard_of(engine: Engine, peer: str) -> None:
    """Begin or end a copy by hand: what worker 0 of the engine does in memory that it shares with a peer."""
    ctypes.c_int64.from_address(engine.provider._shares[peer].guards.address).value += 1


def step_guard(peer: str) -> None:
    step_guard_of(engines["it"], peer)


def speak(version: int) -> None:
    """Frames of another version."""
    words.FRAMES_VERSION = version


def drop_privileges() -> bool:
    """Become nobody; False where that is not possible."""
    if os.getuid() != 0:
        return False
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    return True


def unix() -> str:
    """Name of the engine's Unix socket."""
    return engines["it"]._service.unix


def listen_unix() -> str:
    """A Unix socket of nobody's engine; its name."""
    listening.append(socket.socket(socket.AF_UNIX))
    listening[-1].bind("")
    listening[-1].listen()
    return listening[-1].getsockname()[1:].decode()


def received_from(unix: str) -> bytes:
    """What comes first over a Unix socket, until its other end waits or hangs up."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect("\0" + unix)
        try:
            return sock.recv(1000)
        except ConnectionError:
            return b""


def limit_descriptors(most: int | None) -> None:
    """How many this process may have open; None: as many as at first."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if most is None else most, hard))


def try_connect(peer: str) -> str | None:
    """The error, or None when it went well."""
    try:
        connect(peer)
    except MooncacheError as error:
        return f"{type(error).__name__}: {error}"
    return None


def try_open(provider: str) -> str | None:
    """Open and close an engine; the error, or None when it went well."""
    try:
        open_engine("tried", provider=provider)
        close("tried")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()
    return None


# ------------------------------------------------------------------------------ looking
def describe() -> dict[str, Any]:
    return engines["it"].describe()


def connections() -> int:
    """Of peers to the engine."""
    provider = engines["it"].provider
    live = sum(not lane.free for port in provider.ports for lane in port.lanes)
    return live + len(provider.watcher.sockets)


def read(name: str = "it", first: int = 0, last: int | None = None) -> bytes:
    return memory[name][first:last].tobytes()


def fill(value: int, name: str = "it", first: int = 0, last: int | None = None) -> None:
    memory[name][first:last] = value


def trouble() -> tuple[str, ...]:
    return engines["it"].stats().trouble


def logged(part: str = "") -> list[str]:
    """All lines of the log with this in them."""
    return [line for line in lines if part in line]


class Usage(NamedTuple):
    """What a process holds."""

    descriptors: int
    mappings: int  # of shared memory
    resident: int  # bytes

    def within(self, before: Usage) -> bool:
        """Whether it is no more than before, but for what malloc keeps."""
        return self.descriptors == before.descriptors and self.mappings <= before.mappings


def usage() -> Usage:
    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = sum("/memfd:" in line for line in maps)
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * resource.getpagesize()
    return Usage(len(os.listdir("/proc/self/fd")), mappings, resident)


# ------------------------------------------------------------------------------ transfers
def send(peer: str, base: int, nbytes: int, *, op: str = "write", name: str = "it", timeout: float = 30) -> None:
    """One request between the start of local memory and a peer's range, waited for."""
    engine = engines["it"]
    ends = (regions[name].address, base) if op == "write" else (base, regions[name].address)
    getattr(engine, op)(peer, *ends, nbytes).wait(timeout).close()


running: list[Any] = []


def begin(peer: str, base: int, block: int, *, name: str = "it", by_lanes: bool = False) -> None:
    """Submit all of a local region to a peer's range, block by block; `finish` tells how it ended."""
    engine, region = engines["it"], regions[name]
    if by_lanes:
        through_lanes(engine, peer)
    at = np.arange(0, region.length, block, dtype=np.int64)
    running.append(engine.write(peer, region.address + at, base + at, block))


def finish() -> set[str]:
    """The statuses of the requests that were begun last, "OK" for those that arrived; waits for them."""
    with running.pop() as batch:
        try:
            batch.wait(60)
        except TransferFailed as failed:
            rest = {"OK"} if len(failed.failures) < batch.requests else set()
            return rest | {failure.status.name for failure in failed.failures}
    return {"OK"}


def names() -> list[str]:
    """Of the engines here."""
    return [engine.name for engine in engines.values()]


def through_lanes(engine: Engine, peer: str) -> None:
    """As if the system refused process_vm_writev."""
    engine.connect(peer)
    for queue in engine.provider.queues_of(peer):
        queue.row["pid"] = 0


class Hammer:
    """Transfers between all of a local region and a peer's range, in a thread, until one fails or it is told to stop.

    Reads check that they got `expected` throughout.
    """

    def __init__(self, peer: str, base: int, op: str, name: str, block: int, expected: int | None) -> None:
        self.count, self.error, self.statuses, self.untrue = 0, "", [], 0
        self._engine, self._region = engines["it"], regions[name]
        self._peer, self._base, self._op, self._block, self._expected = peer, base, op, block, expected
        self._memory = memory[name]
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        offsets = np.arange(0, self._region.length - self._block + 1, self._block + 1, dtype=np.int64)
        local, remote = self._region.address + offsets, self._base + offsets
        ends = (local, remote) if self._op == "write" else (remote, local)
        try:
            while not self._stopping:
                with getattr(self._engine, self._op)(self._peer, *ends, self._block) as batch:
                    batch.wait(30)
                self.count += 1
                if self._expected is not None:
                    got = self._memory[: offsets[-1]].reshape(-1, self._block + 1)[:, : self._block]
                    self.untrue += int((got != self._expected).any())
        except TransferFailed as failed:
            self.error, self.statuses = str(failed), sorted({f.status.name for f in failed.failures})
        except MooncacheError as error:
            self.error = f"{type(error).__name__}: {error}"
        except BaseException:
            self.error = traceback.format_exc()

    def end(self) -> tuple[int, str, list[str], int]:
        self._stopping = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "a transfer hangs"
        return self.count, self.error, self.statuses, self.untrue


hammers: list[Hammer] = []


def hammer(
    peer: str, base: int, op: str = "write", *, name: str = "it", block: int = 4095, by_lanes: bool = False,
    expected: int | None = None,
) -> None:  # fmt: skip
    """Begin."""
    if by_lanes:
        through_lanes(engines["it"], peer)
    hammers.append(Hammer(peer, base, op, name, block, expected))


def hammered() -> list[int]:
    """How often each has gone round, so far."""
    return [h.count for h in hammers]


def failed() -> list[str]:
    """Why each has ended, so far."""
    return [h.error for h in hammers]


def end_hammers() -> list[tuple[int, str, list[str], int]]:
    """(rounds, error, statuses of failures, rounds with untrue bytes) of each."""
    ended = [h.end() for h in hammers]
    hammers.clear()
    return ended
