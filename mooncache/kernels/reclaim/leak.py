"""Never free anything. The upstream engine of February to April 2025: fast, then out of memory. A baseline only."""

from mooncache.kernels.account import account, word
from mooncache.kernels.atomics import add, exchange, i64, load, peek, poke
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import (
    BATCH_CHUNKS,
    BATCH_FIRST,
    BATCH_LAST,
    BATCH_SLICES,
    CHUNK_GENERATION,
    CHUNK_NEXT,
    SHARED,
    SHARED_FREE_CHUNKS,
    SHARED_FREE_COUNT,
    SHARED_LEAKED_CHUNKS,
    SHARED_LEAKED_COUNT,
    WORD,
    Kind,
)
from mooncache.kernels.pool import INDEX_MASK, push_chain


@kernel
def on_close(ctl, row):
    """Forget the chain: it leaves circulation and is counted."""
    if peek(row + BATCH_FIRST * WORD) < 0:
        return
    shared = word(ctl, SHARED)
    account(ctl, Kind.SLICES_LEAKED, peek(row + BATCH_SLICES * WORD))
    add(shared + SHARED_LEAKED_COUNT * WORD, peek(row + BATCH_CHUNKS * WORD))
    push_chain(
        shared + SHARED_LEAKED_CHUNKS * WORD,
        word(ctl, CHUNK_NEXT),
        peek(row + BATCH_FIRST * WORD),
        peek(row + BATCH_LAST * WORD),
    )
    poke(row + BATCH_FIRST * WORD, -1)
    poke(row + BATCH_LAST * WORD, -1)
    poke(row + BATCH_CHUNKS * WORD, 0)


@kernel("int64(int64)")
def restart(ctl):
    """Put all leaked chunks back, as a new process would; returns how many. Only while no other thread uses the pool.

    The simulation calls it when a leaking engine has run out, so that the baseline can be as long as the run.
    """
    shared = word(ctl, SHARED)
    first = (exchange(shared + SHARED_LEAKED_CHUNKS * WORD, 0) & INDEX_MASK) - 1
    if first < 0:
        return 0
    next_, generation = i64(word(ctl, CHUNK_NEXT)), i64(word(ctl, CHUNK_GENERATION))
    last = first
    while True:
        generation[last] += 1
        if next_[last] < 0:
            break
        last = next_[last]
    count = load(shared + SHARED_LEAKED_COUNT * WORD)
    add(shared + SHARED_LEAKED_COUNT * WORD, -count)
    push_chain(shared + SHARED_FREE_CHUNKS * WORD, word(ctl, CHUNK_NEXT), first, last)
    add(shared + SHARED_FREE_COUNT * WORD, count)
    return count
