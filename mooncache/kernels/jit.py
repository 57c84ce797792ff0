"""The one decorator of all kernels, and the cache that makes them start warm.

`@kernel("int64(int64)")` makes an *entry point*: one explicit signature, machine code cached on disk. `@kernel`
alone makes a *part*: compiled into the entry points that call it, and only when one of them is compiled (`parts.py`).
`@callback("int32(int64, int32, int64)")` makes a C function pointer.

Numba's own cache does not notice a change in a function that lives in another file, so the cache directory is keyed
by a hash of all sources that kernels are made of (`cache.py`). Processes that start together compile each kernel once.
A file of the cache (`stored.py`) that is damaged is made anew, and no other with it.
"""

from __future__ import annotations

import logging
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import numba
from llvmlite.binding import ffi
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.sigutils import normalize_signature

from mooncache import forks
from mooncache.kernels import cache, stored
from mooncache.kernels.parts import PartCompiler

log = logging.getLogger("mooncache")


class _Lock:
    """A lock on compiling. A forked child has one of its own: its parent's may be held for ever there.

    So may those that Numba and LLVM compile under, which renew none by themselves.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def disown(self) -> None:
        """Replace the lock in a forked child; see `forks.Holder`."""
        for lock in (self, global_compiler_lock, ffi.lib._lock):
            lock._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_OPTIONS = {"error_model": "numpy", "no_cfunc_wrapper": True}  # of every kernel but callbacks
_lock = forks.private(_Lock())
_entries: list[Entry] = []
_place: list[cache.Place | None] = []  # empty until somebody asks; None where nothing can be written


def place() -> cache.Place | None:
    """Return where this version's machine code lies; None where neither it nor the temporary folder can be written."""
    with _lock:
        if not _place:
            try:
                _place.append(cache.find_place())
            except OSError as error:
                log.warning("no place for the kernel cache (%s): compiling for this process alone", error)
                _place.append(None)
        return _place[0]


class Entry(ABC):
    """A function that is compiled once, from the cache when it is there. Subclasses say how."""

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        if function.__closure__ is not None:
            raise TypeError(f"kernel {function.__qualname__} closes over variables: pass them as arguments")
        self.function = function
        self.signature = signature
        self.compiled: Any = None
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__module__ = function.__module__
        self.__wrapped__ = function
        _entries.append(self)

    @abstractmethod
    def build(self, where: NullCache) -> Any:
        """Compile the function, or load its machine code."""

    @property
    def file(self) -> Path | None:
        """The file of its machine code; None where no cache can be written.

        Raises OSError where a source is unreadable.
        """
        where = place()
        return None if where is None else where.path / stored.name_of(self.function, self.signature)

    def missing(self) -> bool:
        """Return whether it has yet to be compiled on this machine."""
        return self.compiled is None and not self._stored()

    def _stored(self) -> bool:
        with suppress(OSError):
            return (file := self.file) is not None and file.exists()
        return False

    def ready(self) -> Any:
        """Return the compiled function; compile or load it at the first call. Thread safe.

        Waits for another process that compiles the same into the same cache (see `cache.alone`).
        """
        if self.compiled is None:
            self._make(wait=True)
        return self.compiled

    def _make(self, wait: bool) -> None:
        with _lock:
            if self.compiled is None:
                self.compiled = self._load_or_compile(wait)

    def _load_or_compile(self, wait: bool) -> Any:
        """Load or compile it; return None where another process compiles it and this one does not wait."""
        try:
            file = self.file
            if file is None:
                return self.build(NullCache())
            if file.exists():
                with suppress(Exception):  # whatever a damaged file raises: again below, with no other process at it
                    return self.build(stored.Stored(file))
            with cache.alone(file, wait) as mine:
                return self._compile_alone(file) if mine else None
        except OSError as error:  # a full disk, a quota, a directory that is read-only by now
            log.warning("kernel %s cannot be cached (%s); compiling it for this process alone", self.__name__, error)
            return self.build(NullCache())

    def _compile_alone(self, file: Path) -> Any:
        there = file.exists()
        try:
            return self.build(stored.Stored(file))
        except Exception as error:
            if not there or isinstance(error, OSError):
                raise
            log.warning("kernel cache unreadable (%s: %s); rebuilding %s", type(error).__name__, error, self.__name__)
            file.unlink(missing_ok=True)
            return self.build(stored.Stored(file))


class Kernel(Entry):
    """An entry point: callable from Python and from other kernels' tests, never per slice."""

    def __init__(self, function: Callable[..., Any], signature: str, nogil: bool) -> None:
        super().__init__(function, signature)
        self.nogil = nogil

    def build(self, where: NullCache) -> Any:
        """Compile for the one signature."""
        options: dict[str, Any] = {**_OPTIONS, "nogil": self.nogil}
        dispatcher = numba.njit(**options)(self.function)
        dispatcher._cache = where
        dispatcher.compile(self.signature)
        dispatcher.disable_compile()
        return dispatcher

    def __call__(self, *arguments: Any) -> Any:
        """Run it; compiles it first if nobody has."""
        return (self.compiled or self.ready())(*arguments)


class Callback(Entry):
    """A C function written in Python; `address` is what goes into a provider's table of operations."""

    def build(self, where: NullCache) -> Any:
        """Compile with the C calling convention."""
        function: Any = CFunc(self.function, normalize_signature(self.signature), {}, {"error_model": "numpy"})
        function._cache = where
        function.compile()
        return function

    @property
    def address(self) -> int:
        """The address of the machine code; valid as long as the process lives."""
        return int(self.ready().address)


@overload
def kernel(signature: str, *, nogil: bool = ...) -> Callable[[Callable[..., Any]], Kernel]: ...
@overload
def kernel(signature: Callable[..., Any]) -> Any: ...
def kernel(signature: Any, *, nogil: bool = False) -> Any:
    """Declare an entry point when given a signature, else a part of the entry points that call it.

    `nogil` is for kernels that may run or sleep for long (pump, wait): everything else holds the GIL, because giving
    it up costs milliseconds beside a busy Python thread and holding it microseconds.
    """
    if callable(signature):
        options: dict[str, Any] = {**_OPTIONS, "pipeline_class": PartCompiler, "no_cpython_wrapper": True}
        return numba.njit(**options)(signature)
    return lambda function: Kernel(function, signature, nogil)


def callback(signature: str) -> Callable[[Callable[..., Any]], Callback]:
    """Declare a C function with this signature, compiled at the first use of its address."""
    return lambda function: Callback(function, signature)


def cold() -> bool:
    """Return whether machine code of any entry point imported so far has yet to be compiled here."""
    return any(entry.missing() for entry in list(_entries))


def prewarm() -> None:
    """Make every entry point ready; say so, and how far it is, when that means compiling for the first time.

    Processes that start together on a new machine share the work: each kernel is compiled by one of them.
    """
    missing = [entry for entry in list(_entries) if entry.missing()]
    if missing:
        _compile(missing)
    for entry in list(_entries):
        entry.ready()


def _compile(missing: list[Entry]) -> None:
    """Compile what no other process does, then wait for those."""
    where = place()
    progress = Progress(len(missing), f"into {where.path}" if where is not None else "for this process")
    for entry in missing:
        entry._make(wait=False)
        progress.tell(sum(entry.compiled is not None for entry in missing))
    left = [entry for entry in missing if entry.compiled is None]
    if left:
        log.info("other processes compile %d of the kernels; waiting for them", len(left))
    for already, entry in enumerate(left, 1):
        entry.ready()
        progress.tell(len(missing) - len(left) + already)


class Progress:
    """A report of how many kernels are compiled: at a terminal one rewritten line, else a log line each tenth."""

    def __init__(self, kernels: int, into: str) -> None:
        self.kernels, self.into, self.told = kernels, into, 0
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        log.info("compiling %d kernels %s: once, up to a minute", kernels, into)

    def tell(self, done: int) -> None:
        """Report that so many are compiled by now."""
        if self.terminal:
            doing, end = (f"compiled {self.into}", "\n") if done == self.kernels else ("being compiled, once", "")
            print(f"\rmooncache: {done} of {self.kernels} kernels {doing}\x1b[K", end=end, file=sys.stderr, flush=True)
        elif done * 10 // self.kernels > self.told * 10 // self.kernels:
            log.info("%d of %d kernels are compiled", done, self.kernels)
        self.told = done
