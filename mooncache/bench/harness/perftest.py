"""perftest, the RDMA community's own benchmarks, run between two processes of this host over one port.

    server   ib_write_bw ...             sleeps (bandwidth), or watches its memory (latency)
    client   ib_write_bw ... 127.0.0.1   posts, polls, and prints one line of figures

The server is given a TCP port of its own and the client starts once it listens there, so that nobody sleeps for luck.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import IO, NamedTuple

from mooncache.bench.harness.process import ProcessError

CURE = "perftest is not installed (Debian: apt-get install perftest), so there is nothing to compare with"
PATIENCE_S = 120.0  # for a server to listen, and for a client to finish: a guest under emulation needs seconds for each
LOOK_S = 0.02
LISTENING = "0A"  # TCP_LISTEN, as /proc/net/tcp prints it
MIB, GIGABIT = 1 << 20, 1e9 / 8
UNITS = {"MB/sec": MIB, "MiB/sec": MIB, "Gb/sec": GIGABIT}  # perftest's MB are MiB
FEWEST = 5  # iterations that perftest accepts


class NoFigures(ProcessError):
    """A test ended well and printed no figure that can be true; the next run may."""


class Bandwidth(NamedTuple):
    """The figures of a bandwidth test."""

    bytes_per_s: float
    messages_per_s: float


class Latency(NamedTuple):
    """The figures of a latency test, one way, which is half of there and back. Seconds."""

    typical: float  # the median
    p99: float


def installed(*programs: str) -> bool:
    """Return whether all of them are on PATH."""
    return all(shutil.which(program) for program in programs)


def version() -> str | None:
    """Return the version that perftest prints; None when it is not installed or prints none."""
    if not installed("ib_write_bw"):
        return None
    said = subprocess.run(["ib_write_bw", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\d[\w.+-]*", said.stdout + said.stderr)
    return found[0] if found else None


# ------------------------------------------------------------------------------ reading what it prints
def _table(text: str) -> dict[str, str]:
    """Read the last line of figures by column heading; headings end at "]" or at spaces before the next one."""
    lines = [line.strip() for line in text.splitlines()]
    heads = [at for at, line in enumerate(lines) if line.startswith("#bytes")]
    for head in reversed(heads):
        names = re.findall(r"#\w+|(?:[\d.]+% )?[A-Za-z_]+(?: [a-z]+)?\[[^\]]+\]", lines[head])
        for line in lines[head + 1 :]:
            cells = line.split()
            if cells and all(re.fullmatch(r"[-+]?(\d+\.?\d*|inf|nan)", cell) for cell in cells):
                return dict(zip(names, cells, strict=False))
    last = next((line for line in reversed(lines) if line.strip("- ")), "nothing")
    raise NoFigures(f"expected a line of figures from perftest, it said last: {last}")


def _figure(table: dict[str, str], name: str) -> float:
    """Read a positive figure of the table."""
    try:
        value = float(table[name])
    except KeyError:
        raise NoFigures(f"expected perftest to print {name}, it printed {', '.join(table)}") from None
    if not math.isfinite(value) or value <= 0:
        raise NoFigures(f"expected {name} of perftest to be more than 0, got {table[name]}")
    return value


def _digits(cell: str) -> int:
    """Count the digits of a cell that mean something: it is printed with a fixed number behind the point."""
    return len(cell.replace(".", "").lstrip("0"))


def read_bandwidth(text: str) -> Bandwidth:
    """Read the average of a bandwidth test from the column that has more digits left: slow wires leave few in each."""
    table = _table(text)
    size = _figure(table, "#bytes")
    name = next((name for name in table if name.startswith("BW average")), "BW average[MB/sec]")
    unit = name.partition("[")[2].rstrip("]")
    if unit not in UNITS:
        raise NoFigures(f"expected the bandwidth of perftest in {' or '.join(UNITS)}, got {unit}")
    rate = "MsgRate[Mpps]"
    if rate in table and _digits(table[rate]) > _digits(table.get(name, "")):
        messages = _figure(table, rate) * 1e6
        return Bandwidth(messages * size, messages)
    bytes_per_s = _figure(table, name) * UNITS[unit]
    return Bandwidth(bytes_per_s, bytes_per_s / size)


def read_latency(text: str) -> Latency:
    """Read the median and the 99th percentile of a latency test."""
    table = _table(text)
    return Latency(_figure(table, "t_typical[usec]") / 1e6, _figure(table, "99% percentile[usec]") / 1e6)


# ------------------------------------------------------------------------------ running it
def run(command: Sequence[str]) -> str:
    """Run a test between two processes; return what the client printed.

    Raises ProcessError. Leaves no process behind.
    """
    port = free_port()
    words = [*command, "-p", str(port)]
    end = monotonic() + PATIENCE_S
    with _started(words) as (server, said):
        while not listens(port):
            if server.poll() is not None or monotonic() > end:
                raise _failed(command, "server", server, said)
            sleep(LOOK_S)
        with _started([*words, "127.0.0.1"]) as (client, found):
            try:
                client.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                raise _failed(command, "client", client, found) from None
            if client.returncode:
                raise _failed(command, "client", client, found)
            return _text(found)


@contextmanager
def _started(words: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start a process and collect what it prints; kill it on the way out unless it has ended."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process, output
        finally:
            process.kill()
            process.wait()


def _text(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")


def _failed(command: Sequence[str], who: str, process: subprocess.Popen[bytes], output: IO[bytes]) -> ProcessError:
    lines = [line.strip() for line in _text(output).splitlines() if line.strip("- \t")]
    how = f"did not finish within {PATIENCE_S:.0f} s" if process.returncode is None else f"gave {process.returncode}"
    return ProcessError(f"{who} {' '.join(command)} {how}: {lines[-1] if lines else 'it printed nothing'}")


def free_port() -> int:
    """Return a TCP port on which nothing listens at this moment."""
    with socket.socket() as plain:
        plain.bind(("", 0))
        return int(plain.getsockname()[1])


def listens(port: int, root: str = "/proc/net") -> bool:
    """Return whether somebody listens on a TCP port.

    It is looked up, not tried: the server would take a try for its client.
    """
    end = f":{port:04X}"
    for name in ("tcp", "tcp6"):
        file = Path(root, name)
        for line in file.read_text().splitlines()[1:] if os.path.exists(file) else ():
            words = line.split()
            if words[1].endswith(end) and words[3] == LISTENING:
                return True
    return False
