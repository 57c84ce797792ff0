"""What a caller can do with a batch it holds a handle to: wait, ask, cancel, close. And how an engine stops."""

import numpy as np

from mooncache.errors import Status
from mooncache.kernels.account import account, clock, word
from mooncache.kernels.atomics import (
    add,
    call_words,
    exchange,
    fence,
    futex_wake,
    i16,
    i32,
    i64,
    load,
    pause,
    peek,
    poke,
    store,
)
from mooncache.kernels.batch import CLOSE, DRAINING, OPEN, RECLAIMABLE, SEALED, announce, finished, move
from mooncache.kernels.handle import FREE, GENERATION_MASK, SLOT_MASK, batch_row, handle_of, resolve
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_AWAITED,
    BATCH_CANCEL_ASKED,
    BATCH_FAILED,
    BATCH_FIRST,
    BATCH_GENERATION,
    BATCH_PEER,
    BATCH_REMAINING,
    BATCH_STATE,
    BATCH_SUBMITTED_AT,
    BATCH_WAITERS,
    BATCH_WORKER,
    BATCHES,
    CHUNK_BATCH,
    CHUNK_NEXT,
    CHUNK_SLICES,
    CHUNKS,
    EPOCH_QUIET,
    IDLE_SINCE,
    LOCAL_TABLE,
    REFUSED,
    SHARED,
    SHARED_AWAITED,
    SHARED_BELL,
    SHARED_EPOCH,
    SHARED_REAPER_BELL,
    SHARED_REAPER_STOP,
    SHARED_STOP,
    SHARED_WAITERS,
    SLICE_FIRST,
    SLICE_LAST,
    SLICE_LENGTH,
    SLICE_LOCAL,
    SLICE_SOURCE,
    SLICE_STATE,
    SLICE_TARGET,
    SPIN,
    SYSCALL,
    TABLE_SLOTS,
    TURN,
    WAITS,
    WORD,
    WORKER_CTL,
    WORKER_EPOCH,
    WORKER_EPOLL,
    WORKER_IDLE,
    WORKER_SPINS,
    WORKERS,
    Kind,
    Slice,
)
from mooncache.kernels.linger import lingers
from mooncache.kernels.pool import EVERY_THREAD, wake_waiters
from mooncache.kernels.pump import ABANDONED, PAUSES, busy, sleep_on_descriptors, work_waits
from mooncache.kernels.queue import give_order
from mooncache.kernels.reclaim.dispatch import retire
from mooncache.kernels.reclaim.epoch import oldest_epoch
from mooncache.kernels.regions import take_out
from mooncache.kernels.submit import bump_generation, request_cancel
from mooncache.kernels.worker import end_turn, ring_bell, sleep_on, try_turn, wake_worker, worker_row
from mooncache.limits import CHUNK_SLICES as SLOTS

CANCELLED, DONE = int(Status.CANCELLED), int(Slice.DONE)
NEVER = (1 << 63) - 1


@kernel("int64(int64, int64)")
def status(ctl, handle):
    """OK when the batch is finished, NOT_FINISHED, or STALE_HANDLE."""
    row = resolve(ctl, handle)
    if row == 0:
        return np.int64(Status.STALE_HANDLE)
    return np.int64(Status.OK if finished(row) else Status.NOT_FINISHED)


@kernel("int64(int64, int64, int64)")
def read_word(ctl, handle, field):
    """A word of the batch's row, or -1 for a stale handle."""
    row = resolve(ctl, handle)
    return np.int64(-1) if row == 0 else peek(row + field * WORD)


@kernel("int64(int64, int64, int64)", nogil=True)
def wait(ctl, handle, ns):
    """Spin briefly, then sleep until the batch is finished, for at most `ns`. Gives the GIL up.

    Comes back at every wake-up, so that Python can run signal handlers. Returns what `status` does. Where the worker
    sleeps on descriptors, the waiting thread takes its turn and fetches the answer itself.
    """
    row = resolve(ctl, handle)
    if row == 0:
        return np.int64(Status.STALE_HANDLE)
    since = clock(ctl)
    worker = worker_row(ctl, peek(row + BATCH_WORKER * WORD))
    if peek(worker + WORKER_EPOLL * WORD) >= 0:
        poke(ctl + (WAITS + IDLE_SINCE) * WORD, 0)
        while not finished(row) and resolve(ctl, handle) != 0 and clock(ctl) - since < ns:
            if try_turn(worker):
                turn_until(ctl, worker, row, handle, since + ns)
            elif not lingers(ctl, ctl + WAITS * WORD):
                break
        spin = np.int64(0)
    else:
        spin = min(word(ctl, SPIN), ns)
    while not finished(row):
        for _ in range(PAUSES):
            pause()
        if clock(ctl) - since > spin:
            break
    left = ns - (clock(ctl) - since)
    if not finished(row) and left > 0:
        add(row + BATCH_WAITERS * WORD, 1)
        fence()
        state = load(row + BATCH_STATE * WORD)
        if state != RECLAIMABLE and resolve(ctl, handle) != 0:
            sleep_on(ctl, row + BATCH_STATE * WORD, state, left)
        add(row + BATCH_WAITERS * WORD, -1)
    if resolve(ctl, handle) == 0:
        return np.int64(Status.STALE_HANDLE)
    return np.int64(Status.OK if finished(row) else Status.NOT_FINISHED)


@kernel
def turn_until(ctl, worker, row, handle, end):
    """Be the worker, whose turn the caller holds, until the batch is finished or closed, or `end` has come.

    Lets go of the turn. Sleeps on the worker's descriptors like its own thread: Linux wakes the last to come.
    """
    its_ctl, happened = peek(worker + WORKER_CTL * WORD), np.int64(1)
    while not finished(row) and resolve(ctl, handle) != 0:
        happened = call_words(word(ctl, TURN), its_ctl, np.int64(0))
        if happened > 0:
            continue
        left = end - clock(ctl)
        if left <= 0 or load(word(ctl, SHARED) + SHARED_STOP * WORD) != 0:
            break
        if peek(worker + WORKER_SPINS * WORD) != 0 and busy(ctl, worker):
            pause()
        elif not lingers(its_ctl, worker + WORKER_IDLE * WORD):
            store(worker + WORKER_EPOCH * WORD, EPOCH_QUIET)
            sleep_on_descriptors(ctl, worker, left)
    end_turn(ctl, worker)
    if happened > 0 or work_waits(ctl, worker):
        ring_bell(ctl, worker)


@kernel("int64(int64, int64)")
def await_finish(ctl, handle):
    """Ask for a write to the engine's eventfd when the batch finishes. Returns what `status` does, looked up after."""
    row = resolve(ctl, handle)
    if row == 0:
        return np.int64(Status.STALE_HANDLE)
    store(row + BATCH_AWAITED * WORD, 1)
    fence()
    return np.int64(Status.OK if finished(row) else Status.NOT_FINISHED)


@kernel("int64(int64)")
def capacity_bell(ctl):
    """The bell's value now: read it before the attempt whose failure is to be waited out."""
    return load(word(ctl, SHARED) + SHARED_BELL * WORD)


@kernel("int64(int64, int64, int64)", nogil=True)
def wait_capacity(ctl, seen, ns):
    """Sleep until chunks or batch rows came back since the bell was `seen`, for at most `ns`. Gives the GIL up."""
    shared = word(ctl, SHARED)
    add(shared + SHARED_WAITERS * WORD, 1)
    fence()
    if load(shared + SHARED_BELL * WORD) == seen:
        sleep_on(ctl, shared + SHARED_BELL * WORD, seen, ns)
    add(shared + SHARED_WAITERS * WORD, -1)
    return 0


@kernel("int64(int64, int64)")
def await_capacity(ctl, seen):
    """Ask for a write to the engine's eventfd when chunks or batch rows come back; 1 when they have since the bell was
    `seen`, looked up after."""
    shared = word(ctl, SHARED)
    store(shared + SHARED_AWAITED * WORD, 1)
    fence()
    return np.int64(load(shared + SHARED_BELL * WORD) != seen)


@kernel("int64(int64, int64)")
def cancel(ctl, handle):
    """Ask the worker to answer the batch's unposted slices as cancelled. OK, or STALE_HANDLE."""
    row = resolve(ctl, handle)
    if row == 0:
        return np.int64(Status.STALE_HANDLE)
    if load(row + BATCH_STATE * WORD) == SEALED and exchange(row + BATCH_CANCEL_ASKED * WORD, 1) == 0:
        request_cancel(ctl, row, handle)
    return np.int64(Status.OK)


@kernel
def close_batch(ctl, handle, keep_failed):
    """What `close` does."""
    row = resolve(ctl, handle)
    if row == 0:
        return np.int64(Status.STALE_HANDLE)
    if keep_failed and finished(row) and peek(row + BATCH_FAILED * WORD) > 0:
        return np.int64(Status.HAS_FAILURES)
    if not bump_generation(row, handle):
        return np.int64(Status.STALE_HANDLE)
    account(ctl, Kind.BATCHES_CLOSED, 1)
    if move(row, CLOSE) == SEALED:
        announce(ctl, row)  # to threads and coroutines that wait for it: it is closed
        request_cancel(ctl, row, handle_of(peek(row + BATCH_GENERATION * WORD), handle & SLOT_MASK))
        return np.int64(Status.NOT_FINISHED)
    retire(ctl, row)
    return np.int64(Status.OK)


@kernel("int64(int64, int64, boolean)")
def close(ctl, handle, keep_failed):
    """End the caller's interest in the batch; its handle is stale from now on.

    Finished: reclaimed here, as the policy says. Not finished: detached; unposted slices are cancelled, and the worker
    reclaims it when the NIC has answered for the last. With `keep_failed` a finished batch with failed slices is left
    as it is, so that the caller can look at them first.

    Returns OK (reclaimed), NOT_FINISHED (detached), HAS_FAILURES (nothing changed) or STALE_HANDLE.
    """
    return close_batch(ctl, handle, keep_failed)


@kernel("int64(int64, int64)")
def quiesced(ctl, handle):
    """1 when no more bytes of the batch can move, whether it is closed or not; else 0."""
    slot = handle & SLOT_MASK
    if handle < 0 or slot >= word(ctl, BATCHES):
        return 1
    row = batch_row(ctl, slot)
    ahead = (load(row + BATCH_GENERATION * WORD) - (handle >> 32)) & GENERATION_MASK
    if ahead > 1:
        return 1
    state = load(row + BATCH_STATE * WORD)
    if ahead == 1:
        return np.int64(state != DRAINING or load(row + BATCH_REMAINING * WORD) == 0)
    return np.int64(state == RECLAIMABLE or state == FREE)


@kernel("int64(int64, int64)")
def failed(ctl, handle):
    """How many slices of a finished batch failed; 0: all have arrived. Or minus NOT_FINISHED or STALE_HANDLE."""
    row = resolve(ctl, handle)
    if row == 0:
        return np.int64(-Status.STALE_HANDLE)
    return peek(row + BATCH_FAILED * WORD) if finished(row) else np.int64(-Status.NOT_FINISHED)


@kernel("int64(int64, int64, int64[::1], int64[::1], int64[:, ::1])")
def failures(ctl, handle, request, why, where):
    """List failed requests: `request` and `why` (Status), each int64[requests], ascending, each request once.

    `where`, int64[requests, 3], are the local address, that at the peer and the length of what failed first of each.
    Returns how many, or minus NOT_FINISHED or STALE_HANDLE.
    """
    row = resolve(ctl, handle)
    if row == 0:
        return np.int64(-Status.STALE_HANDLE)
    if not finished(row):
        return np.int64(-Status.NOT_FINISHED)
    state, head, tail = i16(word(ctl, SLICE_STATE)), i32(word(ctl, SLICE_FIRST)), i32(word(ctl, SLICE_LAST))
    next_, used = i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_SLICES))
    n, listed = 0, np.int64(-1)
    chunk = peek(row + BATCH_FIRST * WORD)
    while chunk >= 0:
        for slot in range(chunk * SLOTS, chunk * SLOTS + used[chunk]):
            if state[slot] >= CANCELLED:
                for index in range(max(np.int64(head[slot]), listed + 1), np.int64(tail[slot]) + 1):
                    request[n] = index
                    why[n] = state[slot]
                    where[n, 0] = i64(word(ctl, SLICE_SOURCE))[slot]
                    where[n, 1] = i64(word(ctl, SLICE_TARGET))[slot]
                    where[n, 2] = i32(word(ctl, SLICE_LENGTH))[slot]
                    n += 1
                    listed = index
        chunk = next_[chunk]
    return n


@kernel
def region_in_use(ctl, region):
    """Slices without an answer whose local region is the slot `region`: while there are any it must stay registered.

    Looks through all chunks, not along chains: workers, and the reaper, take chunks out of these meanwhile. No chunk
    becomes another batch's, since submitting takes the GIL that this holds; and what is answered stays so.
    """
    state, local = i16(word(ctl, SLICE_STATE)), i16(word(ctl, SLICE_LOCAL))
    owner, used = i64(word(ctl, CHUNK_BATCH)), i64(word(ctl, CHUNK_SLICES))
    n = 0
    for chunk in range(word(ctl, CHUNKS)):
        row = batch_row(ctl, owner[chunk])
        at = load(row + BATCH_STATE * WORD)
        if at == SEALED or (at == DRAINING and load(row + BATCH_REMAINING * WORD) > 0):
            for i in range(chunk * SLOTS, chunk * SLOTS + used[chunk]):
                n += local[i] == region and 0 < state[i] < DONE
    return n


@kernel("int64(int64, int64)")
def oldest_submit(ctl, peer):
    """When the oldest batch to the peer in row `peer` that has slices without an answer was submitted; NEVER: none."""
    oldest = np.int64(NEVER)
    for slot in range(word(ctl, BATCHES)):
        row = batch_row(ctl, slot)
        at = load(row + BATCH_STATE * WORD)
        if at == SEALED or at == OPEN or (at == DRAINING and load(row + BATCH_REMAINING * WORD) > 0):
            if peek(row + BATCH_PEER * WORD) == peer:
                oldest = min(oldest, peek(row + BATCH_SUBMITTED_AT * WORD))
    return oldest


@kernel("int64(int64)")
def grace(ctl):
    """What was withdrawn before this call is out of every worker's hands once `graced` says so of the result."""
    fence()
    return add(word(ctl, SHARED) + SHARED_EPOCH * WORD, 1) + 1


@kernel("int64(int64, int64)")
def graced(ctl, epoch):
    """1 when every worker has begun a new round since `grace` returned `epoch`, or rests."""
    fence()
    return np.int64(oldest_epoch(ctl) >= epoch)


@kernel("int64(int64, int64[::1])")
def withdraw(ctl, regions):
    """Forget the local regions with these slots, unless slices still use one of them.

    One call, which holds the GIL: no submit can come in between. Returns how many slices do; 0: they are gone.
    """
    users = np.int64(0)
    for i in range(regions.size):
        users += region_in_use(ctl, regions[i])
    if users == 0:
        table = word(ctl, LOCAL_TABLE)
        slots = i64(peek(table + TABLE_SLOTS * WORD))
        for i in range(regions.size):
            at = 0
            while slots[at] != regions[i]:
                at += 1
            take_out(table, at)
    return users


@kernel("int64(int64)")
def stop(ctl):
    """Close every batch, whoever holds it, refuse new ones, and let workers leave once they are idle.

    One call, which holds the GIL: no submit can come in between. Returns how many batches it closed.
    """
    shared, closed = word(ctl, SHARED), 0
    for slot in range(word(ctl, BATCHES)):
        row = batch_row(ctl, slot)
        state = load(row + BATCH_STATE * WORD)
        if state == OPEN or state == SEALED or state == RECLAIMABLE:
            close_batch(ctl, handle_of(load(row + BATCH_GENERATION * WORD), slot), False)
            closed += 1
    store(shared + SHARED_STOP * WORD, 1)
    wake_waiters(ctl)  # for slots, which will not come
    for i in range(word(ctl, WORKERS)):
        wake_worker(ctl, worker_row(ctl, i))
    return closed


@kernel("int64(int64)")
def stop_reaper(ctl):
    """Let the reaper leave once it has freed everything. Only after the workers, which still hand it batches."""
    shared = word(ctl, SHARED)
    store(shared + SHARED_REAPER_STOP * WORD, 1)
    add(shared + SHARED_REAPER_BELL * WORD, 1)
    futex_wake(word(ctl, SYSCALL), shared + SHARED_REAPER_BELL * WORD, EVERY_THREAD)
    return 0


@kernel("int64(int64, int64, int64, int64)")
def order(ctl, worker, queue, what):
    """Give worker number `worker` an order (layout.Order) about the queue whose row is at `queue`."""
    row = worker_row(ctl, worker)
    give_order(row, queue, what)
    ring_bell(ctl, row)
    return 0


@kernel("int64(int64)")
def refused_request(ctl):
    """Index of the request that the last refused submit of this thread stumbled over."""
    return word(ctl, REFUSED)


@kernel("int64(int64)")
def abandon(ctl):
    """Let workers leave without the NIC's last answers. Whatever it still writes to must never be freed."""
    store(word(ctl, SHARED) + SHARED_STOP * WORD, ABANDONED)
    return 0
