"""`await batch`, in one event loop and in several."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import numpy as np
import pytest

from mooncache import (
    Batch,
    Region,
    TransferFailed,
    UsageError,
)
from tests.helpers import LIMIT, Pair, Task, awaited
from tests.kernels.entries import Gated


async def finish_while_awaited(pair: Pair, batch: Batch) -> None:
    """Open the gate only when the batch is awaited, so that the eventfd has to tell."""
    waiting = asyncio.ensure_future(awaited(batch))
    await asyncio.sleep(0)
    assert pair.here.awaiting._waiters
    pair.here.provider.open_gate()
    await asyncio.wait_for(waiting, 20)


def test_a_batch_can_be_awaited(gated):
    async def main() -> Batch:
        batch = gated.scattered(3)
        await finish_while_awaited(gated, batch)
        return await batch

    assert asyncio.run(main()).done


def test_many_batches_are_awaited_together(gated):
    async def main() -> None:
        batches = [gated.scattered(n) for n in (1, 2, 3, 300)]
        pending = asyncio.gather(*batches)
        await asyncio.sleep(0)
        assert not pending.done()
        gated.here.provider.open_gate()
        assert await pending == batches
        for batch in batches:
            assert await batch is batch  # a finished one as well
            batch.close()

    asyncio.run(main())


def test_several_event_loops_await_batches_of_one_engine(gated):
    ready = threading.Barrier(4)

    async def one() -> int:
        n = 0
        for _ in range(30):
            batch = await gated.scattered(5)
            n += len(batch.failures) == 0
            batch.close()
        return n

    async def first_together() -> int:
        batch = gated.scattered(5)
        waiting = asyncio.ensure_future(wait_for(batch))
        await asyncio.sleep(0)
        ready.wait(20)
        await waiting
        return await one()

    async def wait_for(batch: Batch) -> None:
        await batch
        batch.close()

    loops = [Task(asyncio.run, first_together()) for _ in range(3)]
    ready.wait(20)  # all three wait
    gated.here.provider.open_gate()
    assert [loop.result() for loop in loops] == [30] * 3


def test_awaiting_raises_what_waiting_does(pair):
    pair.write(0, length=8).wait(20).close()
    pair.remote.unregister()

    async def main() -> None:
        batch = pair.scattered(3)
        with pytest.raises(TransferFailed, match="3 of 3 requests"):
            await batch
        batch.close()
        with pytest.raises(UsageError, match="closed"):
            await batch

    asyncio.run(main())


def test_an_await_can_be_given_up_and_taken_up_again(gated):
    async def main() -> None:
        batch = gated.scattered(3)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(batch, 0.001)
        assert not batch.done
        gated.here.provider.open_gate()
        await asyncio.wait_for(batch, 20)

    asyncio.run(main())
    assert gated.here.awaiting._waiters == {}


def test_a_loop_that_was_closed_while_it_awaited_harms_no_other(gated):
    loop = asyncio.new_event_loop()
    left = gated.scattered(3)
    task = loop.create_task(awaited(left))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()

    async def main() -> None:
        await finish_while_awaited(gated, gated.scattered(3))

    asyncio.run(main())
    left.wait(20)
    gated.here.close()
    with contextlib.suppress(RuntimeError):
        task.get_coro().close()
    task._log_destroy_pending = False


def test_engines_that_follow_each_other_in_one_event_loop_can_all_be_awaited():
    """The next engine's eventfd has the number of the one before; the loop must not take it for that."""

    async def main() -> None:
        for _ in range(3):
            pair = Pair(Gated(), Gated())
            try:
                await finish_while_awaited(pair, pair.scattered(3))
            finally:
                pair.close()

    asyncio.run(main())


WAITS = {  # what waits for a provider -> the provider's method
    "register": (lambda pair: pair.here.aregister(np.zeros(64, np.uint8), access="read"), "register"),
    "unregister": (lambda pair: pair.here.aunregister(pair.local), "unregister"),
    "forget": (lambda pair: pair.here.aforget(pair.peer), "disconnect"),
    "fence": (lambda pair: pair.there.afence(pair.here.name, timeout=LIMIT), "retract"),
    "close": (lambda pair: pair.here.aclose(), "settle"),
}


@pytest.mark.parametrize("what", WAITS)
def test_while_a_provider_takes_its_time_the_event_loop_goes_on(pair, monkeypatch, what):
    call, method = WAITS[what]
    pair.write(0).wait(LIMIT).close()
    waits, may, slow = threading.Event(), threading.Event(), getattr(pair.here.provider, method)

    def slowly(*arguments: Any) -> Any:
        waits.set()
        assert may.wait(LIMIT)
        return slow(*arguments)

    monkeypatch.setattr(pair.here.provider, method, slowly)

    async def main() -> Any:
        task = asyncio.ensure_future(call(pair))
        while not waits.is_set():
            await asyncio.sleep(0)
        may.set()
        return await task

    done = asyncio.run(main())
    assert isinstance(done, Region) == (what == "register")
    assert (done == 1) == (what == "fence")  # connections that ended
    assert pair.local.registered == (what not in ("unregister", "close"))
    assert pair.here.closed == (what == "close")
