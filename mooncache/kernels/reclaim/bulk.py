"""Policy bulk: the whole chunk chain is freed at close, with one compare-and-swap.

Mooncache's default, with the pool.
"""

from mooncache.kernels.jit import kernel
from mooncache.kernels.reclaim.base import free_whole
from mooncache.kernels.reclaim.traits import FreesIn, Traits

TRAITS = Traits(FreesIn.CALLER, whole_chain=True)


@kernel
def on_close(ctl, batch):
    """Free the whole chain with one compare-and-swap."""
    free_whole(ctl, batch)
