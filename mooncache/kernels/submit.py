"""Submitting: a caller's thread turns requests into a sealed batch in a worker's ring.

`prepare` cuts, acquires and fills; `publish` seals and hands over. The API does both in one call; the simulation
lets virtual time pass in between, since a worker cannot see a batch before its submitter has finished it. A batch that
is being filled has a row in state FREE, which is in no list: nobody can name it, nor close it.
"""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels import heap
from mooncache.kernels.account import account, clock
from mooncache.kernels.atomics import address_of, call_word, call_words, i16, i32, i64
from mooncache.kernels.batch import ACQUIRE, OPEN, SEAL, finish, move, put_back_row, slot_of, take_row
from mooncache.kernels.enums import AtOnce, Kind, Slice, Store
from mooncache.kernels.handle import GENERATION_MASK, batch_row, handle_of, resolve
from mooncache.kernels.jit import kernel
from mooncache.kernels.note import fill_note
from mooncache.kernels.pool import acquire_chunks, release_chunks
from mooncache.kernels.records.base import acquire, address, compare_swap, fetch_add, missing, where
from mooncache.kernels.records.control import control_at
from mooncache.kernels.records.ring import ring_at
from mooncache.kernels.records.shared import shared_at
from mooncache.kernels.records.table import PEER_BITS, table_at
from mooncache.kernels.ring import push
from mooncache.kernels.split import COUNT_ONLY, REQUESTS, walk
from mooncache.kernels.worker import end_turn, peer_table, ring_bell, try_turn, worker_row
from mooncache.limits import CHUNK_SLICES as SLOTS

AT_ONCE_BYTES = 64 * 1024
"""A batch up to this long is posted by its submitter while the worker sleeps: some ten microseconds, GIL held."""

ASIDE_REQUESTS = 1 << 16
"""From here on a batch is filled while other Python threads run: 0.2 ms and more. Whoever gives the GIL up has it back
after up to a switch interval, 5 ms, beside a thread that computes: so for less it is kept."""

FREE = int(Slice.FREE)
PEER_MASK = (1 << PEER_BITS) - 1


@kernel
def allocate_objects(ctl, batch):
    """Heap store: make the objects of all slices of a batch. Returns False, with none kept, when malloc has no more."""
    next_, used = i64(ctl.chunk_next), i64(ctl.chunk_slices)
    chunk = batch.first
    while chunk >= 0:
        made = heap.allocate(ctl, slot_of(ctl, batch), chunk * SLOTS, used[chunk])
        if made < used[chunk]:
            heap.free_objects(ctl, chunk * SLOTS, made)
            heap.free_chain(ctl, batch.first, chunk)
            return False
        chunk = next_[chunk]
    return True


@kernel
def give_up(ctl, batch):
    """Undo a batch that was not wholly filled. No bell for its row: refused submitters would keep waking each other."""
    next_, used, state = i64(ctl.chunk_next), i64(ctl.chunk_slices), i16(ctl.slice_state)
    chunk = batch.first
    while chunk >= 0:
        for slot in range(chunk * SLOTS, chunk * SLOTS + used[chunk]):
            state[slot] = FREE  # what waits is what a batch in flight has: see `calls.region_in_use`
        chunk = next_[chunk]
    release_chunks(ctl, batch)
    put_back_row(ctl, batch)


@kernel
def fill_batch(ctl, peer, opcode):
    """Cut the operands, acquire, fill. Returns the slot of a batch that nobody else sees yet, or minus a Status."""
    operands = ctl.operands
    slices = walk(ctl, peer, opcode, COUNT_ONLY)
    if slices < 0:
        return slices
    slots = slices + np.int64(operands.note_length > 0)
    if slots > ctl.capacity:
        return np.int64(-Status.TOO_LARGE)
    batch = take_row(ctl)
    if missing(batch):
        return np.int64(-Status.BATCHES_EMPTY)
    if slots > 0 and not acquire_chunks(ctl, batch, slot_of(ctl, batch), slots):
        give_up(ctl, batch)
        return np.int64(-Status.POOL_EMPTY)
    if walk(ctl, peer, opcode, batch.first) != slices:  # another thread wrote to the operands between the two walks
        give_up(ctl, batch)
        return np.int64(-Status.OPERANDS_CHANGED)
    if operands.note_length > 0:
        fill_note(ctl, batch, operands.requests, operands.note, operands.note_length)
    if ctl.store == Store.HEAP and not allocate_objects(ctl, batch):
        give_up(ctl, batch)
        return np.int64(-Status.HEAP_EMPTY)
    batch.slices = slots
    batch.remaining = slots
    batch.unposted = slices
    return slot_of(ctl, batch)


@kernel
def fill_aside(ctl, peer, opcode, table):
    """`fill_batch` while other Python threads run. Again, alone, if they changed meanwhile what it goes by.

    They may register and unregister, so that ranges were looked up in tables that were being changed, and even close
    the engine: nobody has seen the batch, so it is given up.
    """
    local, named = table_at(ctl.local_table), table.peer
    changes, renewed = local.changes, table.changes
    shared = shared_at(ctl.shared)
    fetch_add(shared, "filling", 1)  # the engine's memory stays until it is 0 again
    thread = call_word(ctl.save_thread, 0)
    filled = fill_batch(ctl, peer, opcode)
    call_word(ctl.restore_thread, thread)
    closed = acquire(shared, "stop") != 0
    stale = table.peer != named or address(peer_table(ctl, peer)) != address(table)
    changed = local.changes != changes or table.changes != renewed
    if filled >= 0 and (closed or stale or changed):
        batch = batch_row(ctl, filled)
        if ctl.store == Store.HEAP:
            heap.free_chain(ctl, batch.first, -1)
        give_up(ctl, batch)
    fetch_add(shared, "filling", -1)
    if closed:
        return np.int64(-Status.CLOSED)
    if stale:
        return np.int64(-Status.STALE_PEER)
    return fill_batch(ctl, peer, opcode) if changed else filled


@kernel
def prepare_batch(ctl, peer, opcode, deadline):
    """Check, cut, acquire, fill. Returns a handle to an open batch, or minus a Status with nothing changed.

    `peer`: as the header of its table names it, so that a row which is another's by now is not taken for it.
    """
    if acquire(shared_at(ctl.shared), "stop") != 0:
        return np.int64(-Status.CLOSED)  # no worker would take it
    table, named = peer_table(ctl, peer & PEER_MASK), peer
    if table.peer != named:
        return np.int64(-Status.STALE_PEER)
    epoch = acquire(table, "epoch")  # before the look at GONE: whoever sets that has raised this
    if acquire(table, "gone") != 0:
        return np.int64(-Status.PEER_GONE)
    peer, n = named & PEER_MASK, ctl.operands.requests
    if n > REQUESTS:
        return np.int64(-Status.TOO_LARGE)
    if n >= ASIDE_REQUESTS and ctl.save_thread != 0:
        filled = fill_aside(ctl, peer, opcode, table)
    else:
        filled = fill_batch(ctl, peer, opcode)
    if filled < 0:
        return filled
    batch = batch_row(ctl, filled)
    account(ctl, Kind.BATCHES_SUBMITTED, 1)
    account(ctl, Kind.REQUESTS, n)
    account(ctl, Kind.SLICES_FILLED, batch.slices)
    batch.cursor = batch.first
    batch.offset = 0
    batch.peer = peer
    batch.opcode = opcode
    batch.deadline = deadline
    batch.epoch = epoch
    batch.renewals = table.renewals
    move(batch, ACQUIRE)
    return handle_of(batch.generation, filled)


@kernel
def publish_row(ctl, batch):
    """Seal the batch and put it into a worker's ring. An empty batch is finished at once.

    Round robin over workers; those with a notification all by one worker a peer, which keeps their order.
    """
    batch.submitted_at = clock(ctl)
    move(batch, SEAL)
    if batch.slices == 0:
        finish(ctl, batch)
        return
    if batch.note >= 0:
        worker = batch.peer % ctl.workers
    else:
        worker = fetch_add(shared_at(ctl.shared), "next_worker", 1) % ctl.workers
    batch.worker = worker
    target = worker_row(ctl, worker)
    if target.epoll < 0 or not is_small(ctl, batch) or not lend_a_hand(ctl, target, batch):
        push(ring_at(target.ring), slot_of(ctl, batch))
        ring_bell(ctl, target)


@kernel
def is_small(ctl, batch):
    """Return whether the submitter may post the batch itself: within one chunk, at most AT_ONCE_BYTES long."""
    if batch.slices > SLOTS:
        return False
    length, first = i32(ctl.slice_length), batch.first * SLOTS
    size = np.int64(0)
    for slot in range(first, first + batch.slices):
        size += length[slot]
    return size <= AT_ONCE_BYTES


@kernel
def lend_a_hand(ctl, worker, batch):
    """Post a small batch in the place of a worker whose thread sleeps; False, with nothing done, when that is not so.

    Holds the GIL, so it does what this batch needs and nothing else of what there is to do.
    """
    if not try_turn(worker):
        return False
    done = call_words(ctl.turn, worker.ctl, address(batch))
    end_turn(ctl, worker)
    if done == AtOnce.BEGUN:
        ring_bell(ctl, worker)
    return done != AtOnce.REFUSED


@kernel
def submit_batch(ctl, peer, opcode, deadline):
    """`prepare_batch` and `publish_row`."""
    handle = prepare_batch(ctl, peer, opcode, deadline)
    if handle >= 0:
        publish_row(ctl, resolve(ctl, handle))
    return handle


@kernel
def take_operands(ctl, source, target, length):
    """Note the operands of a submit: arrays of int64[n], or of one that holds for all."""
    operands = ctl.operands
    operands.requests = max(source.size, target.size, length.size)
    operands.sources, operands.source_step = address_of(source), np.int64(source.size > 1)
    operands.targets, operands.target_step = address_of(target), np.int64(target.size > 1)
    operands.lengths, operands.length_step = address_of(length), np.int64(length.size > 1)
    operands.note_length = 0


@kernel("int64(int64, int64, int64, int64, int64[::1], int64[::1], int64[::1])")
def submit(ctl, peer, opcode, deadline, source, target, length):
    """Submit one batch; each operand has n entries, or one that holds for all.

    Gives the GIL up while it fills a batch of ASIDE_REQUESTS or more. Returns: a handle, or minus a Status with nothing
    changed (the offending request's index in the word `refused`).
    """
    ctl = control_at(ctl)
    take_operands(ctl, source, target, length)
    return submit_batch(ctl, peer, opcode, deadline)


@kernel("int64(int64, int64, int64, int64, int64[::1], int64[::1], int64[::1], uint8[::1])")
def submit_noted(ctl, peer, opcode, deadline, source, target, length, note):
    """`submit` with a notification: 1 to NOTE_STRIDE bytes, copied."""
    ctl = control_at(ctl)
    take_operands(ctl, source, target, length)
    ctl.operands.note, ctl.operands.note_length = address_of(note), note.size
    return submit_batch(ctl, peer, opcode, deadline)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def submit_one(ctl, peer, opcode, deadline, source, target, length):
    """Submit a batch of one request; what `submit` does without arrays."""
    ctl = control_at(ctl)
    request, operands = ctl.request, ctl.operands
    request.source, request.target, request.length = source, target, length
    operands.requests, operands.note_length = 1, 0
    operands.sources, operands.source_step = where(request, "source"), 0
    operands.targets, operands.target_step = where(request, "target"), 0
    operands.lengths, operands.length_step = where(request, "length"), 0
    return submit_batch(ctl, peer, opcode, deadline)


@kernel("int64(int64, int64, int64, int64, int64[::1], int64[::1], int64[::1])")
def prepare(ctl, peer, opcode, deadline, source, target, length):
    """First half of `submit`: an open batch, filled, that no worker knows of yet."""
    ctl = control_at(ctl)
    take_operands(ctl, source, target, length)
    return prepare_batch(ctl, peer, opcode, deadline)


@kernel("int64(int64, int64)")
def publish(ctl, handle):
    """Second half of `submit`. Returns OK or minus STALE_HANDLE."""
    ctl = control_at(ctl)
    batch = resolve(ctl, handle)
    if missing(batch) or batch.state != OPEN:
        return np.int64(-Status.STALE_HANDLE)
    publish_row(ctl, batch)
    return np.int64(Status.OK)


@kernel
def request_cancel(ctl, batch, handle):
    """Ask the batch's worker, once, to answer its unposted slices itself."""
    push(ring_at(worker_row(ctl, batch.worker).ring), ~handle)
    ring_bell(ctl, worker_row(ctl, batch.worker))


@kernel
def bump_generation(batch, handle):
    """Make the batch's handle stale; False when another thread did so first, even if the row is another batch's now."""
    generation = acquire(batch, "generation")
    if generation & GENERATION_MASK != handle >> 32:
        return False
    return compare_swap(batch, "generation", generation, generation + 1) == generation
