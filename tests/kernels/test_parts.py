"""Parts of kernels: compiled into entry points, and never called from Python."""

from __future__ import annotations

import pytest

from mooncache.kernels.jit import Kernel, kernel
from mooncache.kernels.parts import PartLibrary


@kernel
def twice(value):
    """Return twice the value."""
    return 2 * value


@kernel
def four_times(value):
    """Return four times the value, by a part of this part."""
    return twice(twice(value))


@kernel("int64(int64)")
def four_times_and_one(value):
    """Return four times the value and one."""
    return four_times(value) + 1


def libraries(part) -> list:
    return [compiled.library for compiled in part.overloads.values()]


def test_an_entry_point_calls_parts_of_parts():
    assert isinstance(four_times_and_one, Kernel)
    assert four_times_and_one(10) == 41


@pytest.mark.parametrize("part", [twice, four_times])
def test_a_part_has_no_machine_code_and_refuses_calls_from_python(part):
    part.compile("int64(int64)")
    (library,) = libraries(part)
    assert type(library) is PartLibrary
    assert not library._codegen._engine.is_symbol_defined(part.overloads[part.signatures[0]].fndesc.mangled_name)
    with pytest.raises(TypeError, match="only_kernels_call_parts"):
        part(10)
