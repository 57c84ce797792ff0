"""The heap store: each slice is a 216-byte object and a heap string from malloc, as in the upstream engine.

It exists so that the problem can be reproduced, measured for calibration and compared against. The object stands
beside the slice's pool slot: it is allocated and filled at submit, touched at completion, and freed one by one by
whatever the policy says. In the simulation MALLOC is 0 and only the account of the work remains.
"""

import numpy as np

from mooncache.kernels.account import account
from mooncache.kernels.atomics import call_word, fill_bytes, i32, i64
from mooncache.kernels.enums import Kind
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.object import OBJECT_BYTES, STRING_BYTES, object_at
from mooncache.limits import CHUNK_SLICES as SLOTS

LETTER = 109  # what the path string is made of


@kernel
def new_object(ctl):
    """Make one slice object with its string, all bytes written, by malloc. 0 when malloc has no more."""
    object_ = call_word(ctl.malloc, OBJECT_BYTES)
    if object_ == 0:
        return 0
    string = call_word(ctl.malloc, STRING_BYTES)
    if string == 0:
        call_word(ctl.free, object_)
        return 0
    fill_bytes(object_, 0, OBJECT_BYTES)
    fill_bytes(string, LETTER, STRING_BYTES)
    object_at(object_).string = string
    object_at(object_).string_length = STRING_BYTES
    return object_


@kernel
def fill_object(ctl, object_, batch, slot):
    """Copy the slot's columns into its object."""
    object_ = object_at(object_)
    object_.source = i64(ctl.slice_source)[slot]
    object_.target = i64(ctl.slice_target)[slot]
    object_.length = np.int64(i32(ctl.slice_length)[slot])
    object_.batch = batch


@kernel
def delete_object(ctl, object_):
    """Free the object and its string."""
    call_word(ctl.free, object_at(object_).string)
    call_word(ctl.free, object_)


@kernel
def allocate(ctl, batch, slot, n):
    """Make and fill `n` slice objects for the slots from `slot` on; the thread's cache is emptied first.

    Returns how many could be made; fewer than `n` only when malloc has no more.
    """
    reused = min(n, ctl.cache_count)
    if reused > 0:
        account(ctl, Kind.HEAP_REUSED, reused)
    account(ctl, Kind.HEAP_ALLOCATED, n - reused)
    ctl.cache_count -= reused
    if ctl.malloc == 0:
        return n
    objects, cached = i64(ctl.slice_object), i64(ctl.cache_objects)
    top = ctl.cache_count
    for i in range(n):
        object_ = cached[top + i] if i < reused else new_object(ctl)
        if object_ == 0:
            i64(ctl.counters)[np.int64(Kind.HEAP_ALLOCATED)] += i - n
            return np.int64(i)
        fill_object(ctl, object_, batch, slot + i)
        objects[slot + i] = object_
    return n


@kernel
def touch(ctl, slot, state):
    """Write a slice's new state into its object, as the upstream's completion does."""
    if ctl.malloc != 0:
        object_at(i64(ctl.slice_object)[slot]).state = state


@kernel
def free_object(ctl, slot):
    """Free the slot's object. The caller accounts."""
    if ctl.malloc != 0:
        delete_object(ctl, i64(ctl.slice_object)[slot])


@kernel
def free_objects(ctl, slot, n):
    """Give the objects of `n` slots from `slot` on to free, and account for it."""
    account(ctl, Kind.HEAP_FREED, n)
    for i in range(slot, slot + n):
        free_object(ctl, i)


@kernel
def free_chain(ctl, chunk, end):
    """Give the objects of all slots in use from `chunk` on to free, up to the chunk `end`, or -1."""
    while chunk != end:
        free_objects(ctl, chunk * SLOTS, i64(ctl.chunk_slices)[chunk])
        chunk = i64(ctl.chunk_next)[chunk]


@kernel
def keep_object(ctl, slot):
    """Keep the slot's object in this thread's cache, which must have room. The caller accounts."""
    if ctl.malloc != 0:
        i64(ctl.cache_objects)[ctl.cache_count] = i64(ctl.slice_object)[slot]
    ctl.cache_count += 1
