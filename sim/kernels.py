"""The kernels that a simulation calls: these are compiled before it, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mooncache.kernels import calls, jit, publication, regions, submit
from mooncache.kernels.pump import pump
from mooncache.kernels.reclaim import leak
from mooncache.kernels.reclaim.dispatch import reap
from mooncache.providers import careful
from mooncache.providers.inprocess import nic

KERNELS: tuple[jit.Entry, ...] = (  # those that take longest to compile first
    pump,
    submit.prepare,
    submit.publish,
    calls.close,
    nic.post_send,
    nic.poll_cq,
    reap,
    leak.restart,
    nic.next_completion,
    careful.look,
    regions.insert,
    publication.publish,
)


def missing() -> list[int]:
    """Return the indices of kernels that have yet to be compiled on this machine."""
    return [index for index, kernel in enumerate(KERNELS) if kernel.missing()]


def compile_all(mapped: Callable[..., Iterable[int]], tell: Callable[[int, int], None]) -> None:
    """Compile missing kernels, as many at a time as `mapped` has processes; call `tell(done, all)` after each."""
    wanted = missing()
    for done, _ in enumerate(mapped(_ready, wanted), 1):
        tell(done, len(wanted))


def _ready(index: int) -> int:
    KERNELS[index].ready()
    return index
