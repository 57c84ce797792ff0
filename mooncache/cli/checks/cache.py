"""The kernels' machine code on disk: where it lies, and whether the next engine has to compile it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mooncache.cli.checks.base import Finding, check
from mooncache.kernels import jit

COMPILE = "python -c \"from mooncache import Engine; Engine(provider='loopback').close()\""


@check("kernel cache")
def cache(directory: Path | None = None, cold: bool | None = None) -> Iterator[Finding]:
    """Whether the machine code of these sources is there, and stays there.

    Args:
        directory: where it lies; by default where this process would put it, which is made.
        cold: whether it has yet to be compiled; by default it is looked up.
    """
    place = jit.cache_dir() if directory is None else directory
    missing = jit.cold() if cold is None else cold
    if place.name != f"kernels-{jit.source_hash()}":
        yield Finding(
            "kernel cache", "warning",
            f"the usual directory cannot be written, so that every process compiles for half a minute, into {place}",
            "export MOONCACHE_CACHE_DIR=/a/directory/that/can/be/written",
        )  # fmt: skip
    elif missing:
        text = f"cold: the first engine compiles for about half a minute, into {place}"
        yield Finding("kernel cache", "warning", text, COMPILE)
    else:
        kernels = sum(1 for _ in place.rglob("*.nbi"))
        text = f"warm: {kernels} kernels, {mb_of(place)} in {place}"
        former = [other for other in place.parent.glob("kernels-*") if other != place]
        if former:
            text += f"; beside it those of {len(former)} other versions, {mb_of(*former)}"
        yield Finding("kernel cache", "ok", text)


def mb_of(*directories: Path) -> str:
    """What the files below directories take. Those that vanish meanwhile take nothing."""
    size = 0
    for directory in directories:
        for file in directory.rglob("*"):
            with suppress(FileNotFoundError):
                size += file.stat().st_size
    return f"{size / 1e6:,.1f} MB"
