"""The kernels' machine code on disk: where it lies, and whether the next engine has to compile it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mooncache.cli.checks.base import Finding, check
from mooncache.kernels.cache import Place
from mooncache.kernels.stored import SUFFIX

COMPILE = "mooncache doctor --warm"


@check("kernel cache")
def cache(place: Place | None, cold: bool) -> Iterator[Finding]:
    """Check that the machine code of these sources is there, and stays there.

    Args:
        place: where it lies, `jit.place()`.
        cold: whether some of it has yet to be compiled, `jit.cold()`.
    """
    if place is None or not place.lasting:
        where = "for itself alone" if place is None else f"unless others still use {place.path}"
        text = f"the usual directory cannot be written: each process compiles for half a minute, {where}"
        yield Finding("kernel cache", "warning", text, "export MOONCACHE_CACHE_DIR=/a/directory/that/can/be/written")
    elif cold:
        text = f"cold: the first engine compiles for about half a minute, into {place.path}"
        yield Finding("kernel cache", "warning", text, COMPILE)
    else:
        kernels = sum(1 for _ in place.path.rglob(f"*{SUFFIX}"))
        text = f"warm: {kernels} kernels, {mb_of(place.path)} in {place.path}"
        former = [other for other in place.path.parent.glob("kernels-*") if other != place.path]
        if former:
            text += f"; beside it those of {len(former)} other versions, {mb_of(*former)}"
        yield Finding("kernel cache", "ok", text)


def mb_of(*directories: Path) -> str:
    """Sum the sizes of the files below directories, MB. Files that vanish meanwhile count nothing."""
    size = 0
    for directory in directories:
        for file in directory.rglob("*"):
            with suppress(FileNotFoundError):
                size += file.stat().st_size
    return f"{size / 1e6:,.1f} MB"
