"""The compilation of parts: as far as the entry points need them that call them, which make the machine code.

Numba optimises each function together with all that it calls, and makes machine code of it all, before it looks at the
caller: LLVM works on a leaf of the tree of calls once for each level above it. But nobody except kernels calls a part.
So its LLVM code is left as it is, and is optimised once, when it has been linked into an entry point. All kernels
together take half the time so: 30 to 34 s instead of 63 s (`mooncache doctor --warm`, one core of an AMD Zen 4).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class PartLibrary(JITCodeLibrary):
    """The LLVM code of one part, and of the parts that it calls."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        """Make no machine code; Numba's own does that at this point."""
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Return the address of what Python calls in place of this part: it raises TypeError."""
        self._ensure_finalized()
        return _refusal()

    @property
    def codegen(self) -> Any:
        """This library: Numba gives it the environment that a function with machine code has."""
        return self

    def set_env(self, name: str, environment: object) -> None:
        """Keep no environment: kernels use none."""


class PartCompiler(Compiler):
    """Numba's compiler, but for the library."""

    def __init__(
        self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any
    ) -> None:
        if library is None:
            library = PartLibrary(targetctx.codegen(), "part")
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


def only_kernels_call_parts() -> None:
    """Refuse arguments: whoever calls a part from Python gets here, and parts have some."""


@cache
def _refusal() -> int:
    dispatcher: Any = numba.njit(())(only_kernels_call_parts)
    compiled = dispatcher.overloads[()]
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cpython_wrapper_name))
