"""Machine code on disk: one file a kernel, loaded whole and as it was written, or not at all.

    <module>.<name>-<line>-<key>.kernel     digest of the rest | what Numba made of the function, pickled

The key is of the text of the file that declares the kernel and of its signature, not of any path, so that every
checkout and installation of the same sources shares it. What a kernel calls in other files is covered by the name of
the directory (`cache.source_hash`). Numba's own cache is keyed by absolute path, and believes whatever a file holds:
a damaged one can end the process.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite.binding import parse_assembly
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps

SUFFIX = ".kernel"
_DIGEST_BYTES = 32


class DamagedError(ValueError):
    """A file holds something else than what was written."""


def name_of(function: Callable[..., Any], signature: str) -> str:
    """Return the name of the file of one kernel.

    Raises:
        OSError: the function comes from no file that can be read.
    """
    key = _digest(_key_of(inspect.getfile(function)) + signature.encode(), 8).hex()
    qualified = f"{function.__module__}.{function.__qualname__}".replace("<", "").replace(">", "")
    return f"{qualified}-{function.__code__.co_firstlineno}-{key}{SUFFIX}"


@cache
def _key_of(path: str) -> bytes:
    return _digest(Path(path).read_bytes())


def _digest(data: bytes, nbytes: int = _DIGEST_BYTES) -> bytes:
    return hashlib.blake2b(data, digest_size=nbytes).digest()


def _entry_point(compiled: Any) -> tuple[Any, ...]:
    """Return what Numba needs to make an entry point anew, without what only calls from other kernels need.

    That is most of what would be loaded: LLVM code to be linked, and an environment for each part.
    """
    (name, kind, (machine_code, _)), fndesc, *others, _ = compiled._reduce()
    names = [fndesc.llvm_cpython_wrapper_name, fndesc.llvm_cfunc_wrapper_name]
    module = parse_assembly("".join(f'define void @"{name}"() {{ ret void }}\n' for name in names))
    return (name, kind, (machine_code, module.as_bitcode())), fndesc, *others, ()


class Stored(NullCache):
    """The place where Numba finds and leaves one kernel's machine code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load what was compiled before, or None where nothing was. Raises DamagedError."""
        try:
            data = self.file.read_bytes()
        except FileNotFoundError:
            return None
        rtsys.initialize(target_context)  # and not all that Numba's own cache imports for what is yet to be compiled
        digest, made = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if _digest(made) != digest:
            raise DamagedError(f"{self.file} holds something else than what was written")
        return CompileResult._rebuild(target_context, *pickle.loads(made))

    def save_overload(self, sig: Any, compiled: Any) -> None:
        """Write what was compiled to a file that appears whole. Raises OSError."""
        if compiled.library.has_dynamic_globals:
            raise TypeError(f"{self.file.stem} has an address of this process in its code: pass it as an argument")
        made = dumps(_entry_point(compiled))
        fd, beside = tempfile.mkstemp(prefix=f".{self.file.name}.", dir=self.file.parent)
        try:
            with open(fd, "wb") as file:
                file.write(_digest(made) + made)
            os.replace(beside, self.file)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise
