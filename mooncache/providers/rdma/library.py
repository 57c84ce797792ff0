"""pyverbs and libibverbs: what is installed, what is missing, and how to get it.

Nothing of them is imported before `load`, so that who uses no RDMA neither needs nor pays for it. pyverbs is compiled
against the private interface of one rdma-core: it loads beside the libibverbs of that version only.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import platform
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mooncache.errors import TransportError

log = logging.getLogger("mooncache")

DEBIAN = Path("/usr/lib/python3/dist-packages/pyverbs")
LIBIBVERBS = "libibverbs.so.1"

# Constants of infiniband/verbs.h. pyverbs has them too, but in places that differ by version.
QPT_RC = 2  # ibv_qp_type
QP_STATE = 1  # ibv_qp_attr_mask
FORK_DISABLED = 0  # ibv_fork_status
ACCESS_LOCAL_WRITE, ACCESS_REMOTE_WRITE, ACCESS_REMOTE_READ = 1, 2, 4  # ibv_access_flags


@dataclass(frozen=True)
class Verbs:
    """The names of pyverbs that the provider uses, the same for all of its versions; and libibverbs itself.

    Attributes:
        Error: base of all exceptions that pyverbs raises.
        c: libibverbs, for what pyverbs lacks: registering at an address of one's own choice, events with their
            subject, and calls that let other Python threads run meanwhile. `ctypes.get_errno` is its errno.
    """

    Context: Any
    PD: Any
    CQ: Any
    CompChannel: Any
    QP: Any
    QPInitAttr: Any
    QPAttr: Any
    QPCap: Any
    AHAttr: Any
    GlobalRoute: Any
    GID: Any
    Error: type[Exception]
    c: ctypes.CDLL


@dataclass(frozen=True)
class Installed:
    """This system's user space for RDMA.

    Attributes:
        pyverbs: its version; "unknown" when whoever installed it did not note one; None when it is not installed.
        rdma_core: version of the libibverbs that this process would load; None without one.
        problem: why `load` would fail; None when it would not.
        cure: what to do about the problem.
    """

    pyverbs: str | None
    rdma_core: str | None
    problem: str | None
    cure: str | None


@cache
def load() -> Verbs:
    """Import pyverbs, once.

    Raises:
        TransportError: it is not installed, or for another Python, or beside the wrong libibverbs; says what to do.
    """
    try:
        return _import()
    except (ImportError, OSError) as error:
        problem, cure = _diagnosis(error)
        raise TransportError(f"RDMA needs pyverbs: {problem}. {cure}") from error


def installed() -> Installed:
    """Look at what is installed, and what keeps it from working. Loads it to see; never raises."""
    problem = cure = None
    try:
        load()
    except TransportError as error:
        problem, cure = _diagnosis(error.__cause__)
    return Installed(_pyverbs_version(), _rdma_core_version(), problem, cure)


def _import() -> Verbs:
    with _logging_untouched():
        pyverbs = {name: importlib.import_module(f"pyverbs.{name}") for name in ("device", "pd", "cq", "qp", "addr")}
        failure = importlib.import_module("pyverbs.pyverbs_error")
    return Verbs(
        Context=pyverbs["device"].Context,
        PD=pyverbs["pd"].PD,
        CQ=pyverbs["cq"].CQ,
        CompChannel=pyverbs["cq"].CompChannel,
        QP=pyverbs["qp"].QP,
        QPInitAttr=pyverbs["qp"].QPInitAttr,
        QPAttr=pyverbs["qp"].QPAttr,
        QPCap=pyverbs["qp"].QPCap,
        AHAttr=pyverbs["addr"].AHAttr,
        GlobalRoute=pyverbs["addr"].GlobalRoute,
        GID=pyverbs["addr"].GID,
        Error=failure.PyverbsError,
        c=_prototyped(ctypes.CDLL(LIBIBVERBS, use_errno=True)),
    )


@contextmanager
def _logging_untouched() -> Iterator[None]:
    """Undo pyverbs.base's call of `logging.basicConfig`: that is the application's to do."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _prototyped(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, word, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
    for name, result, arguments in (
        ("ibv_reg_mr", pointer, (pointer, pointer, ctypes.c_size_t, number)),
        ("ibv_reg_dmabuf_mr", pointer, (pointer, word, ctypes.c_size_t, word, number, number)),
        ("ibv_dereg_mr", number, (pointer,)),
        ("ibv_get_cq_event", number, (pointer, pointer, pointer)),
        ("ibv_ack_cq_events", None, (pointer, ctypes.c_uint)),
        ("ibv_get_async_event", number, (pointer, pointer)),
        ("ibv_ack_async_event", None, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    status = getattr(library, "ibv_is_fork_initialized", None)  # since rdma-core 35
    if status is not None and status() == FORK_DISABLED:
        log.warning(
            "before Linux 5.12 a fork may take pages over that NICs write to, and what arrives is lost: start this "
            "process with RDMAV_FORK_SAFE=1 in its environment if it forks"
        )
    return library


# ------------------------------------------------------------------ what is wrong, and what to do
def _diagnosis(error: BaseException | None) -> tuple[str, str]:
    folder = _folder()
    core = _rdma_core_version()
    if folder is None:
        return "it is not installed in this environment", _installation(core)
    built = sorted(file.name.removeprefix("device") for file in folder.glob("device.*.so"))
    if built and not any(suffix in EXTENSION_SUFFIXES for suffix in built):
        here = f"this is Python {platform.python_version()} ({EXTENSION_SUFFIXES[0]})"
        return f"the one in {folder} was built for another Python ({', '.join(built)}), {here}", _built(core)
    version = _pyverbs_version()
    found = f"pyverbs {version} in {folder}, and libibverbs of rdma-core {core or 'nowhere'}"
    return f"it does not load: {error} (found: {found})", _matching(core)


def _installation(core: str | None) -> str:
    if not _debian():
        return _built(core)
    if not DEBIAN.is_dir():
        return f"Install it: apt-get install python3-pyverbs. {_visible()}"
    if not any((DEBIAN / f"device{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return f"The distribution's, in {DEBIAN}, is for another Python than this {platform.python_version()}. " + (
            f"Use the distribution's Python, or: {_built(core)}"
        )
    return f"The distribution's is there. {_visible()}"


def _visible() -> str:
    return (
        f"Make it visible in a virtual environment: ln -s {DEBIAN} {sysconfig.get_path('purelib')}/, "
        "or make the environment with --system-site-packages"
    )


def _built(core: str | None) -> str:
    beside = f" (here: pyverbs=={core})" if core else ", which is needed too"
    return (
        "Build it: pip install 'mooncache[rdma]', with cmake, a C compiler, pkg-config and the headers of libnl3; "
        f"its version must be that of the system's libibverbs{beside}"
    )


def _matching(core: str | None) -> str:
    why = "pyverbs loads only beside the libibverbs of its own rdma-core version"
    if _debian():
        return f"Take both from the distribution (apt-get install --reinstall python3-pyverbs libibverbs1): {why}"
    return f"{_built(core)}: {why}"


def _debian() -> bool:
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return False
    return "debian" in (system.get("ID", ""), *system.get("ID_LIKE", "").split())


def _folder() -> Path | None:
    spec = find_spec("pyverbs")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def _pyverbs_version() -> str | None:
    """Read pyverbs's version: pip writes it beside the package, Debian into its own books only."""
    folder = _folder()
    if folder is None:
        return None
    try:
        return metadata.version("pyverbs")
    except metadata.PackageNotFoundError:
        pass
    if folder.resolve() == DEBIAN:
        try:
            query = ["dpkg-query", "--show", "--showformat=${Version}", "python3-pyverbs"]
            return subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            pass
    return "unknown"


def _rdma_core_version() -> str | None:
    """Read rdma-core's version off the library's file: `libibverbs.so.1.14.44.0` is of rdma-core 44.0."""
    try:
        ctypes.CDLL(LIBIBVERBS)
    except OSError:
        return None
    loaded = re.search(r"(/\S*/libibverbs\.so\S*)", Path("/proc/self/maps").read_text())
    name = Path(loaded[1]).resolve().name if loaded else ""
    version = re.search(r"\.so\.\d+\.\d+\.(\S+)$", name)
    return version[1] if version else "unknown"
