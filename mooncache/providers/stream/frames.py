"""Frames: the bytes on a connection. A table of many slices in front, their bytes behind it.

    request   [ magic+kind | seq | count | bytes ][ address length key ] x count    WRITE and NOTE: then the bytes
    answer    [ magic+kind | seq | failed | bytes ][ index status 0 ] x failed      DATA: then the bytes and a trailer

All words are little-endian int64. A frame starts with HEADER_BYTES, which hold the first four table entries, so that a
small one takes a single read. Each request gets one answer, in order, when its bytes are in the target's memory (ACK)
or follow it (DATA). DATA's trailer is a byte for each slice asked for, up to whole words: 0, or why its bytes are not
true after all, a WcStatus: its region was withdrawn, or its memory gone, while they were sent.
"""

from enum import IntEnum

from mooncache.kernels.arrays import WORD
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import behind
from mooncache.kernels.records.linux import iovec_at
from mooncache.limits import NOTE_BYTES_MOST, NOTE_HEAD_BYTES
from mooncache.providers.stream.records import FRAME, SLICE, slice_at

MAGIC = 0x4D434631 << 8  # "MCF1", above the kind's byte
HEADER_BYTES = 128
FRAME_BYTES, ENTRY_BYTES = FRAME.itemsize, SLICE.itemsize
FRAME_SLICES = 256  # two chains of 128; a frame's table then is 6 KiB
HEAD_BYTES_MAX = FRAME_BYTES + FRAME_SLICES * ENTRY_BYTES
SLICE_BYTES_MAX = 1 << 31  # longest slice that a frame may name; slice_bytes ends at half of it

DISCARD = 0  # base of an iovec whose bytes are to be dropped


class Frame(IntEnum):
    """The kinds of frames. The first three are requests and have the numbers of their opcodes."""

    WRITE = 0
    NOTE = 2
    READ = 4
    ACK = 8
    DATA = 9


@kernel
def head_bytes(count):
    """Return the length of a frame's head with a table of `count` entries."""
    return max(HEADER_BYTES, FRAME_BYTES + count * ENTRY_BYTES)


@kernel
def trailer_bytes(count):
    """Return the length of the trailer behind the bytes of a READ of `count` slices."""
    return (count + WORD - 1) & -WORD


@kernel
def write_header(frame, kind, seq, count, size):
    """Fill in the four words at the start of a frame."""
    frame.kind = MAGIC | kind
    frame.seq = seq
    frame.count = count
    frame.bytes = size


@kernel
def slice_in(frame, i):
    """Return the i-th entry of a frame's table."""
    return slice_at(behind(frame), i)


@kernel
def write_entry(frame, i, first, second, third):
    """Fill in the i-th entry of a table."""
    entry = slice_in(frame, i)
    entry.first = first
    entry.second = second
    entry.third = third


@kernel
def header_holds(frame, incoming):
    """Check a header: is it one of ours, of a request if `incoming`, else of an answer, with a table that fits?"""
    kind = frame.kind - MAGIC
    if incoming:
        known = kind == Frame.WRITE or kind == Frame.NOTE or kind == Frame.READ
    else:
        known = kind == Frame.ACK or kind == Frame.DATA
    return known and 0 <= frame.count <= FRAME_SLICES and frame.bytes >= 0


@kernel
def request_holds(frame):
    """Check a request's table: at least one entry, lengths in range, their sum as stated."""
    count, total = frame.count, 0
    kind = frame.kind - MAGIC
    for i in range(count):
        length = slice_in(frame, i).second
        if length <= 0 or length > SLICE_BYTES_MAX:
            return False
        total += length
    if kind == Frame.NOTE and (count != 1 or total > NOTE_BYTES_MOST + NOTE_HEAD_BYTES):
        return False
    return count > 0 and frame.bytes == (0 if kind == Frame.READ else total)


@kernel
def set_range(iov, i, base, length):
    """Fill in the i-th of an array of iovecs."""
    iovec_at(iov, i).base = base
    iovec_at(iov, i).length = length


@kernel
def advance(iov, i, n):
    """Strike the next `n` bytes off an array of iovecs whose i-th is the first with any left; return the new i."""
    while n > 0:
        at = iovec_at(iov, i)
        left = at.length
        if n < left:
            if at.base != DISCARD:
                at.base += n
            at.length -= n
            return i
        n -= left
        at.length = 0
        i += 1
    return i
