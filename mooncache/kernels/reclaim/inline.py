"""Policy inline: the worker frees each slice at its completion.

The upstream engine of 6 April 2025: the 500 ms regression.
"""

from mooncache.kernels.jit import kernel
from mooncache.kernels.reclaim.base import account_freed, free_each, free_slot
from mooncache.kernels.reclaim.traits import FreesIn, Traits

TRAITS = Traits(FreesIn.WORKER, whole_chain=False)


@kernel
def on_complete(ctl, batch, slot, n):
    """Free the slices that have just completed. The NIC's next completions wait meanwhile."""
    account_freed(ctl, n)
    for i in range(slot, slot + n):
        free_slot(ctl, batch, i)


@kernel
def on_close(ctl, batch):
    """Free the failed slices, which were kept so that the caller could ask."""
    free_each(ctl, batch)
