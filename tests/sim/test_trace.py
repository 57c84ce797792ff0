"""Request traces: read exactly or refused by line and field; buckets and prefixes against slow twins."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import TraceError
from sim.streams import stream
from sim.trace import BLOCK_TOKENS, Trace, bucket_width_ms, read_trace, spread, uncached_tokens

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "traces"

GOOD = {"timestamp": 5, "input_length": 1000, "output_length": 3, "hash_ids": [0, 1]}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def make(stamps: list[int], ids: list[list[int]] | None = None, lengths: list[int] | None = None) -> Trace:
    """A trace in memory."""
    ids = [[] for _ in stamps] if ids is None else ids
    lengths = [max(1, len(row) * BLOCK_TOKENS) for row in ids] if lengths is None else lengths
    flat = np.array([number for row in ids for number in row], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    stamp, length = np.array(stamps, dtype=np.int64), np.array(lengths, dtype=np.int64)
    return Trace("made", "", stamp, length, np.ones_like(length), offsets, flat)


def published(name: str) -> Trace:
    path = PUBLISHED / name
    if not path.exists():
        pytest.skip(f"the published trace {name} is not at hand")
    return read_trace(path)


# Reading


def test_rows_become_columns(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, {**GOOD, "timestamp": 7, "hash_ids": [0], "priority": "ignored"})
    trace = read_trace(path)
    assert trace.requests == 2
    assert trace.timestamp_ms.tolist() == [5, 7]
    assert trace.input_length.tolist() == [1000, 1000]
    assert trace.output_length.tolist() == [3, 3]
    assert trace.offsets.tolist() == [0, 2, 3]
    assert trace.hash_ids.tolist() == [0, 1, 0]
    assert {column.dtype for column in (trace.timestamp_ms, trace.offsets, trace.hash_ids)} == {np.dtype(np.int64)}
    assert len(trace.sha256) == 64


@pytest.mark.parametrize(
    ("row", "field", "expected", "came"),
    [
        ("{", "", "a JSON object", "'{' (str)"),
        ("", "", "a JSON object", "'' (str)"),
        ("[1]", "", "a JSON object", "[1] (list)"),
        ("null", "", "a JSON object", "nothing"),
        ("[" * 100_000, "", "a JSON object", "'[[[[[[[[[[[[...[[[[[[[[[[[[[' (str)"),
        ({**GOOD, "timestamp": 4}, "timestamp", "an integer from 5 to 9223372041", "4 (int)"),
        ({**GOOD, "timestamp": 10**10}, "timestamp", "an integer from 5 to 9223372041", "10000000000 (int)"),
        ({**GOOD, "timestamp": "5"}, "timestamp", "an integer from 5 to 9223372041", "'5' (str)"),
        ({**GOOD, "input_length": 0}, "input_length", "an integer from 1 to 2147483647", "0 (int)"),
        ({**GOOD, "input_length": 1.0}, "input_length", "an integer from 1 to 2147483647", "1.0 (float)"),
        ({**GOOD, "output_length": -1}, "output_length", "an integer from 0 to 2147483647", "-1 (int)"),
        ({**GOOD, "output_length": True}, "output_length", "an integer from 0 to 2147483647", "True (bool)"),
        (
            {"timestamp": 5, "input_length": 9},
            "output_length",
            "an integer from",
            "nothing",
        ),
        ({**GOOD, "hash_ids": 3}, "hash_ids", "a list of integers", "3 (int)"),
        ({**GOOD, "hash_ids": [1, "2"]}, "hash_ids", "a list of integers", "[1, '2'] (list)"),
        ({**GOOD, "hash_ids": [-1]}, "hash_ids", "integers from 0 to", "[-1] (list)"),
        ({**GOOD, "hash_ids": [2**63]}, "hash_ids", "integers from 0 to", "[9223372036854775808] (list)"),
        ({**GOOD, "hash_ids": [1, 2, 3]}, "hash_ids", "at most 2 ids, one for each 512 tokens", "3 ids"),
        ({"hash_ids": []}, "timestamp", "an integer from 5 to", "nothing"),
    ],
)
def test_a_malformed_line_is_refused_with_file_line_field_expected_and_came(
    tmp_path: Path, row: object, field: str, expected: str, came: str
) -> None:
    path = write(tmp_path, GOOD, row, GOOD)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    error = caught.value
    assert (error.file, error.line, error.field, error.came) == (str(path), 2, field, came)
    assert error.expected.startswith(expected)
    assert str(error).startswith(f"{path}:2: {f'field {field!r}: ' if field else ''}expected {expected}")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_empty_an_absent_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"trace\.jsonl:1: expected a JSON object, came ''"):
        read_trace(write(tmp_path))
    with pytest.raises(TraceError, match=r"none: expected a readable file, came No such file"):
        read_trace(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(TraceError, match="binary:1: expected a JSON object"):
        read_trace(tmp_path / "binary")


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)
)


@settings(deadline=None)
@given(row=st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, VALUES)) | st.text(max_size=20))
def test_any_line_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, row: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(TraceError):
        assert read_trace(path).requests == 1


# Buckets


def test_buckets_are_found_in_spite_of_gaps_and_rounding() -> None:
    stamps = [bucket * 3000 + bucket % 2 for bucket in range(40) if bucket != 7 for _ in range(3)]
    assert bucket_width_ms(make(stamps)) in (2999, 3000, 3001)


@pytest.mark.parametrize(
    "stamps",
    [
        [0],
        [0] * 100,  # one burst has no width
        [0, 0, 3000, 3000, 6000, 6000],  # too few to tell
        list(range(0, 300_000, 3000)),  # one request at each: a steady client
        np.sort(np.random.Generator(np.random.Philox(key=1)).integers(0, 10**6, 1000)).tolist(),
        np.repeat(np.cumsum(np.random.Generator(np.random.Philox(key=2)).integers(1, 9999, 99)), 3).tolist(),
    ],
)
def test_other_stamps_have_no_buckets(stamps: list[int]) -> None:
    assert bucket_width_ms(make(stamps)) == 0


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=30).filter(any),
    width=st.integers(1, 5000),
    seed=st.integers(0, 10),
)
def test_spreading_keeps_the_order_and_every_request_in_its_bucket(counts: list[int], width: int, seed: int) -> None:
    stamps = [7 + bucket * width for bucket, count in enumerate(counts) for _ in range(count)]
    trace = make(stamps)
    arrival = spread(trace.timestamp_ms, width, stream(seed, "trace", "spread"))
    start = (trace.timestamp_ms - trace.timestamp_ms[0]) * 10**9
    assert arrival.dtype == np.int64
    assert np.all(np.diff(arrival) >= 0)
    assert np.all((start <= arrival) & (arrival < start + width * 10**9))
    assert np.array_equal(arrival, spread(trace.timestamp_ms, width, stream(seed, "trace", "spread")))


def test_no_width_spreads_nothing() -> None:
    arrival = spread(make([3, 3, 8]).timestamp_ms, 0, stream(1, "trace", "spread"))
    assert arrival.tolist() == [0, 0, 5 * 10**9]


# Prefixes


def slow_uncached(ids: list[list[int]], lengths: list[int]) -> list[int]:
    """The obvious way: a set of blocks, asked one by one."""
    known: set[int] = set()
    uncached = []
    for row, length in zip(ids, lengths, strict=True):
        found = next((position for position, number in enumerate(row) if number not in known), len(row))
        uncached.append(length - min(length, found * BLOCK_TOKENS))
        known.update(row)
    return uncached


@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 6), max_size=5), st.integers(0, BLOCK_TOKENS - 1)),
        min_size=1,
        max_size=12,
    )
)
def test_uncached_tokens_equal_the_slow_twin(rows: list[tuple[list[int], int]]) -> None:
    ids = [row for row, _ in rows]
    lengths = [max(1, len(row) * BLOCK_TOKENS - short) for row, short in rows]
    trace = make([0] * len(rows), ids, lengths)
    assert uncached_tokens(trace).tolist() == slow_uncached(ids, lengths)


# The published traces


def test_the_conversation_trace_has_its_published_figures() -> None:
    trace = published("conversation_trace.jsonl")
    assert trace.requests == 12_031
    assert trace.input_length.mean() == pytest.approx(12_035, abs=1)
    assert bucket_width_ms(trace) == 3000
    uncached = uncached_tokens(trace)
    assert uncached.mean() == pytest.approx(7_538, abs=1)
    assert 1 - uncached.sum() / trace.input_length.sum() == pytest.approx(0.374, abs=0.0005)


def test_the_synthetic_trace_has_its_published_figures() -> None:
    trace = published("synthetic_trace.jsonl")
    assert trace.requests == 3_993
    assert bucket_width_ms(trace) == 0
    assert uncached_tokens(trace).mean() == pytest.approx(5_345, abs=1)
