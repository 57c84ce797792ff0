"""The end of a process with transfers in flight, however it comes: soon, in silence, and peers hear of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mooncache import Engine
from tests.helpers import LIMIT, ROOT, until
from tests.wires import there as place

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

SCRIPT = """
import asyncio, contextlib, os, signal, sys, threading
import numpy as np
from mooncache import Engine, EngineClosed, MooncacheError

provider, address, base = {provider!r}, {address!r}, {base}
here = Engine("here", provider=provider, slices=65536, batches=256)
if not address:
    there = Engine("there", provider=provider)
    address, pages = "there", there.allocate(1 << 22)
    base = there.register(pages).address
memory = here.allocate(1 << 22)
local = here.register(memory)
at = np.arange(4096, dtype=np.int64) * 1024

def submit():
    return here.write(address, local.address + at, base + at, 1024)

def submit_for_ever():
    while True:
        with submit() as batch:
            batch.wait()

def ready():
    print("ready", flush=True)

submit().wait(60).close()
flying = [submit() for _ in range(8)]
{body}
"""

BODIES = {
    "signal": "ready()\nsubmit_for_ever()",  # the test sends one
    "handler that exits": """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
ready()
submit_for_ever()
""",
    "handler that closes": """
def end(*_):
    here.close()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
ready()
submit_for_ever()
""",
    "handler while closing": """
for number in (signal.SIGTERM, signal.SIGALRM):
    signal.signal(number, lambda *_: sys.exit(0))
sys.unraisablehook = lambda lost: signal.setitimer(signal.ITIMER_REAL, 0.01)  # in a finalizer, Python drops it
ready()
while True:
    engine = Engine("another", provider=provider, slices=4096, batches=64)
    engine.register(engine.allocate(4096))
    engine.close()
""",
    "end of the script": "ready()",
    "exit": "ready()\nsys.exit(0)",
    "exit in a thread": """
thread = threading.Thread(target=lambda: (submit().wait(), sys.exit(3)))
thread.start()
thread.join()
ready()
""",
    "daemon threads": """
def stubborn():
    while True:
        with contextlib.suppress(MooncacheError):
            submit_for_ever()
for _ in range(3):
    threading.Thread(target=stubborn, daemon=True).start()
submit().wait(60)
ready()
""",
    "daemon threads that wait": """
for batch in flying:
    threading.Thread(target=batch.wait, daemon=True).start()
inbox = here.notifications()
threading.Thread(target=inbox.get, daemon=True).start()
threading.excepthook = lambda args: None if issubclass(args.exc_type, EngineClosed) else sys.__excepthook__(*args[:3])
ready()
""",
    "interrupt": """
try:
    ready()
    submit_for_ever()
except KeyboardInterrupt:
    pass
""",
    "event loop": """
async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    work = [asyncio.ensure_future(move()) for _ in range(3)]
    ready()
    await stop.wait()
async def move():
    while True:
        await submit()
stop = asyncio.Event()
asyncio.run(main())
""",
}
SIGNALS = {
    "signal": signal.SIGTERM, "handler that exits": signal.SIGTERM, "handler that closes": signal.SIGTERM,
    "handler while closing": signal.SIGTERM, "interrupt": signal.SIGINT, "event loop": signal.SIGTERM,
}  # fmt: skip
CODES = {"signal": -signal.SIGTERM}


class Process:
    """An interpreter that runs a script with open engines."""

    def __init__(self, body: str, provider: str, address: str = "", base: int = 0) -> None:
        code = SCRIPT.format(provider=provider, address=address, base=base, body=BODIES[body])
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", code], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_defaults,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", self._process.communicate()[1]
        self._body = body

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it said on stderr."""
        if self._body in SIGNALS:
            self._process.send_signal(SIGNALS[self._body])
        try:
            _, said = self._process.communicate(timeout=LIMIT)
        finally:
            self._process.kill()
        return self._process.returncode, said


def _defaults() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


OTHERS = [("tcp", "handler that exits"), ("tcp", "daemon threads"), ("loopback", "exit"), ("loopback", "signal")]


@pytest.mark.parametrize(("provider", "body"), [*(("auto", body) for body in BODIES), *OTHERS])
def test_a_process_ends_soon_and_in_silence(provider: str, body: str) -> None:
    assert Process(body, provider).end() == (CODES.get(body, 0), "")


@pytest.mark.parametrize(("provider", "body"), [("auto", "signal"), ("auto", "exit"), ("tcp", "handler that exits")])
def test_its_peers_are_told(engines: Callable[..., Engine], provider: str, body: str) -> None:
    there = engines("there", provider=provider)
    pages = there.allocate(1 << 22)
    region = there.register(pages)
    process = Process(body, provider, there.address, region.address)
    assert process.end() == (CODES.get(body, 0), "")
    until(lambda: all(lane.free for port in there.provider.ports for lane in port.lanes), "the end of its connections")
    region.unregister()  # nobody copies any more


@pytest.mark.parametrize("provider", ["auto", "tcp"])
def test_a_stopped_peer_delays_the_end_by_no_more_than_a_close(
    engines: Callable[..., Engine], fars, provider: str
) -> None:
    far = fars()
    told = far(place.target, 1 << 22, mapped=True, seed=2, provider=provider)
    process = Process("handler that exits", provider, told.address, told.base)
    far.stop()
    try:
        code, said = process.end()
    finally:
        far.go_on()
    assert code == 0
    assert "Traceback" not in said
    assert "Fatal" not in said


# ------------------------------------------------------------------------------ children of multiprocessing
def move(ready: Any, for_ever: bool) -> None:
    """In a child: open engines, and end while they transfer; by itself, or by SIGTERM."""
    here, there = (Engine(name, slices=65536, batches=256) for name in ("here", "there"))
    memory, pages = here.allocate(1 << 22), there.allocate(1 << 22)
    source, target = here.register(memory).address, there.register(pages).address
    at = np.arange(4096, dtype=np.int64) * 1024
    here.write("there", source + at, target + at, 1024).wait(LIMIT).close()
    flying = [here.write("there", source + at, target + at, 1024) for _ in range(8)]
    ready.send(len(flying))
    while for_ever:
        here.write("there", source + at, target + at, 1024).wait(LIMIT).close()


@pytest.mark.parametrize("way", ["fork", "forkserver", "spawn"])
def test_a_child_of_multiprocessing_ends_soon_however_it_was_started(way: str) -> None:
    context: Any = multiprocessing.get_context(way)
    for for_ever in (False, True):
        heard, ready = context.Pipe(duplex=False)
        process = context.Process(target=move, args=(ready, for_ever))
        process.start()
        try:
            assert heard.poll(LIMIT)
            assert heard.recv() == 8
            if for_ever:
                process.terminate()
            process.join(LIMIT)
            assert process.exitcode == (-signal.SIGTERM if for_ever else 0)
        finally:
            process.kill()
            process.join()
