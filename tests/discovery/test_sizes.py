"""The limits of messages against what the largest permitted engine really says."""

from __future__ import annotations

from typing import Any

import pytest

from mooncache import limits
from mooncache.descriptor import Descriptor, RemoteRegion
from mooncache.discovery import handshake
from mooncache.discovery.fields import NAME_LENGTH, WORD, dump
from mooncache.discovery.handshake import Answered, Call, Hello, Refused, frame
from mooncache.discovery.record import RECORD_BYTES, encode, to_json

NAME = "\U0001f600" * NAME_LENGTH  # printable, and longest when escaped
MOST = WORD - 1
GID = "fe80:0000:0000:0000:ba59:9fff:fe0e:1f2a"
PATH = [GID, 0xFFFF, limits.NICS - 1, 4096, 0xFF, 0xFFFFFFFF, False]
PAIR = [limits.NICS - 1, 0xFFFFFF, 0xFFFFFF]
PAIRS = limits.WORKERS * limits.QUEUE_PAIRS

CALLS: dict[str, dict[str, Any]] = {
    "describe": {},
    "lane": {"lanes": 2, "queue": MOST, "round": MOST},
    "share": {"have": []},
    "segments": {"have": [MOST] * limits.REGIONS_MOST},
    "rdma-connect": {
        "version": 1, "instance": MOST, "connection": MOST, "paths": [PATH] * limits.NICS, "queues": [PAIR] * PAIRS,
        "notes": [PAIR] * limits.NICS, "answer": MOST,
    },
    "rdma-fence": {"connection": MOST, "queues": list(range(PAIRS)), "notes": []},
    "rdma-repair": {"connection": MOST, "queues": [[PAIRS, 0xFFFFFF]] * PAIRS, "notes": [[7, 0xFFFFFF]] * limits.NICS},
}  # fmt: skip


def largest(data: object) -> Descriptor:
    region = RemoteRegion(MOST, MOST, (MOST,) * limits.NICS, 3)
    address = f"{'h' * 253}:65535"
    return Descriptor(NAME, MOST, address, NAME, (region,) * limits.REGIONS_MOST, data)


DATA: dict[str, dict[str, Any]] = {
    "shm": {"lanes": 2, "unix": "mooncache-" + "0" * 32, "segments": [MOST] * limits.REGIONS_MOST},
    "rdma": {"rdma": 1, "instance": MOST, "nics": [[GID, 0xFFFF, 4096, 0xFF, 1234.5678, False]] * limits.NICS},
}
ANSWERS: dict[str, tuple[dict[str, Any], int]] = {
    "describe by shm": (to_json(largest(DATA["shm"])), 0),
    "describe by rdma": (to_json(largest(DATA["rdma"])), 0),
    "share": ({"segments": [[MOST, MOST, MOST]] * limits.REGIONS_MOST, "word": MOST, "nonce": -MOST}, handshake.FDS),
    "rdma-connect": (
        {"queues": [[0xFFFFFF, 0xFFFFFF]] * PAIRS, "notes": [[0xFFFFFF, 0xFFFFFF, MOST, 0xFFFFFFFF]] * limits.NICS}, 0,
    ),
    "rdma-repair": ({"queues": [0xFFFFFF] * PAIRS, "notes": [0xFFFFFF] * limits.NICS}, 0),
}  # fmt: skip


def call_of(purpose: str) -> Call:
    return Call(Hello(handshake.new_nonce(), True), handshake.new_nonce(), purpose, NAME, MOST, CALLS[purpose])


@pytest.mark.parametrize("purpose", CALLS)
def test_the_largest_engine_can_ask_for_everything(purpose):
    assert frame(call_of(purpose).message(b"key"), handshake.CALL_BYTES)


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_largest_engine_can_answer_everything(answer):
    body, fds = ANSWERS[answer]
    call = call_of(answer.partition(" ")[0])
    text = frame(call.answer(Answered(body, fds), b"key"), handshake.ANSWER_BYTES)[handshake.HEADER.size :]
    assert call.read_answer(text, b"key", "it") == Answered(body, fds)


def test_every_error_can_be_answered():
    refused = Refused("CapacityError", "\U0001f600" * 10_000)
    assert frame(call_of("describe").answer(refused, b"key"), handshake.ANSWER_BYTES)


@pytest.mark.parametrize("data", DATA)
def test_the_largest_engine_can_be_announced(data):
    assert len(encode(largest(DATA[data]))) <= RECORD_BYTES


def test_limits_are_no_larger_than_they_need_to_be():
    longest = max(len(dump(call_of(purpose).message(b"key"))) for purpose in CALLS)
    assert longest > 0.75 * handshake.CALL_BYTES
    longest = max(len(dump(body)) for body, _ in ANSWERS.values())
    assert longest > 0.75 * handshake.ANSWER_BYTES
