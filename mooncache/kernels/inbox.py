"""An engine's inbox: notifications of batches that have arrived, until somebody fetches them.

Filled by workers (this engine's over sockets, a peer's in the same process), emptied by whoever asks; a lock of a few
instructions keeps them apart. A full inbox refuses: the sender is told, nothing is overwritten.

Who sent a notification is what the target knows of the way it came by, never what it says itself. A sender is refused
once it has as many here as places are free: one that nobody listens to leaves half of the inbox to others, two leave a
third, and so on (dynamic thresholds: Choudhury and Hahne, 1998).

The eventfd is readable exactly while there is something to fetch, and for ever once the inbox is shut: both are
changed under the lock. So whoever sleeps on it, and however many do, sleeps only on an empty inbox.
"""

import numpy as np

from mooncache.kernels.atomics import address_of as address_in
from mooncache.kernels.atomics import call_read, call_write, copy, exchange, pause, peek, poke, store
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import WORD, aligned
from mooncache.limits import SENDER_BYTES

SENDERS = 4096  # counts: senders whose names fall together share one
# words; I_NOTES: places, I_BYTES: of the longest note, whole words
I_LOCK, I_HEAD, I_TAIL, I_EVENT_FD, I_WRITE, I_READ, I_BUFFER, I_CLOSED, I_NOTES, I_BYTES, I_COUNTS = range(11)
I_ENTRIES = I_COUNTS + SENDERS
N_LENGTH, N_COUNT, N_BYTES = 0, 1, 2  # words of an entry: then the sender's name with its length, then the note
S_COUNT, S_LENGTH, S_BYTES = 0, 1, 2  # words of a sender: its count, its bytes
LENGTH_BYTES = 2
EMPTY = -1


def sender(name: str) -> np.ndarray:
    """int64 words that say who sends, for `deliver`. Hashes differ by process: no name can aim at another's count."""
    text = name.encode(errors="replace")[: SENDER_BYTES - LENGTH_BYTES]
    words = aligned(S_BYTES + SENDER_BYTES // WORD)
    words[[S_COUNT, S_LENGTH]] = hash(name) % SENDERS, LENGTH_BYTES + len(text)
    said = np.frombuffer(len(text).to_bytes(LENGTH_BYTES, "little") + text, np.uint8)
    words[S_BYTES:].view(np.uint8)[: said.size] = said
    return words


@kernel
def lock(inbox):
    """Keep others out."""
    while exchange(inbox + I_LOCK * WORD, 1) != 0:
        pause()


@kernel
def entry_of(inbox, at):
    """Address of entry number `at`."""
    size = N_BYTES * WORD + SENDER_BYTES + peek(inbox + I_BYTES * WORD)
    return inbox + I_ENTRIES * WORD + at % peek(inbox + I_NOTES * WORD) * size


@kernel
def stir(inbox):
    """Make the eventfd readable."""
    poke(inbox + I_BUFFER * WORD, 1)
    call_write(peek(inbox + I_WRITE * WORD), peek(inbox + I_EVENT_FD * WORD), inbox + I_BUFFER * WORD, WORD)


@kernel
def deliver(inbox, who, address, length):
    """Append one notification of the sender `who`; False, with nothing changed, if it has no room or that is closed."""
    if length > peek(inbox + I_BYTES * WORD):
        return False
    count, name_bytes = peek(who + S_COUNT * WORD), peek(who + S_LENGTH * WORD)
    counted = inbox + (I_COUNTS + count) * WORD
    lock(inbox)
    head, tail = peek(inbox + I_HEAD * WORD), peek(inbox + I_TAIL * WORD)
    put = peek(counted) < peek(inbox + I_NOTES * WORD) - (head - tail) and peek(inbox + I_CLOSED * WORD) == 0
    if put:
        entry = entry_of(inbox, head)
        poke(entry + N_LENGTH * WORD, name_bytes + length)
        poke(entry + N_COUNT * WORD, count)
        copy(entry + N_BYTES * WORD, who + S_BYTES * WORD, name_bytes)
        copy(entry + N_BYTES * WORD + name_bytes, address, length)
        poke(counted, peek(counted) + 1)
        poke(inbox + I_HEAD * WORD, head + 1)
        if head == tail:
            stir(inbox)
    store(inbox + I_LOCK * WORD, 0)
    return put


@kernel("int64(int64, uint8[::1])")
def fetch(inbox, buffer):
    """Take the oldest entry out into `buffer`, uint8[SENDER_BYTES + I_BYTES]; returns its length, or EMPTY."""
    lock(inbox)
    head, tail, length = peek(inbox + I_HEAD * WORD), peek(inbox + I_TAIL * WORD), np.int64(EMPTY)
    if tail < head:
        entry = entry_of(inbox, tail)
        length = peek(entry + N_LENGTH * WORD)
        copy(address_in(buffer), entry + N_BYTES * WORD, length)
        counted = inbox + (I_COUNTS + peek(entry + N_COUNT * WORD)) * WORD
        poke(counted, peek(counted) - 1)
        poke(inbox + I_TAIL * WORD, tail + 1)
        if tail + 1 == head and peek(inbox + I_CLOSED * WORD) == 0:
            call_read(peek(inbox + I_READ * WORD), peek(inbox + I_EVENT_FD * WORD), inbox + I_BUFFER * WORD, WORD)
    store(inbox + I_LOCK * WORD, 0)
    return length


@kernel("int64(int64)")
def shut(inbox):
    """Refuse what comes from now on, and wake all who sleep; afterwards nobody touches the eventfd. Once."""
    lock(inbox)
    poke(inbox + I_CLOSED * WORD, 1)
    stir(inbox)
    store(inbox + I_LOCK * WORD, 0)
    return 0
