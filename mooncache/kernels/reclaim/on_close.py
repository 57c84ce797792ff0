"""Policy on_close: the caller's thread frees each slice, at close: `freeBatchID`, half of the upstream fix."""

from mooncache.kernels.jit import kernel
from mooncache.kernels.reclaim.base import free_each
from mooncache.kernels.reclaim.traits import FreesIn, Traits

TRAITS = Traits(FreesIn.CALLER, whole_chain=False)


@kernel
def on_close(ctl, batch):
    """Free the batch's slices one by one."""
    free_each(ctl, batch)
