"""Free the whole chunk chain at close, with one compare-and-swap. Mooncache's default, with the pool."""

from mooncache.kernels.jit import kernel
from mooncache.kernels.reclaim.base import free_whole
from mooncache.kernels.reclaim.traits import FreesIn, Traits

TRAITS = Traits(FreesIn.CALLER, whole_chain=True)


@kernel
def on_close(ctl, batch):
    """One compare-and-swap for all."""
    free_whole(ctl, batch)
