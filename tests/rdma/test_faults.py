"""What breaks on a verbs device, what is refused, and that the engine goes on."""

import gc
import os
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import replace

import numpy as np
import pytest

from mooncache import Engine, MooncacheError, TransferFailed, TransportError, UsageError
from mooncache.deadline import Deadline
from mooncache.errors import Status
from mooncache.kernels.enums import QueueState
from tests.helpers import SMALL, Pair, until

WAIT = 120


def outgoing(pair):
    return pair.here.provider._outgoing[pair.peer]


def all_ready(pair):
    return all(row.state == QueueState.READY for row in outgoing(pair)._rows)


def write_right(pair, n=64, length=1000):
    pair.target[:] = 0
    with pair.write(np.arange(n) * 1024, length=length) as batch:
        batch.wait(WAIT)
    np.testing.assert_array_equal(
        pair.target[: n * 1024].reshape(n, 1024)[:, :length], pair.source[: n * 1024].reshape(n, 1024)[:, :length]
    )


def test_a_queue_pair_that_breaks_loses_nothing_and_comes_back(pair):
    write_right(pair)
    batch = pair.write(np.arange(2000) * 1024, length=1000)
    outgoing(pair)._lanes.data[0].verbs.fail()
    batch.wait(WAIT)
    np.testing.assert_array_equal(
        pair.target[: 2000 * 1024].reshape(-1, 1024)[:, :1000], pair.source[: 2000 * 1024].reshape(-1, 1024)[:, :1000]
    )
    batch.close()
    until(lambda: all_ready(pair), "all queue pairs ready")
    write_right(pair)


def test_when_all_queue_pairs_break_everything_waits_for_them_and_completes(pair):
    write_right(pair)
    batch = pair.write(np.arange(2000) * 1024, length=1000, notify=b"all there")
    for lane in [*outgoing(pair)._lanes.data, *outgoing(pair)._lanes.notes]:
        lane.verbs.fail()
    batch.wait(WAIT)
    batch.close()
    assert pair.there.notifications().get(WAIT).message == b"all there"
    until(lambda: all_ready(pair), "all queue pairs ready")
    stats = pair.here.stats()
    assert stats.free_slices == stats.capacity_slices


def test_a_region_withdrawn_while_it_is_written_to_fails_these_requests_only(pair):
    write_right(pair)
    other = np.zeros(1 << 16, np.uint8)
    second = pair.there.register(other)
    pair.here._peers.ask(pair.peer, news=True).result(Deadline())
    second.unregister()
    offsets = np.arange(20) * 1024
    targets = np.where(np.arange(20) % 2 == 0, pair.remote.address + offsets, second.address + offsets)
    batch = pair.here.write(pair.peer, pair.local.address + offsets, targets, 64)
    with pytest.raises(TransferFailed) as failed:
        batch.wait(WAIT)
    assert {failure.request % 2 for failure in failed.value.failures} == {1}
    assert {failure.status for failure in failed.value.failures} == {Status.REMOTE_ACCESS}
    assert pair.peer in str(failed.value)
    assert not other.any()
    batch.close()
    write_right(pair)


def test_a_wrong_key_and_a_range_beyond_the_region_are_refused_by_the_peers_nic(pair):
    write_right(pair)
    table = pair.here._peers.known[pair.peer].table
    slot = int(table.slots[0])
    honest = int(table.keys[0, slot])
    table.keys[0, slot] = honest ^ 0x5500
    with pytest.raises(TransferFailed, match="REMOTE_ACCESS"):
        pair.write(0, length=64).wait(WAIT)
    table.keys[0, slot] = honest
    table.ends[0] += 4096
    with pytest.raises(TransferFailed, match="REMOTE_ACCESS"):
        pair.write(0, to=len(pair.target), length=64).wait(WAIT)
    table.ends[0] -= 4096
    write_right(pair)


def test_nothing_that_was_submitted_before_a_fence_lands_after_it(pair):
    offsets = np.arange(2000) * 1024
    for round in range(5):
        batch = pair.write(offsets, length=1000)
        until(lambda batch=batch: pair.target.any() or batch.done, "the first bytes")
        assert pair.there.fence(pair.here.name) == 1 or round > 0
        pair.target[:] = 255
        with suppress(TransferFailed):
            batch.wait(WAIT)
        batch.wait_quiesced(WAIT)
        batch.close()
        assert (pair.target == 255).all()
        until(lambda: outgoing(pair).gone, "the end of the connection, noticed")
        pair.target[:] = 0
    write_right(pair)


def test_a_batch_past_its_deadline_ends_alone_and_final_at_both_ends(pair):
    write_right(pair)
    offsets = np.arange(2000) * 1024
    other = pair.write(offsets, length=1000)
    late = pair.write(offsets, length=1000, timeout=0.01)
    with suppress(TransferFailed):
        late.wait(WAIT)
    assert {failure.status for failure in late.failures} <= {Status.TIMED_OUT}
    other.wait(WAIT).close()
    late.wait_quiesced(WAIT)
    late.close()
    assert pair.here.stats().unsettled_slices == 0
    until(lambda: all_ready(pair), "all queue pairs ready")
    write_right(pair)


def test_a_peer_that_closes_fails_what_is_open_and_its_successor_is_connected_to(rdma, pair):
    write_right(pair)
    batches = [pair.write(np.arange(2000) * 1024, length=1000) for _ in range(3)]
    pair.there.close()
    for batch in batches:
        with pytest.raises(TransferFailed) as failed:
            batch.wait(WAIT)
        assert {failure.status for failure in failed.value.failures} <= {Status.PEER_GONE, Status.REMOTE_ACCESS}
        batch.close()
    until(lambda: pair.here.stats().free_slices == pair.here.stats().capacity_slices, "all slots back")
    with pytest.raises(MooncacheError):
        pair.write(0, length=64)
    with Engine(pair.peer, provider=rdma(), slices=4096) as successor:
        region = successor.register(pair.target)
        pair.target[:64] = 0
        with pair.here.write(pair.peer, pair.local.address, region.address, 64) as batch:
            batch.wait(WAIT)
        np.testing.assert_array_equal(pair.target[:64], pair.source[:64])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"instance": 1},
        {"version": 99},
        {"paths": 5},
        {"paths": [["x"] * 7]},
        {"paths": [["x"] * 3]},
        {"paths": [["::", 0, 7, 1024, 1, 1, True]]},
        {"paths": [["0000:0000:0000:0000:0000:ffff:7f00:0001", 0, 0, 3, 1, 1, True]]},
        {"queues": [[9, 1, 1]]},
        {"notes": [["a", 1, 1]]},
    ],
    ids=str,
)
def test_a_strange_wish_to_connect_is_refused_and_leaves_nothing_behind(pair, body):
    write_right(pair)
    before = resources()
    if body:
        proper = {"version": 1, "instance": pair.there.provider.instance, "connection": 5, "answer": 0}
        body = {**proper, "paths": [], "queues": [], "notes": [], **body}
    with pytest.raises(MooncacheError):
        pair.here._service.dial(pair.there.address, "rdma-connect", body)
    assert resources() == before
    write_right(pair)


@pytest.mark.parametrize("purpose", ["rdma-fence", "rdma-repair"])
def test_nobody_mends_a_connection_that_is_not_theirs(pair, purpose):
    write_right(pair)
    for number in (outgoing(pair)._lanes.number + 1, "x", None):
        with pytest.raises(UsageError, match="no connection"):
            pair.here._service.dial(pair.there.address, purpose, {"connection": number, "queues": [], "notes": []})


def test_other_providers_and_names_of_devices_are_refused_with_what_there_is(rdma, device):
    from mooncache.providers.rdma.provider import Rdma

    with pytest.raises(UsageError, match=device):
        Engine(provider=Rdma(["no_such_0"]))
    with pytest.raises(MooncacheError, match="GID"):
        Engine(provider=Rdma([device], gid_index=99))
    with pytest.raises(UsageError, match="queue_pairs"):
        Rdma(queue_pairs=0)
    with (
        Engine("stranger", provider="tcp") as tcp,
        Engine(provider=rdma(), slices=4096) as here,
        pytest.raises(TransportError, match="provider 'tcp'"),
    ):
        here.connect(tcp.name)


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resources():
    """What the kernel counts of each kind: queue pairs, completion queues, regions, protection domains."""
    shown = subprocess.run(["rdma", "resource", "show"], capture_output=True, text=True, check=True).stdout
    return shown.split(":", 1)[1].split()


def test_two_hundred_connections_leave_nothing_behind(pair):
    def cycle():
        write_right(pair, 4)
        outgoing(pair).lose("the test says so")

    for _ in range(5):
        cycle()
    write_right(pair, 4)
    before, descriptors, memory = resources(), open_descriptors(), resident_bytes()
    for _ in range(200):
        cycle()
    write_right(pair, 4)
    until(lambda: resources() == before, "as many resources as before")
    until(lambda: open_descriptors() == descriptors, "as many descriptors as before")
    assert resident_bytes() - memory < 8 << 20


def test_engines_that_open_and_close_leave_nothing_behind(rdma):
    def cycle():
        pair = Pair(rdma(), rdma())
        write_right(pair, 4)
        pair.close()

    cycle()
    before, descriptors = resources(), open_descriptors()
    for _ in range(5):
        cycle()
    assert resources() == before
    assert open_descriptors() == descriptors


def test_a_forgotten_engine_closes_itself_though_it_is_connected(rdma):
    def forget(there, region):
        here = Engine(provider=rdma(), slices=4096, batches=16)
        local = here.register(np.zeros(64, np.uint8))
        here.write(there.name, local.address, region.address, 64).wait(WAIT).close()

    with Engine(provider=rdma(), slices=4096, batches=16) as there:
        region = there.register(np.zeros(64, np.uint8))
        before, descriptors = resources(), open_descriptors()
        forget(there, region)
        until(lambda: gc.collect() is not None and resources() == before, "as many resources as before")
        until(lambda: open_descriptors() == descriptors, "as many descriptors as before")


def incoming_of(engine, caller):
    """The connection of a peer to the engine."""
    return next(one for one in engine.provider._incoming.values() if one.caller == caller)


def test_the_key_of_one_connection_leads_to_no_others_notifications(rdma):
    with ExitStack() as opened:
        target, forger, honest = (
            opened.enter_context(Engine(name, provider=rdma(), **SMALL)) for name in ("target", "forger", "honest")
        )
        region = target.register(np.zeros(64, np.uint8))
        local = {engine: engine.register(np.ones(64, np.uint8)).address for engine in (forger, honest)}

        def send(engine, message):
            return engine.write("target", local[engine], region.address, 64, notify=message)

        for engine in (forger, honest):
            send(engine, b"first").wait(WAIT).close()
            assert target.notifications().get(WAIT).peer == engine.name
        own, others = (incoming_of(target, engine.name)._record for engine in (forger, honest))
        assert not set(own.rkeys) & set(others.rkeys)
        memory = target.provider.hub.memory
        before = memory[others.index].copy()
        # The forger writes to the other's mailbox, with the key that it was given for its own.
        record = forger.provider._outgoing["target"]._lanes.record
        record._rails[0]["address"] = others.mailboxes[0]
        batch = send(forger, b"forged")
        until(lambda: not record.is_up(0), "the NIC's refusal")
        np.testing.assert_array_equal(memory[others.index], before)
        send(honest, b"second").wait(WAIT).close()
        assert target.notifications().get(WAIT)[:2] == ("honest", b"second")
        record._rails[0]["address"] = own.mailboxes[0]
        batch.wait(WAIT).close()
        assert target.notifications().get(WAIT).peer == "forger"


@pytest.mark.parametrize("step", ["the answer", "what follows it"])
def test_a_connection_whose_answer_does_not_reach_the_peer_leaves_nothing_behind(pair, monkeypatch, step):
    write_right(pair)
    outgoing(pair).lose("the test says so")
    until(lambda: not pair.there.provider._incoming, "the end of the first connection")
    provider = pair.there.provider
    serve = provider.serve

    def unsendable(request):
        reply = serve(request)
        return replace(reply, body={"a": object()}) if request.purpose == "rdma-connect" else reply

    with monkeypatch.context() as broken:
        name, failing = {"the answer": ("serve", unsendable), "what follows it": ("_hold", refuse)}[step]
        broken.setattr(provider, name, failing)
        with pytest.raises(MooncacheError):
            pair.write(0, length=64).wait(WAIT)
        until(lambda: not pair.there.provider._incoming, "what was made for the peer, given back")
    free = len(pair.there.provider.hub.free)
    pair.here.connect(pair.peer)  # at once, unlike a submit
    write_right(pair)
    assert len(pair.there.provider.hub.free) == free - 1


def refuse(*_):
    raise OSError("the test says so")
