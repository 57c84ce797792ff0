"""Forks: a child has nothing of its parent's engines, whatever it does, and the parent does not notice it."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mooncache import Batch, CapacityError, Engine, EngineClosed, EngineInherited, Inbox, Region
from mooncache.discovery import dial
from tests.family import NBYTES, PROVIDERS, Child, Family, all_held
from tests.helpers import LIMIT, ROOT, SMALL, until
from tests.servers import Server

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def descriptors() -> dict[int, str]:
    """The sockets, memory and the like that this process has open. Not files, which any thread may just read."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # it was that of this look
            continue
    return {number: what for number, what in found.items() if not os.path.isfile(what)}


# ------------------------------------------------------------------------------ what a child is refused
SILENT = {
    "Engine": {"close", "aclose", "disown", "supersede", "retract_from"},  # nothing to close; not for callers
    "Region": set(),
    "Inbox": {"close", "disown"},
    "Batch": set(),
}


def arguments(function: Callable[..., Any], family: Family) -> dict[str, Any]:
    """Good ones for every parameter that must be given."""
    good = {
        "peer": family.there.name, "name": family.there.name, "source": family.local.address,
        "target": family.remote.address, "length": 8, "nbytes": 8, "buffer": np.zeros(8, np.uint8),
        "region": family.local, "timeout": 1,
    }  # fmt: skip
    parameters = inspect.signature(function).parameters.values()
    return {p.name: good[p.name] for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD}


def refused(thing: Any, family: Family) -> list[str]:
    """Public methods of a thing that do not raise EngineInherited."""
    wrong = []
    for name, _ in inspect.getmembers(type(thing), callable):
        if name.startswith("_") or name in SILENT[type(thing).__name__]:
            continue
        try:
            said = getattr(thing, name)(**arguments(getattr(thing, name), family))
            if inspect.iscoroutine(said):
                said = asyncio.run(said)
        except EngineInherited as error:
            if str(os.getppid()) not in str(error) and not isinstance(thing, Inbox):
                wrong.append(f"{name}: {error}")
        except BaseException as error:
            wrong.append(f"{name}: {error!r}")
        else:
            wrong.append(f"{name} returned {said!r}")
    return wrong


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_call_in_a_child_says_whose_the_engine_is_and_changes_nothing_whatever_lock_was_held(families, provider):
    family = families(provider)
    inbox, opened = family.there.notifications(), family.send()

    def call_everything() -> list[str]:
        things: list[Engine | Region | Batch | Inbox] = [family.here, family.there, family.local, opened, inbox]
        wrong = [f"{type(thing).__name__}.{line}" for thing in things for line in refused(thing, family)]
        for use in (
            lambda: opened.quiesced, lambda: opened.slices, lambda: opened.done,
            lambda: list(inbox), lambda: asyncio.run(anext(inbox.__aiter__())),
            lambda: asyncio.run(awaited(opened)),
            lambda: family.here.write(family.peer, family.local.address, family.remote.address, 8),
        ):  # fmt: skip
            with suppress(EngineInherited):
                wrong.append(f"{use()!r} was returned")
        if not all("process" in text for text in (repr(family.here), repr(opened))):
            wrong.append(f"repr: {family.here!r}, {opened!r}")
        with family.here, opened, family.local:  # as when it was forked inside
            pass
        family.here.close()
        return wrong

    async def awaited(batch: Batch) -> None:
        await batch

    with all_held(family.__dict__, opened, inbox) as held:
        assert Child(call_everything).result() == []
    here, peers = family.here, family.here._peers
    own = (here._callers._lock, peers._lock, peers._ways._lock, here._registry._lock, dial._look_ups.lock)
    assert set(map(id, own)) <= set(map(id, held))
    assert not opened.failures
    opened.close()
    family.check()


def test_a_child_is_told_as_a_closed_engine_would(families):
    assert issubclass(EngineInherited, EngineClosed)
    family = families("loopback")
    with pytest.raises(
        EngineInherited,
        match=rf"engine 'parent-loopback' belongs to process {os.getpid()}, .* was forked from: open an engine here",
    ):
        Child(family.here.stats).result()


# ------------------------------------------------------------------------------ what a child has
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_child_has_no_descriptor_and_no_memory_of_a_peer_and_forgetting_the_engines_harms_nobody(families, provider):
    before = descriptors()
    family = families(provider)
    mapped = {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd" in line}

    def look_and_forget() -> Any:
        here = descriptors()
        left = {number: here[number] for number in here.keys() - before.keys() if "pipe" not in here[number]}
        maps = {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd" in line}
        family.__dict__.clear()
        gc.collect()
        return left, len(maps)

    left, maps = Child(look_and_forget).result()
    assert left == {}
    if provider in ("shm", "auto"):  # what is mapped twice, as the peer's memory, is there once only
        assert maps < len(mapped)
    family.check()


def test_a_grandchild_closes_nothing_that_its_parent_opened_since(families):
    families("tcp")

    def open_and_fork() -> bool:
        numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]

        def all_open() -> bool:
            return all(os.fstat(number) for number in numbers)

        return Child(all_open).result()

    assert Child(open_and_fork).result()


@pytest.mark.parametrize("provider", ["tcp", "shm", "loopback"])
def test_a_child_opens_engines_of_its_own_under_the_same_name_and_reaches_its_parent(families, provider):
    family = families(provider)
    address, base = family.there.address, family.remote.address

    def use_own(reaches: str) -> bool:
        with Engine(family.here.name, provider=provider, **SMALL) as own, Engine(provider=provider, **SMALL) as other:
            source, target = own.allocate(NBYTES), other.allocate(NBYTES)
            source[:] = 9
            local, remote = own.register(source), other.register(target)
            own.write(other.name, local.address, remote.address, NBYTES).wait(LIMIT).close()
            if other.address:  # by a name that has to be looked up
                own.connect(other.address.replace("127.0.0.1", "localhost"))
            if reaches:
                own.write(reaches, local.address, base, NBYTES).wait(LIMIT).close()
            return bool((target == 9).all())

    with all_held(family.__dict__):
        assert Child(lambda: use_own("")).result()
    assert Child(lambda: use_own(address)).result()
    assert not address or (family.pages == 9).all()
    family.data[:] = 7
    family.check()


def test_a_child_neither_withdraws_a_name_nor_keeps_the_store(families, server: Server):
    before = descriptors()
    family = families("tcp", discovery=server.url)
    family.here._service._names.watch(lambda *_: None)

    def look_and_forget() -> Any:
        left = [what for number, what in descriptors().items() if number not in before and "pipe" not in what]
        family.__dict__.clear()
        gc.collect()
        return left

    def announced() -> bool:
        return family.here.name in family.there._service._names._generations()

    until(lambda: Child(look_and_forget).result() == [], "no socket left, once the store's threads are connected")
    assert announced()
    family.check()


# ------------------------------------------------------------------------------ how a child ends
ENDS = """
import os, sys, signal, subprocess, multiprocessing, concurrent.futures, gc
import numpy as np
from mooncache import Engine

def nothing():
    return os.getpid()

def main():
    provider, way = {provider!r}, {way!r}
    here, there = Engine("here", provider=provider), Engine("there", provider=provider)
    data, pages = here.allocate(65536), there.allocate(65536)
    data[:] = 7
    local, remote = here.register(data), there.register(pages)
    at = np.arange(32, dtype=np.int64) * 2048
    def send():
        pages[:] = 0
        with here.write("there", local.address + at, remote.address + at, 2048) as batch:
            batch.wait(60)
        assert (pages == 7).all()
        with there.write("here", remote.address, local.address, 64) as batch:
            batch.wait(60)
    send()
    open_batch = here.write("there", local.address, remote.address, 65536)
    if way in ("fork", "forkserver", "spawn"):
        context = multiprocessing.get_context(way)
        process = context.Process(target=nothing)
        process.start()
        process.join(60)
        assert process.exitcode == 0, process.exitcode
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            futures = [pool.submit(nothing) for _ in range(4)]
            send()
            assert os.getpid() not in [future.result(60) for future in futures]
    elif way == "subprocess":
        subprocess.run([sys.executable, "-c", "pass"], check=True, timeout=60)
        subprocess.run([sys.executable, "-c", "pass"], check=True, timeout=60, preexec_fn=lambda: None)
    else:
        pid = os.fork()
        if pid == 0:
            if way == "_exit":
                os._exit(0)
            if way == "forget":
                del here, there, local, remote, open_batch, send
                gc.collect()
            if way == "raise":
                open_batch.wait(5)
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == (1 if way == "raise" else 0), code
    open_batch.wait(60).close()
    for _ in range(5):
        send()
    here.close(), there.close()
    print("unharmed")

if __name__ == "__main__":
    main()
"""


def run_file(script: Path) -> subprocess.CompletedProcess[str]:
    """Run a script that its children import."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "faulthandler", str(script)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}, timeout=2 * LIMIT, check=False,
    )  # fmt: skip


WAYS = ("exit", "_exit", "forget", "raise", "subprocess", "fork", "forkserver", "spawn")


@pytest.mark.parametrize(
    ("provider", "way"), [*(("auto", way) for way in WAYS), *(("tcp", way) for way in ("exit", "forget", "fork"))]
)
def test_however_a_child_is_made_and_ends_its_parent_goes_on(provider, way, tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(ENDS.format(provider=provider, way=way))
    done = run_file(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "unharmed", done.stderr
    told = [line for line in done.stderr.splitlines() if "EngineInherited" in line]
    assert len(told) == (2 if way == "raise" else 0) or (way == "raise" and told), done.stderr
    assert "Exception ignored" not in done.stderr


ORPHAN = """
import os, signal, sys
from mooncache import Engine
engine = Engine("orphans-parent", provider={provider!r})
data = engine.allocate(1 << 20)
print(engine.address, engine.register(data).address, flush=True)
sys.stdin.readline()
pid = os.fork()
if pid == 0:
    os.close(0)
    print(os.getpid(), flush=True)
    signal.pause()
    os._exit(0)
signal.pause()
"""


@pytest.mark.parametrize("provider", ["tcp", "auto"])
def test_a_helper_that_outlives_its_parent_keeps_neither_its_port_nor_its_peers_waiting(engines, provider):
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ORPHAN.format(provider=provider)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    helper = 0
    try:
        address, base = parent.stdout.readline().split()
        here = engines("here", provider=provider)
        data = here.allocate(1 << 20)
        local = here.register(data)
        here.write(address, local.address, int(base), 1 << 20).wait(LIMIT).close()
        print("", file=parent.stdin, flush=True)
        helper = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        until(lambda: here._peers.known[address].gone, "the end of the peer, while its helper lives")
        assert Path(f"/proc/{helper}").exists()
        with Engine("orphans-parent", provider=provider, listen=address, **SMALL) as again:
            pages = again.allocate(1 << 20)
            remote = again.register(pages)
            here.write(address, local.address, remote.address, 1 << 20).wait(LIMIT).close()
    finally:
        parent.kill()
        parent.wait()
        parent.stdin.close()
        parent.stdout.close()
        if helper:
            os.kill(helper, signal.SIGKILL)


# ------------------------------------------------------------------------------ forks at any moment
@pytest.mark.parametrize("provider", ["tcp", "shm"])
def test_forks_in_the_middle_of_transfers_and_of_opening_and_closing_harm_nobody(families, provider):
    family = families(provider)
    stop = threading.Event()
    wrong: list[BaseException] = []

    def move() -> None:
        while not stop.is_set():
            try:
                family.send().close()
            except BaseException as error:
                wrong.append(error)
                return

    def open_and_close() -> None:
        while not stop.is_set():
            try:
                with Engine(provider=provider, **SMALL) as engine:
                    engine.register(engine.allocate(4096))
            except CapacityError as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=move), threading.Thread(target=open_and_close)]
    for thread in threads:
        thread.start()

    def leave() -> bool:
        gc.collect()
        with Engine(provider="loopback", **SMALL):
            return family.here.inherited

    try:
        assert all(Child(leave).result() for _ in range(20))
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT)
    assert wrong == []
    family.check()
