"""Reading another process's memory, as the shm wire does with memory that was not made by `engine.allocate`."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mooncache.cli.checks.base import ROOT, Finding, check, read_if_there

# A child asks for its parent's memory: neither Yama nor a filter of system calls treats two engines better.
PROBE = """
import ctypes, sys
pid, address = map(int, sys.argv[1:])
word = ctypes.c_int64()
ranges = [(ctypes.c_size_t * 2)(a, 8) for a in (ctypes.addressof(word), address)]
read = ctypes.CDLL(None, use_errno=True).process_vm_readv
read.restype = ctypes.c_ssize_t
moved = read(pid, ranges[0], ctypes.c_ulong(1), ranges[1], ctypes.c_ulong(1), ctypes.c_ulong(0))
print(0 if moved == 8 else ctypes.get_errno())
"""
PROBE_S = 30

SCOPES = {"1": "its descendants only", "2": "CAP_SYS_PTRACE only", "3": "nobody, until the machine is booted again"}
"""The processes that /proc/sys/kernel/yama/ptrace_scope allows to look into a process, other than "0"."""


def refusal() -> int:
    """Return why another process may not read this one's memory, as an errno, or 0.

    Raises OSError without an answer.
    """
    word = ctypes.c_int64()
    command = [sys.executable, "-I", "-c", PROBE, str(os.getpid()), str(ctypes.addressof(word))]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"the process that tried it did not end within {PROBE_S} s") from error
    if asked.returncode:
        raise OSError(f"the process that tried it ended with {asked.returncode}: {asked.stderr.strip()}")
    return int(asked.stdout)


@check("process memory")
def process_memory(refused: int | None = None, root: Path = ROOT) -> Iterator[Finding]:
    """Check whether processes may read each other's memory.

    Args:
        refused: the errno with which it was refused, 0 for none; by default it is tried.
    """
    why = refusal() if refused is None else refused
    if not why:
        yield Finding("process memory", "ok", "processes of this user may copy from and to each other's memory")
        return
    scope = read_if_there(root / "proc/sys/kernel/yama/ptrace_scope")
    text = f"process_vm_readv is refused ({os.strerror(why)}"
    text += f"; Yama allows it to {SCOPES[scope]})" if scope in SCOPES else ")"
    text += ": peers on this host reach memory that engine.allocate made, and any other over TCP"
    cures = ["docker: docker run --cap-add SYS_PTRACE ..."]
    if scope in ("1", "2"):
        cures.insert(0, "sysctl -w kernel.yama.ptrace_scope=0")
    elif scope == "3":
        cures.insert(0, "kernel.yama.ptrace_scope=0 in /etc/sysctl.d/10-ptrace.conf, and reboot")
    elif why == errno.ENOSYS:
        cures = ["docker: docker run --security-opt seccomp=PROFILE ... with a profile that allows process_vm_readv"]
    yield Finding("process memory", "warning", text, "\n".join(cures))
