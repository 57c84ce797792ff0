"""The one decorator of all kernels, and the cache that makes them start warm.

`@kernel("int64(int64)")` makes an *entry point*: one explicit signature, machine code cached on disk. `@kernel`
alone makes a *part*: compiled into the entry points that call it, and only when one of them is compiled.
`@callback("int32(int64, int32, int64)")` makes a C function pointer.

Numba's own cache does not notice a change in a function that lives in another file, so the cache directory is keyed
by a hash of all sources that kernels are made of. A cache file that cannot be read is deleted and built anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, overload

import numba

log = logging.getLogger("mooncache")

_numba_config: Any = numba.config  # it makes its attributes at run time
_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("kernels", "providers", "errors.py", "limits.py")
_lock = threading.RLock()
_entries: list[Entry] = []


@cache
def source_hash() -> str:
    """Hash of every source file that machine code is made from, and of Numba's version.

    Of the providers those are the files that declare kernels: resources in Python change without compiling anything.
    """
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for name in _SOURCES:
        path = _ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            text = file.read_bytes()
            if name != "providers" or b"mooncache.kernels.jit import" in text:
                digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + text)
    return digest.hexdigest()


@cache
def cache_dir() -> Path:
    """Where this version's machine code lies: `$MOONCACHE_CACHE_DIR`, else `$XDG_CACHE_HOME/mooncache`.

    Falls back to a private temporary directory where neither can be written.
    """
    base = os.environ.get("MOONCACHE_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "mooncache"
    )
    path = Path(base) / f"kernels-{source_hash()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        path = Path(tempfile.mkdtemp(prefix="mooncache-kernels-"))
        log.warning("kernel cache %s cannot be written (%s); using %s for this process", base, error, path)
    return path


@contextmanager
def _keyed_cache() -> Iterator[None]:
    """Numba reads `config.CACHE_DIR` while a function is decorated; lend it ours and give it back."""
    with _lock:
        before = _numba_config.CACHE_DIR
        _numba_config.CACHE_DIR = str(cache_dir())
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
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__module__ = function.__module__
        self.__wrapped__ = function
        _entries.append(self)

    @abstractmethod
    def build(self) -> Any:
        """Compile, or load from the cache."""

    def ready(self) -> Any:
        """The compiled thing; compiles or loads it at the first call. Thread safe."""
        if self.compiled is None:
            with _lock:
                if self.compiled is None:
                    self.compiled = self._build_or_rebuild()
        return self.compiled

    def _build_or_rebuild(self) -> Any:
        try:
            return self.build()
        except Exception as error:  # whatever a damaged cache file raises; a real error is raised again below
            log.warning("kernel cache unreadable (%s: %s); rebuilding it", type(error).__name__, error)
            shutil.rmtree(cache_dir(), ignore_errors=True)
            cache_dir().mkdir(parents=True, exist_ok=True)
            return self.build()


class Kernel(Entry):
    """An entry point: callable from Python and from other kernels' tests, never per slice."""

    def __init__(self, function: Callable[..., Any], signature: str, nogil: bool) -> None:
        super().__init__(function, signature)
        self.nogil = nogil

    def build(self) -> Any:
        """Compile for the one signature."""
        with _keyed_cache():
            dispatcher = numba.njit(nogil=self.nogil, cache=True, error_model="numpy")(self.function)
            dispatcher.compile(self.signature)
        dispatcher.disable_compile()
        return dispatcher

    def __call__(self, *arguments: Any) -> Any:
        """Run it; compiles it first if nobody has."""
        return (self.compiled or self.ready())(*arguments)


class Callback(Entry):
    """A C function written in Python; `address` is what goes into a provider's table of operations."""

    def build(self) -> Any:
        """Compile with the C calling convention."""
        with _keyed_cache():
            return numba.cfunc(self.signature, cache=True, error_model="numpy")(self.function)

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
    """Whether machine code for these sources has yet to be compiled on this machine."""
    return not any(cache_dir().rglob("*.nbi"))


def prewarm() -> None:
    """Make every entry point ready; one line on stderr when that means compiling for the first time."""
    missing = cold()
    told = missing and sys.stderr is not None and sys.stderr.isatty()
    if missing:
        log.info("compiling kernels into %s: once, about half a minute", cache_dir())
    for done, entry in enumerate(list(_entries)):
        if told:
            print(f"\rmooncache: compiling kernels, once: {done}/{len(_entries)} ", end="", file=sys.stderr)
        entry.ready()
    if told:
        print(f"\rmooncache: compiled {len(_entries)} kernels into {cache_dir()}", file=sys.stderr)
