"""What tests of forks share: two engines that have met, and a child that runs a function."""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from types import ModuleType
from typing import Any

from mooncache import Batch, Engine
from mooncache.providers.inprocess.emulated import Emulated, Nic
from tests.helpers import LIMIT, SMALL

PROVIDERS: dict[str, Callable[[], Any]] = {
    "loopback": lambda: "loopback",
    "emulated": lambda: "emulated",
    "breaking": lambda: Emulated(Nic(breaks=True)),
    "tcp": lambda: "tcp",
    "shm": lambda: "shm",
    "auto": lambda: "auto",
}
NBYTES = 1 << 16


class Family:
    """Two engines of this process with a batch that arrived, one that is open, and a notification not fetched."""

    def __init__(self, provider: str, **options: Any) -> None:
        self.here, self.there = (
            Engine(f"{name}-{provider}", provider=PROVIDERS[provider](), **SMALL, **options)
            for name in ("parent", "peer")
        )
        self.data, self.pages = self.here.allocate(NBYTES), self.there.allocate(NBYTES)
        self.data[:] = 7
        self.local, self.remote = self.here.register(self.data), self.there.register(self.pages)
        self.peer = self.here.connect(self.there.name)
        self.batch = self.send(notify=b"not fetched")
        self.send(self.there, self.remote, self.here, self.local).close()

    def send(self, source: Any = None, local: Any = None, to: Any = None, remote: Any = None, **options: Any) -> Batch:
        source, local, to, remote = source or self.here, local or self.local, to or self.there, remote or self.remote
        return source.write(to.name, local.address, remote.address, NBYTES, **options).wait(LIMIT)

    def check(self) -> None:
        """All still works, in both directions."""
        self.pages[:] = 0
        self.send().close()
        assert (self.pages == 7).all()
        self.data[:] = 0
        self.send(self.there, self.remote, self.here, self.local).close()
        assert (self.data == 7).all()
        assert [note.message for note in self.there.notifications()] == [b"not fetched"]
        assert not self.batch.failures
        self.batch.close()

    def close(self) -> None:
        self.here.close()
        self.there.close()


class Child:
    """A fork that runs a function; `result` is what that returned or raised, within the limit."""

    def __init__(self, function: Callable[[], Any]) -> None:
        ours, its = Pipe(duplex=False)
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _report(its, function)
        its.close()
        self._end, self._connection = os.pidfd_open(self.pid), ours

    def result(self) -> Any:
        try:
            assert self._connection.poll(LIMIT), "the child hangs"
            good, value = pickle.loads(self._connection.recv_bytes())
        finally:
            if not select.select([self._end], [], [], LIMIT)[0]:
                os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            os.close(self._end)
            self._connection.close()
        assert os.waitstatus_to_exitcode(status) == 0
        if not good:
            raise value
        return value


def _report(connection: Connection, function: Callable[[], Any]) -> None:
    try:
        said = True, function()
    except BaseException as error:
        said = False, error
    try:
        connection.send_bytes(pickle.dumps(said))
    except BaseException as error:
        connection.send_bytes(pickle.dumps((False, AssertionError(f"{said!r}: {error!r}"))))
    os._exit(0)


# ------------------------------------------------------------------------------ locks
LOCKS = type(threading.Lock()), type(threading.RLock())
OURS = threading.Event, threading.Condition


def _is_ours(thing: object) -> bool:
    name = thing.__name__ if isinstance(thing, ModuleType) else type(thing).__module__
    return name.partition(".")[0] == "mooncache" or isinstance(thing, OURS)


def locks(*roots: object) -> list[Any]:
    """All locks that these lead to, and Mooncache's modules, by way of its own objects and of what they are kept in."""
    left: list[Any] = [*roots, *sys.modules.values()]
    seen: dict[int, object] = {}  # keeps them, so that no other gets their id
    found = []
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, LOCKS):
            found.append(thing)
        elif isinstance(thing, ModuleType) and _is_ours(thing):
            left += vars(thing).values()
        elif _is_ours(thing) or isinstance(thing, dict | list | tuple | set | frozenset | deque):
            left += gc.get_referents(thing)
    return found


@contextmanager
def all_held(*roots: object) -> Iterator[list[Any]]:
    """Meanwhile another thread holds all of these locks that nobody else does; which these are."""
    found, held, let_go = locks(*roots), threading.Event(), threading.Event()
    taken: list[Any] = []

    def hold() -> None:
        taken.extend(lock for lock in found if lock.acquire(blocking=False))
        held.set()
        let_go.wait(LIMIT)
        for lock in taken:
            lock.release()

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(LIMIT)
    try:
        yield taken
    finally:
        let_go.set()
        holder.join(LIMIT)
