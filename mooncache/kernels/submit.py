"""From requests to a sealed batch in a worker's ring: what a caller's thread does.

`prepare` cuts, acquires and fills; `publish` seals and hands over. The API does both in one call; the simulation
lets virtual time pass in between, since a worker cannot see a batch before its submitter has finished it.
"""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels import heap
from mooncache.kernels.account import account, clock, word
from mooncache.kernels.atomics import add, address_of, call_words, cas, i16, i32, i64, load, peek, poke
from mooncache.kernels.batch import CLOSE, OPEN, SEAL, acquire_row, finish, move, return_row, slot_of
from mooncache.kernels.handle import GENERATION_MASK, handle_of, resolve
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_CURSOR,
    BATCH_DEADLINE,
    BATCH_EPOCH,
    BATCH_FIRST,
    BATCH_GENERATION,
    BATCH_NOTE,
    BATCH_OFFSET,
    BATCH_OPCODE,
    BATCH_PEER,
    BATCH_REMAINING,
    BATCH_RENEWALS,
    BATCH_REQUESTS,
    BATCH_SLICES,
    BATCH_STATE,
    BATCH_SUBMITTED_AT,
    BATCH_UNPOSTED,
    BATCH_WORKER,
    CAPACITY,
    CHUNK_NEXT,
    CHUNK_SLICES,
    PEER_BITS,
    PEER_TABLES,
    SCRATCH,
    SHARED,
    SHARED_NEXT_WORKER,
    SHARED_STOP,
    SLICE_LENGTH,
    SLICE_STATE,
    STORE,
    TABLE_EPOCH,
    TABLE_GONE,
    TABLE_PEER,
    TABLE_RENEWALS,
    TURN,
    WORD,
    WORKER_CTL,
    WORKER_EPOLL,
    WORKER_RING,
    WORKERS,
    AtOnce,
    Kind,
    Slice,
    Store,
)
from mooncache.kernels.note import fill_note
from mooncache.kernels.pool import acquire, release
from mooncache.kernels.ring import push
from mooncache.kernels.split import COUNT_ONLY, REQUESTS, walk
from mooncache.kernels.worker import end_turn, ring_bell, try_turn, worker_row
from mooncache.limits import CHUNK_SLICES as SLOTS

AT_ONCE_BYTES = 64 * 1024
"""A batch up to this long is posted by its submitter while the worker sleeps: some ten microseconds, GIL held."""

FREE = int(Slice.FREE)
PEER_MASK = (1 << PEER_BITS) - 1


@kernel
def allocate_objects(ctl, row):
    """Heap store: make the objects of all slices of a batch. Returns False, with none kept, when malloc has no more."""
    next_, used = i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES))
    batch = slot_of(ctl, row)
    chunk = peek(row + BATCH_FIRST * WORD)
    while chunk >= 0:
        made = heap.allocate(ctl, batch, chunk * SLOTS, used[chunk])
        if made < used[chunk]:
            account(ctl, Kind.HEAP_FREED, made)
            for slot in range(chunk * SLOTS, chunk * SLOTS + made):
                heap.free_object(ctl, slot)
            before = peek(row + BATCH_FIRST * WORD)
            while before != chunk:
                account(ctl, Kind.HEAP_FREED, used[before])
                for slot in range(before * SLOTS, before * SLOTS + used[before]):
                    heap.free_object(ctl, slot)
                before = next_[before]
            return False
        chunk = next_[chunk]
    return True


@kernel
def give_up(ctl, row):
    """Undo a batch that was not wholly filled. No bell for its row: refused submitters would keep waking each other."""
    next_, used, state = i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES)), i16(word(ctl, SLICE_STATE))
    chunk = peek(row + BATCH_FIRST * WORD)
    while chunk >= 0:
        for slot in range(chunk * SLOTS, chunk * SLOTS + used[chunk]):
            state[slot] = FREE  # what waits is what a batch in flight has: see `calls.region_in_use`
        chunk = next_[chunk]
    release(ctl, row)
    move(row, CLOSE)
    return_row(ctl, row)


@kernel
def prepare_words(
    ctl, peer, opcode, deadline, n, sources, source_step, targets, target_step, lengths, length_step, note, note_length
):
    """Check, cut, acquire, fill. Returns a handle to an open batch, or minus a Status with nothing changed.

    `peer`: as the header of its table names it, so that a row which is another's by now is not taken for it.
    `note`: address of `note_length` bytes that follow the data as a notification; none when that is 0.
    """
    if load(word(ctl, SHARED) + SHARED_STOP * WORD) != 0:
        return np.int64(-Status.CLOSED)  # no worker would take it
    table, named = i64(word(ctl, PEER_TABLES))[peer & PEER_MASK], peer
    if peek(table + TABLE_PEER * WORD) != named:
        return np.int64(-Status.STALE_PEER)
    epoch = load(table + TABLE_EPOCH * WORD)  # before the look at GONE: whoever sets that has raised this
    if load(table + TABLE_GONE * WORD) != 0:
        return np.int64(-Status.PEER_GONE)
    peer = named & PEER_MASK
    if n > REQUESTS:
        return np.int64(-Status.TOO_LARGE)
    slices = walk(ctl, peer, opcode, n, sources, source_step, targets, target_step, lengths, length_step, COUNT_ONLY)
    if slices < 0:
        return slices
    slots = slices + np.int64(note_length > 0)
    if slots > word(ctl, CAPACITY):
        return np.int64(-Status.TOO_LARGE)
    row = acquire_row(ctl)
    if row == 0:
        return np.int64(-Status.BATCHES_EMPTY)
    if slots > 0 and not acquire(ctl, row, slot_of(ctl, row), slots):
        give_up(ctl, row)
        return np.int64(-Status.POOL_EMPTY)
    first = peek(row + BATCH_FIRST * WORD)
    filled = walk(ctl, peer, opcode, n, sources, source_step, targets, target_step, lengths, length_step, first)
    if filled != slices:  # another thread wrote to the operands between the two walks
        give_up(ctl, row)
        return np.int64(-Status.OPERANDS_CHANGED)
    if note_length > 0:
        fill_note(ctl, row, n, note, note_length)
    if word(ctl, STORE) == Store.HEAP and not allocate_objects(ctl, row):
        give_up(ctl, row)
        return np.int64(-Status.HEAP_EMPTY)
    account(ctl, Kind.BATCHES_SUBMITTED, 1)
    account(ctl, Kind.REQUESTS, n)
    account(ctl, Kind.SLICES_FILLED, slots)
    poke(row + BATCH_SLICES * WORD, slots)
    poke(row + BATCH_REMAINING * WORD, slots)
    poke(row + BATCH_UNPOSTED * WORD, slices)
    poke(row + BATCH_CURSOR * WORD, peek(row + BATCH_FIRST * WORD))
    poke(row + BATCH_OFFSET * WORD, 0)
    poke(row + BATCH_PEER * WORD, peer)
    poke(row + BATCH_OPCODE * WORD, opcode)
    poke(row + BATCH_DEADLINE * WORD, deadline)
    poke(row + BATCH_EPOCH * WORD, epoch)
    poke(row + BATCH_RENEWALS * WORD, peek(table + TABLE_RENEWALS * WORD))
    poke(row + BATCH_REQUESTS * WORD, n)
    return handle_of(peek(row + BATCH_GENERATION * WORD), slot_of(ctl, row))


@kernel
def publish_row(ctl, row):
    """Seal the batch and put it into a worker's ring. An empty batch is finished at once.

    Round robin over workers; those with a notification all by one worker a peer, which keeps their order.
    """
    poke(row + BATCH_SUBMITTED_AT * WORD, clock(ctl))
    move(row, SEAL)
    if peek(row + BATCH_SLICES * WORD) == 0:
        finish(ctl, row)
        return
    if peek(row + BATCH_NOTE * WORD) >= 0:
        worker = peek(row + BATCH_PEER * WORD) % word(ctl, WORKERS)
    else:
        worker = add(word(ctl, SHARED) + SHARED_NEXT_WORKER * WORD, 1) % word(ctl, WORKERS)
    poke(row + BATCH_WORKER * WORD, worker)
    target = worker_row(ctl, worker)
    if peek(target + WORKER_EPOLL * WORD) < 0 or not is_small(ctl, row) or not lend_a_hand(ctl, target, row):
        push(peek(target + WORKER_RING * WORD), slot_of(ctl, row))
        ring_bell(ctl, target)


@kernel
def is_small(ctl, row):
    """Whether the submitter may post the batch itself: it is within one chunk, and at most AT_ONCE_BYTES long."""
    if peek(row + BATCH_SLICES * WORD) > SLOTS:
        return False
    length, first = i32(word(ctl, SLICE_LENGTH)), peek(row + BATCH_FIRST * WORD) * SLOTS
    size = np.int64(0)
    for slot in range(first, first + peek(row + BATCH_SLICES * WORD)):
        size += length[slot]
    return size <= AT_ONCE_BYTES


@kernel
def lend_a_hand(ctl, worker, row):
    """Post a small batch in the place of a worker whose thread sleeps; False, with nothing done, when that is not so.

    Holds the GIL, so it does what this batch needs and nothing else of what there is to do.
    """
    if not try_turn(worker):
        return False
    done = call_words(word(ctl, TURN), peek(worker + WORKER_CTL * WORD), row)
    end_turn(ctl, worker)
    if done == AtOnce.BEGUN:
        ring_bell(ctl, worker)
    return done != AtOnce.REFUSED


@kernel
def submit_words(
    ctl, peer, opcode, deadline, n, sources, source_step, targets, target_step, lengths, length_step, note, note_length
):
    """`prepare_words` and `publish_row`."""
    handle = prepare_words(
        ctl, peer, opcode, deadline, n, sources, source_step, targets, target_step, lengths, length_step, note,
        note_length,
    )  # fmt: skip
    if handle >= 0:
        publish_row(ctl, resolve(ctl, handle))
    return handle


@kernel("int64(int64, int64, int64, int64, int64[::1], int64[::1], int64[::1])")
def submit(ctl, peer, opcode, deadline, source, target, length):
    """Submit one batch; each operand has n entries, or one that holds for all.

    Returns: a handle, or minus a Status with nothing changed (the offending request's index in the word REFUSED).
    """
    n = max(source.size, target.size, length.size)
    return submit_words(
        ctl, peer, opcode, deadline, n,
        address_of(source), np.int64(source.size > 1), address_of(target), np.int64(target.size > 1),
        address_of(length), np.int64(length.size > 1), np.int64(0), np.int64(0),
    )  # fmt: skip


@kernel("int64(int64, int64, int64, int64, int64[::1], int64[::1], int64[::1], uint8[::1])")
def submit_noted(ctl, peer, opcode, deadline, source, target, length, note):
    """`submit` with a notification: 1 to NOTE_STRIDE bytes, copied."""
    n = max(source.size, target.size, length.size)
    return submit_words(
        ctl, peer, opcode, deadline, n,
        address_of(source), np.int64(source.size > 1), address_of(target), np.int64(target.size > 1),
        address_of(length), np.int64(length.size > 1), address_of(note), np.int64(note.size),
    )  # fmt: skip


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def submit_one(ctl, peer, opcode, deadline, source, target, length):
    """Submit a batch of one request; what `submit` does without arrays."""
    operands = ctl + (SCRATCH + 2) * WORD
    poke(operands, source)
    poke(operands + WORD, target)
    poke(operands + 2 * WORD, length)
    return submit_words(
        ctl, peer, opcode, deadline, 1, operands, 0, operands + WORD, 0, operands + 2 * WORD, 0, 0, 0
    )  # fmt: skip


@kernel("int64(int64, int64, int64, int64, int64[::1], int64[::1], int64[::1])")
def prepare(ctl, peer, opcode, deadline, source, target, length):
    """First half of `submit`: an open batch, filled, that no worker knows of yet."""
    n = max(source.size, target.size, length.size)
    return prepare_words(
        ctl, peer, opcode, deadline, n,
        address_of(source), np.int64(source.size > 1), address_of(target), np.int64(target.size > 1),
        address_of(length), np.int64(length.size > 1), np.int64(0), np.int64(0),
    )  # fmt: skip


@kernel("int64(int64, int64)")
def publish(ctl, handle):
    """Second half of `submit`. Returns OK or minus STALE_HANDLE."""
    row = resolve(ctl, handle)
    if row == 0 or peek(row + BATCH_STATE * WORD) != OPEN:
        return np.int64(-Status.STALE_HANDLE)
    publish_row(ctl, row)
    return np.int64(Status.OK)


@kernel
def request_cancel(ctl, row, handle):
    """Ask the batch's worker, once, to answer its unposted slices itself."""
    push(peek(worker_row(ctl, peek(row + BATCH_WORKER * WORD)) + WORKER_RING * WORD), ~handle)
    ring_bell(ctl, worker_row(ctl, peek(row + BATCH_WORKER * WORD)))


@kernel
def bump_generation(row, handle):
    """Make the batch's handle stale; False when another thread did so first, even if the row is another batch's now."""
    generation = load(row + BATCH_GENERATION * WORD)
    if generation & GENERATION_MASK != handle >> 32:
        return False
    return cas(row + BATCH_GENERATION * WORD, generation, generation + 1) == generation
