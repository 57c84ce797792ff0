"""The inbox against a plain queue; and with two threads delivering while a third fetches."""

import select

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mooncache.inbox import Inbox, unpack
from mooncache.kernels import inbox as kernels
from mooncache.kernels.arrays import address_of
from mooncache.kernels.records.inbox import INBOX
from mooncache.kernels.records.inbox import SENDERS as COUNTS
from mooncache.kernels.settings import Settings
from mooncache.limits import SENDER_BYTES
from tests.helpers import in_threads, until
from tests.kernels import entries

N = 5000
SETTINGS = Settings(note_bytes=1000)
INBOX_NOTES, NOTE_BYTES = SETTINGS.notes, SETTINGS.note_stride


SENDERS = [kernels.sender(name) for name in ("a", "ü" * 255, "c" * 2000)]
for number, words in enumerate(SENDERS):
    words[0] = number  # its count: by their hashes they could share one
A, B = map(address_of, SENDERS[:2])


def fetch(inbox: Inbox) -> bytes | None:
    """The note alone."""
    entry = fetch_entry(inbox)
    return (
        None
        if entry is None
        else entry[kernels.LENGTH_BYTES + int.from_bytes(entry[: kernels.LENGTH_BYTES], "little") :]
    )


def fetch_entry(inbox: Inbox) -> bytes | None:
    buffer = np.zeros(SENDER_BYTES + NOTE_BYTES, np.uint8)
    length = kernels.fetch(address_of(inbox.words), buffer)
    return None if length == kernels.EMPTY else buffer[:length].tobytes()


def field(inbox: Inbox, name: str) -> int:
    return int(kernels.header(inbox.words)[name][0])


def waiting(inbox: Inbox) -> int:
    return field(inbox, "head") - field(inbox, "tail")


def readable(inbox: Inbox) -> bool:
    """Whether a sleeper would wake."""
    return bool(select.select([inbox._event_fd], [], [], 0)[0])


@given(st.lists(st.integers(0, 3), max_size=300))
def test_what_goes_in_comes_out_in_order(moves):
    inbox, queue, note = Inbox(SETTINGS), [], np.zeros(NOTE_BYTES // 8, np.int64)
    for i, move in enumerate(moves):
        assert readable(inbox) == bool(queue)
        if move:
            length = 8 + (i * 37) % (NOTE_BYTES - 8)
            note[1:] = i
            assert entries.deliver_many(address_of(inbox.words), A, note.ctypes.data, length, 1) == 0
            queue.append(note.tobytes()[:length])
        else:
            assert fetch(inbox) == (queue.pop(0) if queue else None)
    for expected in queue:
        assert fetch(inbox) == expected
    assert fetch(inbox) is None
    assert not readable(inbox)
    with inbox._watched() as descriptor:
        inbox.close()
        assert select.select([descriptor], [], [], 0)[0], "whoever sleeps is not told of the end"
        assert fetch(inbox) is None
        assert select.select([descriptor], [], [], 0)[0]


def test_two_threads_deliver_while_another_fetches():
    inbox = Inbox(SETTINGS)
    notes = [np.full(2, who, np.int64) for who in range(2)]
    heard: list[tuple[int, int]] = []

    def listen() -> None:
        while len(heard) < 2 * N:
            note = fetch(inbox)
            if note is not None:
                number, who = np.frombuffer(note, np.int64)
                heard.append((int(who), int(number)))

    in_threads(
        listen,
        *[
            lambda note=note: entries.deliver_many(address_of(inbox.words), A, note.ctypes.data, 16, N)
            for note in notes
        ],
    )
    for who in range(2):
        assert [number for w, number in heard if w == who] == list(range(N))
    inbox.close()


def test_a_sender_has_room_as_long_as_it_has_less_than_is_free():
    """So one alone fills half, and leaves room to the next, however many come."""
    inbox, note = Inbox(SETTINGS), np.zeros(1, np.int64)
    free = INBOX_NOTES
    for words in SENDERS:
        own = 0
        while own < free:
            assert entries.deliver_many(address_of(inbox.words), address_of(words), note.ctypes.data, 8, 1) == 0
            own, free = own + 1, free - 1
        assert not entries.try_deliver(address_of(inbox.words), address_of(words), note.ctypes.data, 8)
    assert waiting(inbox) == INBOX_NOTES - free
    assert free > 0
    while fetch(inbox) is not None:
        pass
    assert not inbox.words[INBOX.itemsize // 8 :][:COUNTS].any()
    inbox.close()


def test_a_sender_without_room_gets_in_when_one_of_its_notes_is_fetched():
    inbox, note = Inbox(SETTINGS), np.zeros(1, np.int64)
    for _ in range(INBOX_NOTES // 2):
        assert entries.deliver_many(address_of(inbox.words), A, note.ctypes.data, 8, 1) == 0
    assert entries.try_deliver(address_of(inbox.words), B, note.ctypes.data, 8)
    assert not entries.try_deliver(address_of(inbox.words), A, note.ctypes.data, 8)
    head = field(inbox, "head")

    def room() -> None:
        until(lambda: field(inbox, "head") == head, "nothing put in")
        assert fetch(inbox) is not None

    full, _ = in_threads(lambda: entries.deliver_many(address_of(inbox.words), A, note.ctypes.data, 8, 1), room)
    assert full >= 0
    assert waiting(inbox) == INBOX_NOTES // 2 + 1
    inbox.close()


def test_an_entry_says_who_sent_it():
    inbox, note = Inbox(SETTINGS), np.zeros(1, np.int64)
    for words in SENDERS:
        assert entries.try_deliver(address_of(inbox.words), address_of(words), note.ctypes.data, 8)
    names = [unpack(fetch_entry(inbox)).peer for _ in SENDERS]
    assert names == ["a", "ü" * 255, "c" * (SENDER_BYTES - kernels.LENGTH_BYTES)]
    inbox.close()


def test_a_shut_inbox_takes_nothing():
    inbox = Inbox(SETTINGS)
    inbox.close()
    assert field(inbox, "closed") == 1
    assert fetch(inbox) is None
