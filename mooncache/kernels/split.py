"""Requests become slices: those adjacent at both ends are merged, runs are cut, each slice's regions are found.

    requests   [ 0 ][ 1 ][ 2 ]     [ 3           ]        0, 1 and 2 lie side by side in source and in target
    slices     [ 0 .. 2      ]     [ 3    ][ 3   ]        3 is longer than a slice, or crosses a region's end

The same walk runs twice: first it only checks and counts, so that a refused call has changed nothing; then, with the
slots acquired, it fills them. Operands that another thread changes in between make it refuse, never overrun. A slice
is at most `slice_bytes` long; a remainder of up to `tail_bytes` joins the slice before it; no slice crosses the end of
a region.

Mostly each request is a slice as it is. So they are looked at in lots, by loops that the compiler makes vector
instructions of.
"""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.arrays import WORD
from mooncache.kernels.atomics import copy, fill_bytes, i8, i16, i32, i64
from mooncache.kernels.enums import Access, Opcode, Slice
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.table import table_at
from mooncache.kernels.regions import find
from mooncache.kernels.worker import peer_table
from mooncache.limits import CHUNK_SLICES as SLOTS

REQUEST_BYTES = 1 << 40
"""Longest request: 1 TiB. With REQUESTS it keeps every sum of lengths far from the end of an int64."""

REQUESTS = 1 << 22
"""Most requests of one batch."""

WAITING = int(Slice.WAITING)
COUNT_ONLY = -1
LOT = 64


# ------------------------------------------------------------------------------ where it reads and writes
@kernel
def forget_regions(ctl):
    """Forget the regions that were seen last."""
    for seen in (ctl.here, ctl.there):
        seen.position = -1
        seen.base = 0
        seen.end = 0


@kernel
def see(table, seen, at):
    """Let `seen` be the region of the table that contains the address `at`. False: none does."""
    if seen.base <= at < seen.end:
        return True
    position = find(table, at, seen.position)
    if position < 0:
        return False
    seen.position = position
    seen.base, seen.end = i64(table.bases)[position], i64(table.ends)[position]
    seen.slot = i64(table.slots)[position]
    return seen.base <= at < seen.end  # not so only where the table is being changed: see `submit.fill_aside`


@kernel
def look_up(ctl, local, remote, opcode, source, target):
    """Find the regions of both addresses; OK, or the Status that refuses this opcode there."""
    if not see(local, ctl.here, source):
        return np.int64(Status.SOURCE_NOT_REGISTERED)
    if opcode == Opcode.READ and i64(local.access)[ctl.here.slot] & Access.LOCAL == 0:
        return np.int64(Status.READ_ONLY)
    if not see(remote, ctl.there, target):
        return np.int64(Status.TARGET_NOT_REGISTERED)
    needed = Access.READ if opcode == Opcode.READ else Access.WRITE
    if i64(remote.access)[ctl.there.slot] & needed == 0:
        return np.int64(Status.ACCESS_DENIED)
    return np.int64(Status.OK)


@kernel
def place(ctl, cursor, chunk):
    """Fill from the first slot of a chunk on."""
    cursor.chunk = chunk
    if chunk >= 0:
        cursor.slot, cursor.end = chunk * SLOTS, chunk * SLOTS + i64(ctl.chunk_slices)[chunk]


@kernel
def has_room(ctl, cursor):
    """Return whether there is a slot to fill, in this chunk or in the next one."""
    if cursor.slot == cursor.end and i64(ctl.chunk_next)[cursor.chunk] >= 0:
        place(ctl, cursor, i64(ctl.chunk_next)[cursor.chunk])
    return cursor.slot < cursor.end


# ------------------------------------------------------------------------------ requests that are slices as they are
@kernel
def is_plain(ctl, first, n, longest):
    """Return whether each of `n` requests from `first` on becomes one slice.

    Each must lie within the regions seen last, and apart from the next request.
    """
    operands, here, there = ctl.operands, ctl.here, ctl.there
    sources, targets = i64(operands.sources + WORD * first), i64(operands.targets + WORD * first)
    lengths = i64(operands.lengths + WORD * first * operands.length_step)
    here_base, here_end, there_base, there_end = here.base, here.end, there.base, there.end
    here_span, there_span = np.uint64(here_end - here_base), np.uint64(there_end - there_base)
    wrong, pairs = np.int64(0), n - 1 + np.int64(first + n < operands.requests)
    if operands.length_step == 0:
        size = lengths[0]
        if size <= 0 or size > min(longest, min(here_end - here_base, there_end - there_base)):
            return False
        here_last, there_last = here_span - np.uint64(size), there_span - np.uint64(size)
        for i in range(n):
            wrong |= np.int64(np.uint64(sources[i] - here_base) > here_last)
            wrong |= np.int64(np.uint64(targets[i] - there_base) > there_last)
        for i in range(pairs):
            wrong |= np.int64(((sources[i + 1] - sources[i]) ^ size) | ((targets[i + 1] - targets[i]) ^ size) == 0)
        return wrong == 0
    for i in range(n):
        size = lengths[i]
        wrong |= np.int64(np.uint64(size - 1) >= np.uint64(longest))
        wrong |= np.int64(np.uint64(sources[i] - here_base) >= here_span) | np.int64(here_end - sources[i] < size)
        wrong |= np.int64(np.uint64(targets[i] - there_base) >= there_span) | np.int64(there_end - targets[i] < size)
    for i in range(pairs):
        size = lengths[i]
        wrong |= np.int64(((sources[i + 1] - sources[i]) ^ size) | ((targets[i + 1] - targets[i]) ^ size) == 0)
    return wrong == 0


@kernel
def fill_plain(ctl, first, n, longest):
    """Fill the next `n` slots of the cursor's chunk with as many plain requests from `first` on.

    False: what was copied is no longer what `is_plain` has seen, since another thread has written to the operands.
    """
    operands, cursor = ctl.operands, ctl.cursor
    slot, step = cursor.slot, operands.length_step
    copy(ctl.slice_source + WORD * slot, operands.sources + WORD * first, WORD * n)
    copy(ctl.slice_target + WORD * slot, operands.targets + WORD * first, WORD * n)
    lengths, column_length = i64(operands.lengths + WORD * first * step), i32(ctl.slice_length)
    for i in range(n):
        column_length[slot + i] = lengths[i * step]
    column_first, column_last = i32(ctl.slice_first), i32(ctl.slice_last)
    for i in range(n):
        column_first[slot + i] = first + i
    for i in range(n):
        column_last[slot + i] = first + i
    column_local, column_remote, column_state = i16(ctl.slice_local), i16(ctl.slice_remote), i16(ctl.slice_state)
    here_slot, there_slot = ctl.here.slot, ctl.there.slot
    for i in range(n):
        column_local[slot + i] = here_slot
    for i in range(n):
        column_remote[slot + i] = there_slot
    for i in range(n):
        column_state[slot + i] = WAITING
    fill_bytes(ctl.slice_attempts + slot, 0, n)
    cursor.slot = slot + n
    return holds(ctl, slot, n, longest)


@kernel
def holds(ctl, slot, n, longest):
    """Return whether `n` filled slices from `slot` on are within the regions seen last, and none too long."""
    source, target, length = i64(ctl.slice_source), i64(ctl.slice_target), i32(ctl.slice_length)
    here_base, here_end, there_base, there_end = ctl.here.base, ctl.here.end, ctl.there.base, ctl.there.end
    here_span, there_span, wrong = np.uint64(here_end - here_base), np.uint64(there_end - there_base), np.int64(0)
    for i in range(slot, slot + n):
        size = np.int64(length[i])
        wrong |= np.int64(size <= 0) | np.int64(size > longest)
        wrong |= np.int64(np.uint64(source[i] - here_base) >= here_span) | np.int64(here_end - source[i] < size)
        wrong |= np.int64(np.uint64(target[i] - there_base) >= there_span) | np.int64(there_end - target[i] < size)
    return wrong == 0


# ------------------------------------------------------------------------------ all others, one after another
@kernel
def merge(ctl, first):
    """Merge requests from `first` on that lie side by side at both ends; return their bytes and the next request.

    Bytes are negative, and the number that of the offending request, where a length cannot be.
    """
    operands = ctl.operands
    sources, targets, lengths = i64(operands.sources), i64(operands.targets), i64(operands.lengths)
    source_step, target_step, length_step = operands.source_step, operands.target_step, operands.length_step
    source, target = sources[first * source_step], targets[first * target_step]
    size, i = np.int64(0), first
    while True:
        length = lengths[i * length_step]
        if length <= 0 or length > REQUEST_BYTES:
            return np.int64(-1), i
        size += length
        i += 1
        if i == operands.requests or sources[i * source_step] != source + size:
            return size, i
        if targets[i * target_step] != target + size:
            return size, i


@kernel
def cut(ctl, local, remote, opcode, first, source, target, size, after):
    """Cut one run, which carries requests from `first` up to `after`, into slices; fill or count them.

    Returns how many, or minus a Status with the offending request's index in `refused`.
    """
    operands, cursor, here, there = ctl.operands, ctl.cursor, ctl.here, ctl.there
    lengths, length_step = i64(operands.lengths), operands.length_step
    longest, slice_bytes = ctl.slice_bytes + ctl.tail_bytes, ctl.slice_bytes
    request, request_end = first, lengths[first * length_step]
    done, slices = np.int64(0), np.int64(0)
    while done < size:
        at, to = source + done, target + done
        status = look_up(ctl, local, remote, opcode, at, to)
        if status != Status.OK:
            ctl.refused = request
            return -status
        take = min(size - done, min(here.end - at, there.end - to))
        if take > longest:
            take = slice_bytes
        done += take
        earliest = request
        while request_end < done and request + 1 < after:
            request += 1
            request_end += lengths[request * length_step]
        if cursor.chunk >= 0:
            if not has_room(ctl, cursor):
                return np.int64(-Status.OPERANDS_CHANGED)
            fill(ctl, at, to, take, earliest, request)
        slices += 1
        if request_end == done and done < size and request + 1 < after:
            request += 1
            request_end += lengths[request * length_step]
    return slices


@kernel
def fill(ctl, source, target, length, first, last):
    """Fill the cursor's slot with a slice of the regions seen last, which carries requests `first` to `last`."""
    slot = ctl.cursor.slot
    i64(ctl.slice_source)[slot], i64(ctl.slice_target)[slot] = source, target
    i32(ctl.slice_length)[slot] = length
    i32(ctl.slice_first)[slot], i32(ctl.slice_last)[slot] = first, last
    i16(ctl.slice_local)[slot], i16(ctl.slice_remote)[slot] = ctl.here.slot, ctl.there.slot
    i16(ctl.slice_state)[slot] = WAITING
    i8(ctl.slice_attempts)[slot] = 0
    ctl.cursor.slot = slot + 1


# ------------------------------------------------------------------------------ both
@kernel
def walk(ctl, peer, opcode, chunk):
    """Cut the operands' requests into slices; fill them into the chain that starts at `chunk`, or count only.

    Returns the number of slices, or minus a Status with the offending request's index in `refused`.
    """
    local, remote = table_at(ctl.local_table), peer_table(ctl, peer)
    operands, cursor, longest = ctl.operands, ctl.cursor, ctl.slice_bytes + ctl.tail_bytes
    sources, targets, n = i64(operands.sources), i64(operands.targets), operands.requests
    source_step, target_step = operands.source_step, operands.target_step
    forget_regions(ctl)
    place(ctl, cursor, chunk)
    i, slices = np.int64(0), np.int64(0)
    next_lot = np.int64(0) if source_step & target_step == 1 else n
    while i < n:
        if i >= next_lot:
            lot = min(LOT, n - i)
            if chunk >= 0:
                if not has_room(ctl, cursor):
                    return np.int64(-Status.OPERANDS_CHANGED)
                lot = min(lot, cursor.end - cursor.slot)
            if is_plain(ctl, i, lot, longest):
                if chunk >= 0 and not fill_plain(ctl, i, lot, longest):
                    return np.int64(-Status.OPERANDS_CHANGED)
                i += lot
                slices += lot
                continue
            next_lot = i + (LOT if ctl.here.position >= 0 else 1)  # no region was seen yet: the next lot may well be
        size, after = merge(ctl, i)
        if size < 0:
            ctl.refused = after
            return np.int64(-Status.LENGTH)
        made = cut(ctl, local, remote, opcode, i, sources[i * source_step], targets[i * target_step], size, after)
        if made < 0:
            return made
        slices += made
        i = after
    return slices
