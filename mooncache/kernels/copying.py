"""Copies of bytes that this core will not read soon: past the caches, so that what is overwritten is not fetched first.

    lines   one cache line after the other
    banks   of four pages at a time one line each, so that four page walks are under way at once

Which of both is faster depends on the CPU and on the length: 16 KiB by banks took 0.75 of the time by lines on an AMD
Zen 4, and 2.1 on a Zen 3. So the lengths that go by banks are the engine's: see `copy_ways.py`.
"""

from mooncache.kernels.atomics import copy, prefetch, stream_line
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import LINE

STREAM_BYTES = 512  # from here on copying past the caches is faster than memcpy
BANK_BYTES = 4096
BANKS = 4
AHEAD_BYTES = 1024
"""Fetched of a block before its turn, while others are copied: a CPU fetches ahead within a page only."""


@kernel
def stream_copy(target, source, length, banks_from, banks_below):
    """Copy past the caches: by banks where `banks_from` <= length < `banks_below`, else by lines."""
    if length < STREAM_BYTES:
        copy(target, source, length)
        return
    done = -target % LINE
    copy(target, source, done)
    if banks_from <= length < banks_below:
        while length - done >= BANKS * BANK_BYTES:
            for i in range(done, done + BANK_BYTES, LINE):
                for bank in range(BANKS):
                    stream_line(target + i + bank * BANK_BYTES, source + i + bank * BANK_BYTES)
            done += BANKS * BANK_BYTES
    while length - done >= LINE:
        stream_line(target + done, source + done)
        done += LINE
    copy(target + done, source + done, length - done)


@kernel
def fetch_ahead(source, length):
    """Let the caches fetch the beginning of a block that is to be copied soon."""
    for at in range(source, source + min(length, AHEAD_BYTES), LINE):
        prefetch(at)
