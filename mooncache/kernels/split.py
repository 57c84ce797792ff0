"""Requests -> slices: merge requests that are adjacent at both ends, cut runs into slices, find each slice's regions.

    requests   [ 0 ][ 1 ][ 2 ]     [ 3           ]        0, 1 and 2 lie side by side in source and in target
    slices     [ 0 .. 2      ]     [ 3    ][ 3   ]        3 is longer than a slice, or crosses a region's end

The same walk runs twice: first it only checks and counts, so that a refused call has changed nothing; then, with the
slots acquired, it fills them. Operands that another thread changes in between make it refuse, never overrun. A slice
is at most `slice_bytes` long; a remainder of up to `tail_bytes` joins the slice before it; no slice crosses the end of
a region.
"""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.atomics import i8, i16, i32, i64
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


@kernel
def walk(ctl, peer, opcode, n, sources, source_step, targets, target_step, lengths, length_step, chunk):
    """Cut `n` requests into slices; fill them into the chain that starts at `chunk`, or count only.

    Each operand is the address of int64 words and a step: 1 for an array, 0 for one value that holds for all.
    Returns the number of slices, or minus a Status with the offending request's index in the word REFUSED.
    """
    local, remote = table_at(ctl.local_table), peer_table(ctl, peer)
    local_bases, remote_bases = i64(local.bases), i64(remote.bases)
    local_ends, remote_ends = i64(local.ends), i64(remote.ends)
    local_slots, remote_slots = i64(local.slots), i64(remote.slots)
    local_access, remote_access = i64(local.access), i64(remote.access)
    needed = Access.READ if opcode == Opcode.READ else Access.WRITE
    slice_bytes, tail_bytes = ctl.slice_bytes, ctl.tail_bytes
    column_source, column_target = i64(ctl.slice_source), i64(ctl.slice_target)
    column_length, column_state = i32(ctl.slice_length), i16(ctl.slice_state)
    column_first, column_last = i32(ctl.slice_first), i32(ctl.slice_last)
    column_local, column_remote = i16(ctl.slice_local), i16(ctl.slice_remote)
    column_attempts = i8(ctl.slice_attempts)
    next_, used = i64(ctl.chunk_next), i64(ctl.chunk_slices)
    source_of, target_of, length_of = i64(sources), i64(targets), i64(lengths)

    slot, end = np.int64(0), np.int64(0)
    if chunk >= 0:
        slot, end = chunk * SLOTS, chunk * SLOTS + used[chunk]
    slices = np.int64(0)
    # The regions of the last slice, kept in registers: reading them from the tables again costs 4 ns a slice.
    here, here_base, here_end, here_slot = np.int64(-1), np.int64(0), np.int64(0), np.int64(0)
    there, there_base, there_end, there_slot = np.int64(-1), np.int64(0), np.int64(0), np.int64(0)
    i = np.int64(0)
    while i < n:
        source, target, length = source_of[i * source_step], target_of[i * target_step], length_of[i * length_step]
        if length <= 0 or length > REQUEST_BYTES:
            ctl.refused = i
            return np.int64(-Status.LENGTH)
        request, request_end, left = i, length, length
        i += 1
        while i < n and source_of[i * source_step] == source + left and target_of[i * target_step] == target + left:
            more = length_of[i * length_step]
            if more <= 0 or more > REQUEST_BYTES:
                ctl.refused = i
                return np.int64(-Status.LENGTH)
            left += more
            i += 1
        done = np.int64(0)
        while left > 0:
            if source < here_base or source >= here_end:
                here = find(local, source, here)
                if here < 0:
                    ctl.refused = request
                    return np.int64(-Status.SOURCE_NOT_REGISTERED)
                here_base, here_end, here_slot = local_bases[here], local_ends[here], local_slots[here]
                if opcode == Opcode.READ and local_access[here_slot] & Access.LOCAL == 0:
                    ctl.refused = request
                    return np.int64(-Status.READ_ONLY)
            if target < there_base or target >= there_end:
                there = find(remote, target, there)
                if there < 0:
                    ctl.refused = request
                    return np.int64(-Status.TARGET_NOT_REGISTERED)
                there_base, there_end, there_slot = remote_bases[there], remote_ends[there], remote_slots[there]
                if remote_access[there_slot] & needed == 0:
                    ctl.refused = request
                    return np.int64(-Status.ACCESS_DENIED)
            take = min(left, min(here_end - source, there_end - target))
            if take > slice_bytes + tail_bytes:
                take = slice_bytes
            done += take
            first = request
            while request_end < done and request + 1 < i:
                request += 1
                request_end += length_of[request * length_step]
            if chunk >= 0:
                if slot == end:
                    chunk = next_[chunk]
                    if chunk < 0:
                        return np.int64(-Status.OPERANDS_CHANGED)
                    slot, end = chunk * SLOTS, chunk * SLOTS + used[chunk]
                column_source[slot] = source
                column_target[slot] = target
                column_length[slot] = take
                column_first[slot] = first
                column_last[slot] = request
                column_local[slot] = here_slot
                column_remote[slot] = there_slot
                column_state[slot] = WAITING
                column_attempts[slot] = 0
                slot += 1
            slices += 1
            source += take
            target += take
            left -= take
            if request_end == done and left > 0 and request + 1 < i:
                request += 1
                request_end += length_of[request * length_step]
    return slices
