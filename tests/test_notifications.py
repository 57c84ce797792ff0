"""Notifications: delivered once, in order, after the data, and never for a batch that failed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncache import EngineClosed, Failure, Notification, Status, TransferFailed, UsageError
from mooncache.discovery.fields import is_name
from mooncache.errors import REASON
from mooncache.inbox import Inbox, pack, unpack
from mooncache.kernels.inbox import sender
from mooncache.kernels.records.inbox import SENDER
from mooncache.kernels.verbs import WcStatus
from mooncache.limits import INBOX_NOTES, NOTE_BYTES, NOTE_HEAD_BYTES, REGIONS
from mooncache.providers.inprocess.emulated import Emulated, Nic
from mooncache.providers.inprocess.faults import Action, Fault, random_faults
from mooncache.providers.inprocess.loopback import Loopback
from mooncache.providers.shm.provider import Shm
from mooncache.providers.stream.tcp import Tcp
from tests.helpers import POLICIES, STORES, Pair, Task, assert_balanced, awaited, in_threads, looks_held, until

WIRES = {
    "loopback": Loopback,
    "emulated": lambda: Emulated(Nic(latency_ns=5000)),
    "tcp": lambda: Tcp(lanes=2),
    "shm": Shm,
}
NOTHING = np.zeros(0, np.int64)


@pytest.fixture(params=WIRES)
def wired(request, pairs) -> Pair:
    """Two engines over each wire, with two workers each."""
    return pairs(WIRES[request.param](), WIRES[request.param](), workers=2, slices=16 * 1024, queue_depth=64, chain=16)


def messages(pair: Pair) -> list[bytes]:
    """What has arrived at `there` by now."""
    return [note.message for note in pair.there.notifications()]


def offsets(n: int) -> np.ndarray:
    """Scattered requests of 64 bytes."""
    return np.arange(n, dtype=np.int64) * 65


def test_each_arrives_once_after_its_data_and_in_the_order_of_submission(wired):
    sizes = [1, 3000, 2, 500, 1, 1, 2500, 64, 3]
    batches = [wired.write(offsets(n), notify=f"{i} of {n}") for i, n in enumerate(sizes)]
    first = wired.there.notifications().get(20)
    assert first == Notification(wired.here.name, b"0 of 1")
    np.testing.assert_array_equal(wired.target[:64], wired.source[:64])
    for batch, n in zip(batches, sizes, strict=True):
        assert batch.wait(20).slices == n
        batch.close()
    assert messages(wired) == [f"{i} of {n}".encode() for i, n in enumerate(sizes)][1:]
    wired.close()
    assert assert_balanced(wired.here).counts["slices_filled"] == sum(sizes) + len(sizes)


def test_the_data_is_in_memory_when_the_notification_is(wired):
    for n in (1, 700, 2000):
        wired.target[:] = 0
        batch = wired.write(offsets(n), notify=b"look")
        assert wired.there.notifications().get(20).message == b"look"
        for at in offsets(n):
            np.testing.assert_array_equal(wired.target[at : at + 64], wired.source[at : at + 64])
        batch.wait(20).close()


def test_reads_and_empty_batches_can_carry_one(wired):
    wired.read(offsets(10), notify="read").wait(20).close()
    wired.here.write(wired.peer, NOTHING, NOTHING, 8, notify="alone").wait(20).close()
    assert messages(wired) == [b"read", b"alone"]


def test_it_is_never_sent_for_a_batch_that_failed(wired):
    wired.write(0, notify="before").wait(20).close()
    wired.remote.unregister()
    with looks_held(wired.here):  # else the second may be refused at once
        failing = [wired.write(offsets(n), notify="never") for n in (1, 400)]
    alone = wired.here.write(wired.peer, NOTHING, NOTHING, 8, notify="after")
    for batch, n in zip(failing, (1, 400), strict=True):
        with pytest.raises(TransferFailed, match=f"{n} of {n} requests"):
            batch.wait(20)
        assert [f.request for f in batch.failures] == list(range(n))  # what was not sent is no failure of its own
        batch.close()
    alone.wait(20).close()
    assert messages(wired) == [b"before", b"after"]
    wired.close()
    assert_balanced(wired.here)


@pytest.mark.parametrize("length", [0, 1, 1024, 38_000, NOTE_BYTES])
def test_a_long_message_arrives_as_it_was_sent(wired, length):
    message = np.random.Generator(np.random.Philox(length)).bytes(length)
    wired.here.write(wired.peer, NOTHING, NOTHING, 8, notify=message).wait(20).close()
    wired.write(offsets(5), notify=message).wait(20).close()
    assert messages(wired) == [message] * 2


@pytest.mark.parametrize("wire", WIRES)
def test_the_longest_message_and_how_many_are_kept_are_settings(engines, wire):
    here = engines(provider=WIRES[wire]())
    there = engines(provider=WIRES[wire](), notes=4, note_bytes=100)

    def send(message: bytes) -> None:
        here.write(there.name, NOTHING, NOTHING, 8, notify=message).wait(20).close()

    with pytest.raises(TransferFailed, match=r"INBOX_FULL .* note_bytes"):
        send(b"x" * 1000)
    send(b"x" * 100)
    send(b"y")
    with pytest.raises(TransferFailed, match="INBOX_FULL"):
        send(b"")
    assert [note.message for note in there.notifications()] == [b"x" * 100, b"y"]
    with pytest.raises(UsageError, match="at most 100 bytes, got 101"):
        there.write(here.name, NOTHING, NOTHING, 8, notify=b"x" * 101)


ALONE = INBOX_NOTES // 2  # what one sender may leave there


def test_an_inbox_without_room_fails_the_notification_and_loses_nothing(wired):
    for i in range(ALONE):
        wired.here.write(wired.peer, NOTHING, NOTHING, 8, notify=str(i)).wait(20).close()
    batch = wired.write(offsets(5), notify="one too many")
    with pytest.raises(TransferFailed, match="failed, all 5 requests arrived: INBOX_FULL"):
        batch.wait(20)
    assert batch.failures == (Failure(5, Status.INBOX_FULL, REASON[Status.INBOX_FULL]),)
    batch.close()
    np.testing.assert_array_equal(wired.target[:64], wired.source[:64])
    assert messages(wired) == [str(i).encode() for i in range(ALONE)]
    wired.write(0, notify="room again").wait(20).close()
    assert messages(wired) == [b"room again"]
    wired.close()
    assert_balanced(wired.here)


@pytest.mark.parametrize(("store", "policy"), list(itertools.product(STORES, POLICIES)))
def test_under_every_policy_slots_come_back(pairs, store, policy):
    pair = pairs(store=store, policy=policy, workers=2, slices=8192, cache_slices=1024)
    for i in range(20):
        pair.write(offsets(40 * (i % 5) + 1), notify=str(i)).wait(20).close()
    pair.write(offsets(300), notify="closed at once").close()
    assert [int(m) for m in messages(pair)[:20]] == list(range(20))
    pair.close()
    assert_balanced(pair.here)


def test_cancelled_while_it_waits_its_turn_it_fails_as_cancelled(gated):
    before = gated.write(offsets(3), notify="before")
    batch = gated.here.write(gated.peer, NOTHING, NOTHING, 8, notify="cancelled")
    until(lambda: gated.here.provider.queues[0][0].outstanding == 3, "the data, posted")
    batch.cancel()
    with pytest.raises(TransferFailed, match="failed, all 0 requests arrived: CANCELLED"):
        batch.wait(20)
    gated.here.provider.open_gate()
    before.wait(20)
    assert messages(gated) == [b"before"]


def test_closed_before_its_data_has_arrived_it_is_withheld(gated):
    batch = gated.write(offsets(3), notify="never")
    until(lambda: gated.here.provider.queues[0][0].outstanding == 3, "the data, posted")
    batch.close()
    gated.here.provider.open_gate()
    until(lambda: batch.quiesced, "the end of the batch")
    gated.write(0, notify="next").wait(20)
    assert messages(gated) == [b"next"]
    gated.close()
    assert_balanced(gated.here)


def test_a_notification_whose_peer_left_does_not_hang(pairs):
    pair = pairs()
    pair.write(0).wait(20).close()
    pair.there.close()
    batch = pair.here.write(pair.peer, NOTHING, NOTHING, 8, notify="to nobody")
    with pytest.raises(TransferFailed, match="INBOX_FULL"):
        batch.wait(20)


@pytest.mark.parametrize("seed", range(8))
def test_order_holds_whatever_the_wire_does(seed):
    """Faults on data and notifications alike: what arrives is a subsequence, and exactly the batches that succeeded."""
    faults = random_faults(seed, 4000, delay=0.02, fail=0.002, flush=0.003, reorder=0.02)
    pair = Pair(
        Emulated(Nic(latency_ns=1000, faults=faults)),
        Emulated(Nic()),
        workers=2,
        queue_depth=32,
        chain=8,
        slices=64 * 1024,
        batches=256,
    )
    batches = [pair.write(offsets(20), notify=str(i)) for i in range(120)]
    failed = set()
    for i, batch in enumerate(batches):
        try:
            batch.wait(20)
        except TransferFailed:
            failed.add(i)
        batch.close()
    assert [int(m) for m in messages(pair)] == [i for i in range(120) if i not in failed]
    pair.close()
    assert_balanced(pair.here)


def test_a_notification_lost_by_the_wire_is_sent_again():
    faults = [Fault(1, Action.FLUSH)]
    pair = Pair(Emulated(Nic(latency_ns=1000, faults=faults)), Emulated(Nic()))
    pair.write(0, notify="twice").wait(20).close()
    assert messages(pair) == [b"twice"]
    pair.close()
    assert assert_balanced(pair.here).counts["retried"] >= 1


def test_many_senders_and_one_inbox(pairs):
    pair = pairs(workers=2)
    sent = 100

    def send(who: int) -> None:
        for i in range(sent):
            pair.write(0, notify=f"{who}:{i}").wait(20).close()

    in_threads(*[lambda who=who: send(who) for who in range(4)])
    heard = [m.decode().split(":") for m in messages(pair)]
    for who in range(4):
        assert [int(i) for w, i in heard if int(w) == who] == list(range(sent))


def test_async_for_hears_them_as_they_come(wired):
    async def listen() -> list[bytes]:
        heard = []
        async for note in wired.there.notifications():
            heard.append(note.message)
            if len(heard) == 6:
                break
        return heard

    async def talk() -> list[bytes]:
        listening = asyncio.create_task(listen())
        for i in range(6):
            batch = wired.write(offsets(10), notify=str(i))
            await awaited(batch)
            batch.close()
        return await asyncio.wait_for(listening, 20)

    assert asyncio.run(talk()) == [str(i).encode() for i in range(6)]


def sleepers(monkeypatch: pytest.MonkeyPatch, inbox: Inbox) -> list[int]:
    """A list that grows whenever somebody is about to sleep on the inbox."""
    watched, asleep = inbox._watched, list[int]()

    @contextlib.contextmanager
    def counted() -> Iterator[int]:
        with watched() as descriptor:
            asleep.append(descriptor)
            yield descriptor

    monkeypatch.setattr(inbox, "_watched", counted)
    return asleep


class Consumer:
    """Takes one notification, in a thread or an event loop of its own."""

    def __init__(self, inbox: Inbox, kind: str) -> None:
        self.inbox, self.loop, self._going_on = inbox, None, threading.Event()
        self.task = Task(lambda: inbox.get(60) if kind == "thread" else asyncio.run(self._one()))

    async def _one(self) -> Notification:
        self.loop = asyncio.get_running_loop()
        async for note in self.inbox:
            return note
        raise AssertionError

    def hold_back(self) -> None:
        """Keep its event loop busy until `go_on`; a thread cannot be."""
        if self.loop is not None:
            held = threading.Event()
            self.loop.call_soon_threadsafe(lambda: (held.set(), self._going_on.wait(60)))
            held.wait(60)

    def go_on(self) -> None:
        self._going_on.set()


@pytest.mark.parametrize("held_back", ["thread", "coroutine"])
@pytest.mark.parametrize("quick", ["thread", "coroutine"])
def test_no_consumer_sleeps_on_a_message_because_another_was_woken_first(pair, monkeypatch, quick, held_back):
    inbox = pair.there.notifications()
    asleep = sleepers(monkeypatch, inbox)
    for _ in range(20):
        asleep.clear()
        first, second = Consumer(inbox, quick), Consumer(inbox, held_back)
        until(lambda: len(asleep) == 2, "both, asleep")
        second.hold_back()
        for i in range(2):
            pair.here.write(pair.peer, NOTHING, NOTHING, 8, notify=str(i)).wait(20).close()
        one = first.task.result()  # it leaves with its own, and another is there
        second.go_on()
        assert {one.message, second.task.result().message} == {b"0", b"1"}


@pytest.mark.usefixtures("switching")
def test_each_message_is_one_consumers(pair):
    n, heard = 400, list[int]()

    def listen() -> None:
        inbox = pair.there.notifications()
        while (note := inbox.get(20).message) != b"end":
            heard.append(int(note))

    def talk() -> None:
        for message in [*map(str, range(n)), *["end"] * 4]:
            pair.here.write(pair.peer, NOTHING, NOTHING, 8, notify=message).wait(20).close()

    in_threads(talk, *[listen] * 4)
    assert sorted(heard) == list(range(n))


def test_consumers_in_one_event_loop_share_what_comes(pair, monkeypatch):
    inbox = pair.there.notifications()
    asleep = sleepers(monkeypatch, inbox)

    async def one() -> bytes:
        async for note in inbox:
            return note.message
        raise AssertionError

    async def main() -> list[bytes]:
        consumers = [asyncio.create_task(one()) for _ in range(5)]
        while len(asleep) < 5:
            await asyncio.sleep(0)
        batches = [pair.here.write(pair.peer, NOTHING, NOTHING, 8, notify=str(i)) for i in range(5)]
        return await asyncio.wait_for(asyncio.gather(*consumers, *map(awaited, batches)), 20)

    assert sorted(asyncio.run(main())[:5]) == [str(i).encode() for i in range(5)]


@pytest.mark.parametrize("status", [WcStatus.RETRY_EXC_ERR, WcStatus.WR_FLUSH_ERR, WcStatus.REM_ACCESS_ERR])
@pytest.mark.parametrize("regions", [1, REGIONS])
def test_a_notification_belongs_to_no_region_however_it_fails(pairs, status, regions):
    """On a NIC that breaks: the probe, then the data, then the notification, which fails once."""
    faults = [Fault(2, Action.FAIL, int(status))]
    pair = pairs(Emulated(Nic(breaks=True, latency_ns=1000, faults=faults)), Emulated(Nic(breaks=True)))
    memory = np.zeros((regions, 64), np.uint8)
    for row in memory[1:]:
        pair.there.register(row[:8])
    batch = pair.write(0, notify="once")
    table = pair.here.connect(pair.peer).table
    before = table.access.copy()
    if status == WcStatus.REM_ACCESS_ERR:
        with pytest.raises(TransferFailed, match="failed, all 1 requests arrived: REMOTE_ACCESS"):
            batch.wait(20)
    else:
        batch.wait(20)
        assert messages(pair) == [b"once"]
    np.testing.assert_array_equal(table.access, before)
    assert not table.refused.any()


def test_what_was_not_fetched_outlives_the_engine_and_its_memory(wired):
    wired.write(0, notify="kept").wait(20).close()
    wired.write(0, notify="too").wait(20).close()
    memory = weakref.ref(wired.there._runtime.inbox.words)
    wired.there.close()
    wired.here.close()  # one of the same process may be about to deliver
    assert memory() is None
    assert [note.message for note in wired.there.notifications()] == [b"kept", b"too"]
    assert list(wired.there.notifications()) == []


def test_closing_the_engine_ends_every_wait(pairs, monkeypatch):
    pair = pairs()
    inbox = pair.there.notifications()

    async def listen() -> None:
        async for _ in inbox:
            pass

    asleep = sleepers(monkeypatch, inbox)
    waiting = [Task(inbox.get) for _ in range(3)]
    waiting.append(Task(lambda: asyncio.run(listen())))
    until(lambda: len(asleep) == 4, "four waiters")
    pair.there.close()
    for task in waiting:
        with pytest.raises(EngineClosed, match="nothing more will come"):
            task.result()
    with pytest.raises(EngineClosed):
        inbox.get(1)
    assert list(inbox) == []


def test_waiting_in_vain_ends_at_the_timeout(pair):
    with pytest.raises(TimeoutError, match=r"no notification came within 0\.01 s"):
        pair.there.notifications().get(0.01)


@pytest.mark.parametrize(
    ("notify", "message"),
    [
        (b"x" * (NOTE_BYTES + 1), "at most 65536 bytes, got 65537; the setting note_bytes"),
        ("ß" * 32769, "at most 65536 bytes, got 65538"),
        (17, "expected a notification of bytes or str, got int"),
    ],
)
def test_what_is_no_notification_is_refused_and_nothing_submitted(pair, notify, message):
    with pytest.raises(UsageError, match=message):
        pair.write(0, notify=notify)
    assert pair.here.stats().counts["batches_submitted"] == 0


@settings(max_examples=200)
@given(name=st.text(min_size=1, max_size=255), message=st.binary(max_size=1024))
def test_packing_and_unpacking_give_the_same(name, message):
    packed = pack(message)
    assert 1 <= packed.size <= NOTE_HEAD_BYTES + len(message)
    words = sender(name)
    header = SENDER.itemsize // 8
    who = words[header:].view(np.uint8)[: words[:header].view(SENDER)["length"][0]].tobytes()
    note = unpack(who + packed.tobytes())
    assert note.message == message
    if is_name(name):
        assert note.peer == name


@settings(max_examples=200)
@given(st.binary(max_size=2048))
def test_unpacking_takes_whatever_comes(note):
    assert isinstance(unpack(note), Notification)


@pytest.mark.parametrize("wire", WIRES)
def test_one_whose_messages_nobody_fetches_keeps_nobody_else_out(engines, wire):
    """And each is named as it is."""
    there = engines("there", provider=WIRES[wire]())
    senders = [engines(f"sender {k}", provider=WIRES[wire](), batches=64) for k in range(3)]
    for _ in range(ALONE):
        senders[0].write("there", NOTHING, NOTHING, 8, notify="noise").wait(20).close()
    with pytest.raises(TransferFailed, match="INBOX_FULL"):
        senders[0].write("there", NOTHING, NOTHING, 8, notify="too much").wait(20)
    for engine in senders[1:]:
        engine.write("there", NOTHING, NOTHING, 8, notify=b"").wait(20).close()
    heard = list(there.notifications())
    assert heard[:ALONE] == [Notification("sender 0", b"noise")] * ALONE
    assert heard[ALONE:] == [Notification("sender 1", b""), Notification("sender 2", b"")]
    senders[0].write("there", NOTHING, NOTHING, 8, notify="room again").wait(20).close()
    assert there.notifications().get(20) == Notification("sender 0", b"room again")
