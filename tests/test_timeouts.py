"""A timeout bounds the whole way to a batch, and no coroutine holds its event loop up on that way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import numpy as np
import pytest

from mooncache import CapacityError, DiscoveryError, EngineClosed, TransportError, UsageError
from mooncache.awaiting import ROOM
from mooncache.discovery import dial
from tests.helpers import LIMIT, Task, until

WIRES = ("tcp", "shm", "auto")
NBYTES = 1 << 12


@pytest.fixture
def silent():
    """An address that takes connections and never says a word, like a stopped process."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def calls_of(engine, name, memory, base, **options):
    """Every way to ask for a peer, as a function that blocks and one that is awaited."""
    words = (memory, base, 64)
    timeout = options.get("timeout")
    return {
        "connect": (lambda: engine.connect(name, timeout), lambda: engine.aconnect(name, timeout)),
        "write": (lambda: engine.write(name, *words, **options), lambda: engine.awrite(name, *words, **options)),
        "read": (
            lambda: engine.read(name, base, memory, 64, **options),
            lambda: engine.aread(name, base, memory, 64, **options),
        ),
    }  # fmt: skip


CALLS = ("connect", "write", "read")


async def beside(coroutine):
    """Await it while another coroutine gets its turns, which it would not beside one that blocks."""
    turns, ended = 0, False

    async def take_turns() -> None:
        nonlocal turns
        while not ended:
            await asyncio.sleep(0.001)
            turns += 1

    taking = asyncio.ensure_future(take_turns())
    try:
        return await coroutine
    finally:
        ended = True
        await taking
        assert turns > 0


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("provider", WIRES)
@pytest.mark.parametrize("step", ["describe", "lane", "share"])
def test_a_peer_that_falls_silent_at_any_step_costs_the_timeout(engines, silent, monkeypatch, provider, step, call):
    if step == "share" and provider == "tcp":
        pytest.skip("TCP shares nothing")
    here, there = engines(provider=provider), engines(provider=provider)
    source, target = here.register(np.ones(NBYTES, np.uint8)), there.register(np.zeros(NBYTES, np.uint8))
    ask = here._service.dial

    def dial_silent(address, purpose, *arguments, **options):
        if purpose == step:
            address, options["unix"] = silent, ""
        return ask(address, purpose, *arguments, **options)

    monkeypatch.setattr(here._service, "dial", dial_silent)
    trying = here._peers.ask(there.address)  # the calls join it, once it has come so far
    until(lambda: f"to answer '{step}'" in trying._tried.deadline.waiting, "the silence")
    blocks, awaits = calls_of(here, there.address, source.address, target.address, timeout=0.05)[call]
    says = rf"{there.address}' was not connected within the 0.05 s.* {silent} to answer '{step}'; nothing was submitted"
    with pytest.raises(TransportError, match=says):
        blocks()
    with pytest.raises(TransportError, match=says):
        asyncio.run(beside(awaits()))


def test_many_threads_hear_of_a_silent_peer_together(engines, silent):
    here = engines(provider="tcp")
    source = here.register(np.ones(NBYTES, np.uint8))
    tasks = [Task(lambda: here.write(silent, source.address, 1, 64, timeout=0.05)) for _ in range(8)]
    for task in tasks:
        with pytest.raises(TransportError, match=r"was not connected within the 0\.05 s"):
            task.result()
    until(lambda: len(here._peers._ways._threads._threads) == 1, "one try")


@pytest.mark.parametrize("call", CALLS)
def test_a_look_up_of_a_host_that_never_ends_costs_the_timeout_and_one_thread(engines, monkeypatch, call):
    ended = threading.Event()

    def hangs(host, port, flags=0):
        if flags:
            raise OSError
        ended.wait(LIMIT)
        raise OSError("gave up")

    monkeypatch.setattr(dial, "_getaddrinfo", hangs)
    here = engines(provider="tcp")
    source = here.register(np.ones(NBYTES, np.uint8))
    blocks, awaits = calls_of(here, "nowhere.invalid:1", source.address, 1, timeout=0.05)[call]
    for _ in range(3):
        with pytest.raises(TransportError, match=r"within the 0.05 s.*the address of host 'nowhere.invalid'"):
            blocks()
    with pytest.raises(TransportError, match=r"within the 0.05 s.*the address of host 'nowhere.invalid'"):
        asyncio.run(beside(awaits()))
    assert sum(thread.name == "look-up-nowhere.invalid" for thread in threading.enumerate()) == 1
    ended.set()
    with pytest.raises(DiscoveryError, match="gave up"):
        here.connect("nowhere.invalid:1")
    until(lambda: not dial._look_ups.futures, "the end of the look-up")


def test_closing_ends_a_connect_to_a_silent_peer(engines, silent):
    here = engines(provider="tcp")
    task = Task(here.connect, silent)
    until(lambda: "answer" in repr(here._peers._ways._ways[silent].current.deadline), "the try")
    here.close()
    with pytest.raises(EngineClosed):
        task.result()


def test_a_peer_that_is_back_is_found_by_connect_at_once(engines):
    here, there = engines(provider="tcp"), engines(provider="tcp")
    address = there.address
    there.close()
    source = here.register(np.ones(NBYTES, np.uint8))
    for _ in range(3):  # the second time within the pause
        with pytest.raises(TransportError, match="refused"):
            here.write(address, source.address, 1, 64)
    back = engines(provider="tcp", listen=address)
    target = back.register(np.zeros(NBYTES, np.uint8))
    here.connect(address)
    here.write(address, source.address, target.address, 64).wait(LIMIT).close()


# ------------------------------------------------------------------------------ coroutines
@pytest.mark.parametrize("provider", ["loopback", "emulated", "tcp", "shm", "auto"])
def test_coroutines_write_and_read_over_every_wire(engines, provider):
    here, there = engines(provider=provider), engines(provider=provider)
    source, target = np.arange(NBYTES, dtype=np.uint8), np.zeros(NBYTES, np.uint8)
    back = np.zeros(NBYTES, np.uint8)
    ours, theirs, again = here.register(source), there.register(target), here.register(back)

    async def main() -> None:
        peer = await here.aconnect(there.name)
        assert peer is await here.aconnect(there.name) is here.connect(there.name)
        batch = await here.awrite(peer, ours.address, theirs.address, NBYTES, notify=b"done")
        (await batch).close()
        assert (await there.notifications().__aiter__().__anext__()).message == b"done"
        batch = await here.aread(there.name, theirs.address, again.address, NBYTES, timeout=LIMIT)
        (await batch).close()
        with pytest.raises(UsageError, match="not inside"):
            await here.awrite(peer, 1, theirs.address, 64)
        with pytest.raises(UsageError, match="timeout"):
            await here.aconnect(there.name, -1j)

    asyncio.run(main())
    np.testing.assert_array_equal(source, target)
    np.testing.assert_array_equal(source, back)


def scattered(pair, n):
    """Operands of n requests, a slice each."""
    offsets = np.arange(n, dtype=np.int64) * 65
    return pair.local.address + offsets, pair.remote.address + offsets, 64


def test_a_coroutine_that_waits_for_slots_lets_others_close_batches(pairs):
    pair = pairs(slices=512)

    async def main() -> None:
        first = pair.scattered(512).wait(LIMIT)
        words = scattered(pair, 300)
        waiting = [asyncio.ensure_future(pair.here.awrite(pair.peer, *words)) for _ in range(2)]
        gives_up = asyncio.ensure_future(pair.here.awrite(pair.peer, *words))
        await asyncio.sleep(0)
        assert len(pair.here.awaiting._waiters) == 3
        gives_up.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gives_up
        with pytest.raises(CapacityError, match="none came back before the timeout"):
            await pair.here.awrite(pair.peer, *words, timeout=0.01)
        first.close()
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        (await (await done.pop())).close()  # which makes room for the other one
        for task in waiting:
            batch = await task
            if batch._closed:
                continue
            (await batch).close()
        assert all(waiter.handle != ROOM for waiter in pair.here.awaiting._waiters.values())

    asyncio.run(asyncio.wait_for(main(), LIMIT))
    assert pair.here.stats().open_batches == 0


def test_a_coroutine_learns_new_regions_and_a_restarted_peer(engines):
    here, there = engines(provider="tcp"), engines(provider="tcp")
    source = here.register(np.ones(NBYTES, np.uint8))

    async def main() -> None:
        await here.aconnect(there.address)
        target = there.register(np.zeros(NBYTES, np.uint8))
        (await (await here.awrite(there.address, source.address, target.address, 64))).close()
        there.close()
        await asyncio.to_thread(until, lambda: here._peers.known[there.address].gone, "its end")
        back = engines(provider="tcp", listen=there.address)
        target = back.register(np.zeros(NBYTES, np.uint8))
        (await (await here.awrite(there.address, source.address, target.address, 64))).close()

    asyncio.run(main())


# ------------------------------------------------------------------------------ who waits hears of a close
WAYS_TO_CLOSE = {"batch": lambda pair, batch: batch.close(), "engine": lambda pair, batch: pair.here.close()}


@pytest.mark.parametrize("what", WAYS_TO_CLOSE)
def test_a_thread_in_wait_hears_of_a_close_by_another(gated, what, monkeypatch):
    monkeypatch.setattr("mooncache.batch.NAP_NS", 3600 * 10**9)  # it does not wake by itself
    batch = gated.scattered(3)
    task = Task(batch.wait)
    until(lambda: gated.state.batch_rows["waiters"].any(), "the waiting thread, asleep")
    close = Task(WAYS_TO_CLOSE[what], gated, batch)
    with pytest.raises((UsageError, EngineClosed), match="closed"):
        task.result()
    gated.here.provider.open_gate()
    close.result()


@pytest.mark.parametrize("what", WAYS_TO_CLOSE)
def test_a_coroutine_that_awaits_a_batch_hears_of_a_close_by_a_thread(gated, what):
    async def main() -> None:
        batch = gated.scattered(3)

        async def wait() -> None:
            await batch

        waiting = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        close = Task(WAYS_TO_CLOSE[what], gated, batch)
        with pytest.raises((UsageError, EngineClosed), match="closed"):
            await asyncio.wait_for(waiting, LIMIT)
        gated.here.provider.open_gate()
        await asyncio.to_thread(close.result)

    asyncio.run(main())


def test_who_waits_for_slots_hears_of_the_engines_close(pairs, monkeypatch):
    monkeypatch.setattr("mooncache.transfers.NAP_NS", 3600 * 10**9)
    pair = pairs(slices=512)
    full, words = pair.scattered(512).wait(LIMIT), scattered(pair, 300)

    async def main() -> None:
        task = Task(pair.here.write, pair.peer, *words)
        waiting = asyncio.ensure_future(pair.here.awrite(pair.peer, *words))
        await asyncio.sleep(0)
        until(lambda: pair.state.shared["waiters"] == 1, "the submitter, asleep")
        await asyncio.to_thread(pair.here.close)
        with pytest.raises(EngineClosed):
            await asyncio.wait_for(waiting, LIMIT)
        with pytest.raises(EngineClosed):
            task.result()

    asyncio.run(main())
    assert full.done


def test_who_waits_for_a_notification_hears_of_the_engines_close_before_its_batches_have_ended(gated):
    batch = gated.scattered(3)
    task = Task(gated.here.notifications().get)
    close = Task(gated.here.close)
    with pytest.raises(EngineClosed):
        task.result()
    assert not gated.here.provider.gate[0]  # which holds the close up
    gated.here.provider.open_gate()
    close.result()
    assert batch.done
