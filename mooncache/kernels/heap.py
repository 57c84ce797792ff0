"""The heap store: each slice really is a 216-byte object and a heap string from malloc, as in the upstream engine.

It exists so that the problem can be reproduced, measured for calibration and compared against. The object stands
beside the slice's pool slot: it is allocated and filled at submit, touched at completion, and freed one by one by
whatever the policy says. In the simulation MALLOC is 0 and only the account of the work remains.
"""

import numpy as np

from mooncache.kernels.account import account, raise_word, word
from mooncache.kernels.atomics import call_word, fill_bytes, i32, i64, peek, poke
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    CACHE_COUNT,
    CACHE_OBJECTS,
    COUNTERS,
    FREE,
    MALLOC,
    OBJECT_BATCH,
    OBJECT_BYTES,
    OBJECT_LENGTH,
    OBJECT_SOURCE,
    OBJECT_STATE,
    OBJECT_STRING,
    OBJECT_STRING_LENGTH,
    OBJECT_TARGET,
    SLICE_LENGTH,
    SLICE_OBJECT,
    SLICE_SOURCE,
    SLICE_TARGET,
    STRING_BYTES,
    WORD,
    Kind,
)

LETTER = 109  # what the path string is made of


@kernel
def new_object(ctl):
    """One slice object with its string, all bytes written, from malloc. 0 when malloc has no more."""
    object_ = call_word(word(ctl, MALLOC), OBJECT_BYTES)
    if object_ == 0:
        return 0
    string = call_word(word(ctl, MALLOC), STRING_BYTES)
    if string == 0:
        call_word(word(ctl, FREE), object_)
        return 0
    fill_bytes(object_, 0, OBJECT_BYTES)
    fill_bytes(string, LETTER, STRING_BYTES)
    poke(object_ + OBJECT_STRING, string)
    poke(object_ + OBJECT_STRING_LENGTH, STRING_BYTES)
    return object_


@kernel
def fill_object(ctl, object_, batch, slot):
    """Copy what the slot's columns say into its object."""
    poke(object_ + OBJECT_SOURCE, i64(word(ctl, SLICE_SOURCE))[slot])
    poke(object_ + OBJECT_TARGET, i64(word(ctl, SLICE_TARGET))[slot])
    poke(object_ + OBJECT_LENGTH, np.int64(i32(word(ctl, SLICE_LENGTH))[slot]))
    poke(object_ + OBJECT_BATCH, batch)


@kernel
def delete_object(ctl, object_):
    """Give the string and the object to free."""
    call_word(word(ctl, FREE), peek(object_ + OBJECT_STRING))
    call_word(word(ctl, FREE), object_)


@kernel
def allocate(ctl, batch, slot, n):
    """Make and fill `n` slice objects for the slots from `slot` on; the thread's cache is emptied first.

    Returns how many could be made; fewer than `n` only when malloc has no more.
    """
    reused = min(n, word(ctl, CACHE_COUNT))
    if reused > 0:
        account(ctl, Kind.HEAP_REUSED, reused)
    account(ctl, Kind.HEAP_ALLOCATED, n - reused)
    raise_word(ctl + CACHE_COUNT * WORD, -reused)
    if word(ctl, MALLOC) == 0:
        return n
    objects, cached = i64(word(ctl, SLICE_OBJECT)), i64(word(ctl, CACHE_OBJECTS))
    top = word(ctl, CACHE_COUNT)
    for i in range(n):
        object_ = cached[top + i] if i < reused else new_object(ctl)
        if object_ == 0:
            raise_word(word(ctl, COUNTERS) + Kind.HEAP_ALLOCATED * WORD, i - n)
            return np.int64(i)
        fill_object(ctl, object_, batch, slot + i)
        objects[slot + i] = object_
    return n


@kernel
def touch(ctl, slot, state):
    """Write a slice's new state into its object, as the upstream's completion does."""
    if word(ctl, MALLOC) != 0:
        poke(i64(word(ctl, SLICE_OBJECT))[slot] + OBJECT_STATE, state)


@kernel
def free_object(ctl, slot):
    """Give the slot's object to free. The caller accounts."""
    if word(ctl, MALLOC) != 0:
        delete_object(ctl, i64(word(ctl, SLICE_OBJECT))[slot])


@kernel
def keep_object(ctl, slot):
    """Keep the slot's object in this thread's cache, which must have room. The caller accounts."""
    if word(ctl, MALLOC) != 0:
        i64(word(ctl, CACHE_OBJECTS))[word(ctl, CACHE_COUNT)] = i64(word(ctl, SLICE_OBJECT))[slot]
    raise_word(ctl + CACHE_COUNT * WORD, 1)
