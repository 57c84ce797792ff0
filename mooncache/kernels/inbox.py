"""An engine's inbox: notifications of batches that have arrived, until somebody fetches them.

Filled by workers (this engine's over sockets, a peer's in the same process), emptied by whoever asks; a lock of a few
instructions keeps them apart. A full inbox refuses: the sender is told, nothing is overwritten.

The eventfd is readable exactly while there is something to fetch, and for ever once the inbox is shut: both are
changed under the lock. So whoever sleeps on it, and however many do, sleeps only on an empty inbox.
"""

import numpy as np

from mooncache.kernels.atomics import address_of as address_in
from mooncache.kernels.atomics import call_read, call_write, copy, exchange, pause, peek, poke, store
from mooncache.kernels.jit import kernel
from mooncache.kernels.layout import WORD
from mooncache.limits import INBOX_NOTES, NOTE_BYTES

I_LOCK, I_HEAD, I_TAIL, I_EVENT_FD, I_WRITE, I_READ, I_BUFFER, I_CLOSED, I_ENTRIES = range(9)  # words
NOTE_WORDS = 1 + NOTE_BYTES // WORD  # length, then the bytes
INBOX_WORDS = I_ENTRIES + INBOX_NOTES * NOTE_WORDS
EMPTY = -1


@kernel
def lock(inbox):
    """Keep others out."""
    while exchange(inbox + I_LOCK * WORD, 1) != 0:
        pause()


@kernel
def entry_of(inbox, at):
    """Address of entry number `at`."""
    return inbox + (I_ENTRIES + at % INBOX_NOTES * NOTE_WORDS) * WORD


@kernel
def stir(inbox):
    """Make the eventfd readable."""
    poke(inbox + I_BUFFER * WORD, 1)
    call_write(peek(inbox + I_WRITE * WORD), peek(inbox + I_EVENT_FD * WORD), inbox + I_BUFFER * WORD, WORD)


@kernel
def deliver(inbox, address, length):
    """Append one notification; False, with nothing changed, when it is full or closed."""
    if length > NOTE_BYTES:
        return False
    lock(inbox)
    head, tail = peek(inbox + I_HEAD * WORD), peek(inbox + I_TAIL * WORD)
    put = head - tail < INBOX_NOTES and peek(inbox + I_CLOSED * WORD) == 0
    if put:
        entry = entry_of(inbox, head)
        poke(entry, length)
        copy(entry + WORD, address, length)
        poke(inbox + I_HEAD * WORD, head + 1)
        if head == tail:
            stir(inbox)
    store(inbox + I_LOCK * WORD, 0)
    return put


@kernel("int64(int64, uint8[::1])")
def fetch(inbox, buffer):
    """Take the oldest notification out into `buffer`, uint8[NOTE_BYTES]; returns its length, or EMPTY."""
    lock(inbox)
    head, tail, length = peek(inbox + I_HEAD * WORD), peek(inbox + I_TAIL * WORD), np.int64(EMPTY)
    if tail < head:
        entry = entry_of(inbox, tail)
        length = peek(entry)
        copy(address_in(buffer), entry + WORD, length)
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
