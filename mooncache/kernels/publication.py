"""Words that Python writes and workers read without a lock, one at a time, in an order that every CPU keeps.

An assignment to an array's element is a plain store: a weakly ordered CPU may show it to a worker before what was
written in front of it, or answer a later load first. So whatever workers read while Python writes is filled in with
plain stores and then made visible by one `publish`: a table and then its count, a ring and then its address. Taking a
key back needs more: who withdraws it looks next whether somebody still uses it, and that look must not come before.
"""

from mooncache.kernels.atomics import add, fence, store
from mooncache.kernels.jit import kernel


@kernel("int64(int64, int64)")
def publish(address, value):
    """Write the int64 word at `address` by a release store: a reader of the value sees all that was written before."""
    store(address, value)
    return 0


@kernel("int64(int64)")
def rise(address):
    """Add 1 to the int64 word at `address`, which others count in as well; return its old value."""
    return add(address, 1)


@kernel("int64(int64)")
def withdraw_key(entry):
    """Write 0 to the key at `entry`, with a full fence: a worker that the caller sees at rest afterwards reads 0."""
    store(entry, 0)
    fence()
    return 0
