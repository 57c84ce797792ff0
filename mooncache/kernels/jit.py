"""The one decorator of all kernels, and the cache that makes them start warm.

`@kernel("int64(int64)")` makes an *entry point*: one explicit signature, machine code cached on disk. `@kernel`
alone makes a *part*: compiled into the entry points that call it, and only when one of them is compiled.
`@callback("int32(int64, int32, int64)")` makes a C function pointer.

Numba's own cache does not notice a change in a function that lives in another file, so the cache directory is keyed
by a hash of all sources that kernels are made of (`cache.py`). Processes that start together compile each kernel once.
A file of the cache that cannot be read is made anew, and no other with it.
"""

from __future__ import annotations

import logging
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

import numba
from llvmlite.binding import ffi
from numba.core.caching import CompileResultCacheImpl
from numba.core.compiler_lock import global_compiler_lock

from mooncache import forks
from mooncache.kernels import cache

log = logging.getLogger("mooncache")

_numba_config: Any = numba.config  # it makes its attributes at run time


class _Lock:
    """Held while something is compiled. A forked child has one of its own: its parent's may be held for ever there.

    So may those that Numba and LLVM compile under, which renew none by themselves.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def disown(self) -> None:
        """See `forks.Holder`."""
        for lock in (self, global_compiler_lock, ffi.lib._lock):
            lock._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_lock = forks.private(_Lock())
_entries: list[Entry] = []
_place: list[cache.Place | None] = []  # empty until somebody asks; None where nothing can be written


def place() -> cache.Place | None:
    """Where this version's machine code lies; None where neither that nor the temporary folder can be written."""
    with _lock:
        if not _place:
            try:
                _place.append(cache.find_place())
            except OSError as error:
                log.warning("no place for the kernel cache (%s): compiling for this process alone", error)
                _place.append(None)
        return _place[0]


@contextmanager
def _keyed_cache() -> Iterator[None]:
    """Numba reads `config.CACHE_DIR` while a function is decorated; lend it ours and give it back."""
    with _lock:
        before, where = _numba_config.CACHE_DIR, place()
        if where is not None:
            _numba_config.CACHE_DIR = str(where.path)
        try:
            yield
        finally:
            _numba_config.CACHE_DIR = before


class Entry(ABC):
    """Something compiled once, from the cache when it is there. Subclasses say how."""

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self.function = function
        self.signature = signature
        self.compiled: Any = None
        self._files: list[Path] = []
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__module__ = function.__module__
        self.__wrapped__ = function
        _entries.append(self)

    @abstractmethod
    def build(self, cached: bool) -> Any:
        """Compile, or load from the cache."""

    @property
    def files(self) -> list[Path]:
        """Its index and its machine code in the cache: of one signature, one CPU and one Python there is one each."""
        if not self._files:  # no `cached_property`: until Python 3.12 it holds a lock of its own, for all kernels
            with _keyed_cache():
                where = CompileResultCacheImpl(self.function)
            base = Path(where.locator.get_cache_path()) / where.filename_base
            self._files = [base.with_name(f"{base.name}.nbi"), base.with_name(f"{base.name}.1.nbc")]
        return self._files

    def missing(self) -> bool:
        """Whether it has yet to be compiled on this machine."""
        return self.compiled is None and (place() is None or not all(file.exists() for file in self.files))

    def ready(self) -> Any:
        """The compiled thing; compiles or loads it at the first call. Thread safe.

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
        """None where another process is at it, and we do not wait."""
        if place() is None:
            return self.build(cached=False)
        if not self.missing():
            with suppress(Exception):  # whatever a damaged file raises: once more below, with no other process at it
                return self.build(cached=True)
        try:
            with cache.alone(self.files[0], wait) as mine:
                return self._compile_alone() if mine else None
        except OSError as error:  # a full disk, a quota, a directory that is read-only by now
            log.warning("kernel %s cannot be cached (%s); compiling it for this process alone", self.__name__, error)
            return self.build(cached=False)

    def _compile_alone(self) -> Any:
        there = not self.missing()
        try:
            return self.build(cached=True)
        except Exception as error:
            if not there or isinstance(error, OSError):
                raise
            log.warning("kernel cache unreadable (%s: %s); rebuilding %s", type(error).__name__, error, self.__name__)
            for file in self.files:
                file.unlink(missing_ok=True)
            return self.build(cached=True)


class Kernel(Entry):
    """An entry point: callable from Python and from other kernels' tests, never per slice."""

    def __init__(self, function: Callable[..., Any], signature: str, nogil: bool) -> None:
        super().__init__(function, signature)
        self.nogil = nogil

    def build(self, cached: bool) -> Any:
        """Compile for the one signature."""
        with _keyed_cache():
            dispatcher = numba.njit(nogil=self.nogil, cache=cached, error_model="numpy")(self.function)
            dispatcher.compile(self.signature)
        dispatcher.disable_compile()
        return dispatcher

    def __call__(self, *arguments: Any) -> Any:
        """Run it; compiles it first if nobody has."""
        return (self.compiled or self.ready())(*arguments)


class Callback(Entry):
    """A C function written in Python; `address` is what goes into a provider's table of operations."""

    def build(self, cached: bool) -> Any:
        """Compile with the C calling convention."""
        with _keyed_cache():
            return numba.cfunc(self.signature, cache=cached, error_model="numpy")(self.function)

    @property
    def address(self) -> int:
        """Of the machine code; valid as long as the process lives."""
        return int(self.ready().address)


@overload
def kernel(signature: str, *, nogil: bool = ...) -> Callable[[Callable[..., Any]], Kernel]: ...
@overload
def kernel(signature: Callable[..., Any]) -> Any: ...
def kernel(signature: Any, *, nogil: bool = False) -> Any:
    """Entry point when given a signature, else a part of the entry points that call it.

    `nogil` is for kernels that may run or sleep for long (pump, wait): everything else holds the GIL, because giving
    it up costs milliseconds beside a busy Python thread and holding it microseconds.
    """
    if callable(signature):
        return numba.njit(error_model="numpy")(signature)
    return lambda function: Kernel(function, signature, nogil)


def callback(signature: str) -> Callable[[Callable[..., Any]], Callback]:
    """A C function pointer with this signature, compiled at the first use of its address."""
    return lambda function: Callback(function, signature)


def cold() -> bool:
    """Whether machine code of any entry point, among the modules imported so far, has yet to be compiled here."""
    return any(entry.missing() for entry in list(_entries))


def prewarm() -> None:
    """Make every entry point ready; one line on stderr when that means compiling for the first time.

    Processes that start together on a new machine share the work: each kernel is compiled by one of them.
    """
    missing = [entry for entry in list(_entries) if entry.missing()]
    if missing:
        _compile(missing)
    for entry in list(_entries):
        entry.ready()


def _compile(missing: list[Entry]) -> None:
    """Compile what no other process does, then wait for those; say how far it is at a terminal, else in the log."""
    where = place()
    into = f"into {where.path}" if where is not None else "for this process"
    told = sys.stderr is not None and sys.stderr.isatty()
    log.info("compiling %d kernels %s: once, up to a minute or two", len(missing), into)
    for done, entry in enumerate(missing):
        if told:
            print(f"\rmooncache: compiling kernels, once: {done}/{len(missing)} ", end="", file=sys.stderr)
        entry._make(wait=False)
    left = [entry for entry in missing if entry.compiled is None]
    if left:
        log.info("other processes compile %d of the kernels; waiting for them", len(left))
    for entry in left:
        entry.ready()
    if told:
        print(f"\rmooncache: compiled {len(missing)} kernels {into}", file=sys.stderr)
