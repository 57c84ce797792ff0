"""`mooncache serve` runs a target with a scratch region, to write into and read from.

terminal 1   mooncache serve --listen 127.0.0.1:7777 --bytes 1GiB
terminal 2   engine = Engine(provider="auto"); peer = engine.connect("127.0.0.1:7777"); peer.regions[0].address
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from mooncache import Engine
from mooncache.errors import UsageError
from mooncache.sizes import size_of, spell

LISTEN = "127.0.0.1:7777"
SECRET = "MOONCACHE_SECRET"
STOPS = signal.SIGINT, signal.SIGTERM


class Provider(str, Enum):
    """The wires that reach another process."""

    AUTO = "auto"
    TCP = "tcp"
    SHM = "shm"


def serve(
    listen: str = typer.Option(LISTEN, help="host:port where peers reach it; port 0 takes a free one."),
    size: str = typer.Option("1GiB", "--bytes", help="Size of the scratch region, such as 512MiB."),
    provider: Provider = typer.Option(
        Provider.AUTO, help="auto is shared memory to peers of this host, TCP to others."
    ),
    name: str | None = typer.Option(None, help="What peers may call it; else host name, process id, a number."),
    discovery: str | None = typer.Option(None, help="redis://host:port or etcd://host:port, where names are kept."),
    secret_file: Path | None = typer.Option(
        None, help=f"File with the secret that peers have to know. Or set {SECRET} in the environment."
    ),
    insecure: bool = typer.Option(False, "--insecure", help="Listen beyond this host without a secret."),
    workers: int = typer.Option(1, help="Worker threads."),
    json: bool = typer.Option(False, "--json", help="One line of JSON on stdout when it is ready, for programs."),
) -> None:
    """Lend memory to peers until Ctrl-C or SIGTERM: a target to try things on."""
    nbytes = size_of(size)
    with Engine(
        name, provider=provider.value, listen=listen, secret=secret_of(secret_file), insecure=insecure,
        discovery=discovery, workers=workers, slices=1,
    ) as engine:  # fmt: skip
        scratch = engine.allocate(nbytes)
        engine.register(scratch)
        with stopping() as stop:
            announce(engine, scratch.ctypes.data, nbytes, json)
            stop.wait()
    if not json:
        print("Closed.")


def secret_of(file: Path | None) -> str | None:
    """Return the secret from the file, else from the environment; None without either."""
    if file is None:
        return os.environ.get(SECRET) or None
    try:
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a file of text with the secret, and {file} is not: {error}") from error
    if not secret:
        raise UsageError(f"expected a secret in {file}, which is empty")
    return secret


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set meanwhile, instead of what else they do."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def announce(engine: Engine, address: int, length: int, as_json: bool) -> None:
    """Print where the region is and how to reach it."""
    if as_json:
        ready: dict[str, Any] = {
            "name": engine.name,
            "address": engine.address,
            "region": {"address": address, "length": length},
            "pid": os.getpid(),
        }
        print(json.dumps(ready), flush=True)
        return
    print(
        f"{engine.name} serves {spell(length)} at {engine.address} ({engine.provider.name}).\n"
        f'  peer = engine.connect("{engine.address}")\n'
        "  scratch = peer.regions[0].address\n"
        "  engine.write(peer, source, scratch, length).wait()\n"
        "Ctrl-C ends it.",
        flush=True,
    )
