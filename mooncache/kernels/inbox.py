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

from mooncache.kernels.arrays import WORD, aligned
from mooncache.kernels.atomics import address_of as address_in
from mooncache.kernels.atomics import call_read, call_write, copy, pause
from mooncache.kernels.jit import kernel
from mooncache.kernels.records.base import behind, cell_at, release, swap, where
from mooncache.kernels.records.inbox import COUNTS_BYTES, ENTRY, INBOX, SENDER, SENDERS, entry_at, inbox_at, sender_at
from mooncache.limits import SENDER_BYTES

LENGTH_BYTES = 2
ENTRY_BYTES = ENTRY.itemsize + SENDER_BYTES  # and the longest note's
EMPTY = -1


def sender(name: str) -> np.ndarray:
    """Make the int64 words that name the sender for `deliver`. Hashes differ by process: no name can aim at another's.

    Hashes differ by process, so that no name aims at another's count.
    """
    text = name.encode(errors="replace")[: SENDER_BYTES - LENGTH_BYTES]
    words, header = aligned((SENDER.itemsize + SENDER_BYTES) // WORD), SENDER.itemsize // WORD
    words[:header].view(SENDER)[0] = hash(name) % SENDERS, LENGTH_BYTES + len(text)
    said = np.frombuffer(len(text).to_bytes(LENGTH_BYTES, "little") + text, np.uint8)
    words[header:].view(np.uint8)[: said.size] = said
    return words


def header(words: np.ndarray) -> np.ndarray:
    """Return INBOX[1]: the beginning of an inbox's words."""
    return words[: INBOX.itemsize // WORD].view(INBOX)


@kernel
def lock(inbox):
    """Take the inbox's lock."""
    while swap(inbox, "lock", 1) != 0:
        pause()


@kernel
def entry_of(inbox, at):
    """Return entry number `at`."""
    return entry_at(behind(inbox) + COUNTS_BYTES + at % inbox.notes * (ENTRY_BYTES + inbox.bytes))


@kernel
def stir(inbox):
    """Make the eventfd readable."""
    inbox.buffer = 1
    call_write(inbox.write, inbox.event_fd, where(inbox, "buffer"), WORD)


@kernel
def deliver(inbox, who, address, length):
    """Append one notification of the sender `who`; return False, with nothing changed, without room or once closed.

    `inbox`, `who` and `address` are addresses.
    """
    inbox, who = inbox_at(inbox), sender_at(who)
    if length > inbox.bytes:
        return False
    counted = cell_at(behind(inbox), who.count)
    lock(inbox)
    head, tail = inbox.head, inbox.tail
    put = counted.value < inbox.notes - (head - tail) and inbox.closed == 0
    if put:
        entry = entry_of(inbox, head)
        entry.length = who.length + length
        entry.count = who.count
        copy(behind(entry), behind(who), who.length)
        copy(behind(entry) + who.length, address, length)
        counted.value += 1
        inbox.head = head + 1
        if head == tail:
            stir(inbox)
    release(inbox, "lock", 0)
    return put


@kernel("int64(int64, uint8[::1])")
def fetch(inbox, buffer):
    """Take the oldest entry out into `buffer`, uint8 of SENDER_BYTES and the longest note.

    Return its length, or EMPTY.
    """
    inbox = inbox_at(inbox)
    lock(inbox)
    head, tail, length = inbox.head, inbox.tail, np.int64(EMPTY)
    if tail < head:
        entry = entry_of(inbox, tail)
        length = entry.length
        copy(address_in(buffer), behind(entry), length)
        cell_at(behind(inbox), entry.count).value -= 1
        inbox.tail = tail + 1
        if tail + 1 == head and inbox.closed == 0:
            call_read(inbox.read, inbox.event_fd, where(inbox, "buffer"), WORD)
    release(inbox, "lock", 0)
    return length


@kernel("int64(int64)")
def shut(inbox):
    """Refuse what comes from now on, and wake all who sleep; afterwards nobody touches the eventfd. Once."""
    inbox = inbox_at(inbox)
    lock(inbox)
    inbox.closed = 1
    stir(inbox)
    release(inbox, "lock", 0)
    return 0
