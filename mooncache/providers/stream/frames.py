"""What goes over a connection: frames of many slices, a table in front, the bytes behind it.

    request   [ magic+kind | seq | count | bytes ][ address length key ] x count    WRITE and NOTE: then the bytes
    answer    [ magic+kind | seq | failed | bytes ][ index status 0 ] x failed      DATA: then the bytes and a trailer

All words are little-endian int64. A frame starts with HEADER_BYTES, which hold the first four table entries, so that a
small one takes a single read. Each request gets one answer, in order, when its bytes are in the target's memory (ACK)
or follow it (DATA). DATA's trailer is a byte for each slice asked for, up to whole words: 0, or why its bytes are not
true after all, a WcStatus: its region was withdrawn, or its memory gone, while they were sent.
"""

from enum import IntEnum

from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import peek, poke
from mooncache.kernels.jit import kernel
from mooncache.kernels.linux import IOV_BASE, IOV_LEN, IOVEC_BYTES
from mooncache.limits import NOTE_BYTES_MOST, NOTE_HEAD_BYTES

MAGIC = 0x4D434631 << 8  # "MCF1", above the kind's byte
HEADER_BYTES = 128
HEADER_WORDS = 4
ENTRY_BYTES = 24
FRAME_SLICES = 256  # two chains of 128; a frame's table then is 6 KiB
HEAD_BYTES_MAX = HEADER_WORDS * WORD + FRAME_SLICES * ENTRY_BYTES
SLICE_BYTES_MAX = 1 << 31  # longest slice that a frame may name; slice_bytes ends at half of it

H_KIND, H_SEQ, H_COUNT, H_BYTES = 0, 8, 16, 24  # byte offsets
DISCARD = 0  # base of an iovec whose bytes are to be dropped


class Frame(IntEnum):
    """Kinds of frames. The first three are requests and have the numbers of their opcodes."""

    WRITE = 0
    NOTE = 2
    READ = 4
    ACK = 8
    DATA = 9


@kernel
def head_bytes(count):
    """Length of a frame's head with a table of `count` entries."""
    return max(HEADER_BYTES, HEADER_WORDS * WORD + count * ENTRY_BYTES)


@kernel
def trailer_bytes(count):
    """Length of the trailer behind the bytes of a READ of `count` slices."""
    return -(-count // WORD) * WORD


@kernel
def write_header(head, kind, seq, count, size):
    """Fill in the four words at the start of a frame."""
    poke(head + H_KIND, MAGIC | kind)
    poke(head + H_SEQ, seq)
    poke(head + H_COUNT, count)
    poke(head + H_BYTES, size)


@kernel
def entry_at(head, i):
    """Address of a table's i-th entry: three words."""
    return head + HEADER_WORDS * WORD + i * ENTRY_BYTES


@kernel
def write_entry(head, i, first, second, third):
    """Fill in the i-th entry of a table."""
    entry = entry_at(head, i)
    poke(entry, first)
    poke(entry + WORD, second)
    poke(entry + 2 * WORD, third)


@kernel
def header_holds(head, incoming):
    """Whether a header is one of ours, of a request if `incoming`, else of an answer, with a table that fits."""
    kind = peek(head + H_KIND) - MAGIC
    if incoming:
        known = kind == Frame.WRITE or kind == Frame.NOTE or kind == Frame.READ
    else:
        known = kind == Frame.ACK or kind == Frame.DATA
    return known and 0 <= peek(head + H_COUNT) <= FRAME_SLICES and peek(head + H_BYTES) >= 0


@kernel
def request_holds(head):
    """Whether a request's table is sound: at least one entry, lengths in range, their sum as stated."""
    count, total = peek(head + H_COUNT), 0
    kind = peek(head + H_KIND) - MAGIC
    for i in range(count):
        length = peek(entry_at(head, i) + WORD)
        if length <= 0 or length > SLICE_BYTES_MAX:
            return False
        total += length
    if kind == Frame.NOTE and (count != 1 or total > NOTE_BYTES_MOST + NOTE_HEAD_BYTES):
        return False
    return count > 0 and peek(head + H_BYTES) == (0 if kind == Frame.READ else total)


@kernel
def set_range(iov, i, base, length):
    """Fill in the i-th of an array of iovecs."""
    poke(iov + i * IOVEC_BYTES + IOV_BASE, base)
    poke(iov + i * IOVEC_BYTES + IOV_LEN, length)


@kernel
def advance(iov, i, n):
    """Strike the next `n` bytes off an array of iovecs whose i-th is the first with any left; where it stands now."""
    while n > 0:
        at = iov + i * IOVEC_BYTES
        left = peek(at + IOV_LEN)
        if n < left:
            if peek(at + IOV_BASE) != DISCARD:
                poke(at + IOV_BASE, peek(at + IOV_BASE) + n)
            poke(at + IOV_LEN, left - n)
            return i
        n -= left
        poke(at + IOV_LEN, 0)
        i += 1
    return i
