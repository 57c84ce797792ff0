"""Request traces in the Mooncake JSONL format: one request a line, and what can be learnt from them.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ..., 2354]}

`timestamp` in ms, never going back; lengths in tokens; `hash_ids` one id for each block of 512 input tokens,
where an equal id is an equal block after an equal prefix. Other fields are ignored.
Source: Qin et al., Mooncake, FAST 2025, and the traces published with it.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sim.errors import TraceError, came

BLOCK_TOKENS = 512  # tokens a hash id stands for

_PS_PER_MS = 10**9
_SPAN_MS_MAX = (2**63 - 1) // _PS_PER_MS  # 106 days: longer does not fit int64 picoseconds
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trace:
    """All requests of one file, in its order; row i is request i."""

    file: str
    sha256: str  # of the file's bytes
    timestamp_ms: Int64Array  # int64[n]    never going back
    input_length: Int64Array  # int64[n]    tokens, at least 1
    output_length: Int64Array  # int64[n]    tokens
    offsets: Int64Array  # int64[n+1]  request i has hash_ids[offsets[i]:offsets[i+1]]
    hash_ids: Int64Array  # int64[m]    one id for each block of 512 input tokens

    @property
    def requests(self) -> int:
        """The number of requests."""
        return len(self.timestamp_ms)


def read_trace(path: str | Path) -> Trace:
    """Read a whole trace: a tenth of a second for 12,000 requests.

    Raises: TraceError with file, line, field, what was expected and what came, at the first malformed line.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that can be none
        why = getattr(error, "strerror", None) or str(error)
        raise TraceError(str(path), 0, "", "a readable file", why) from None
    reader = _Reader(str(path))
    for line, text in enumerate(data.rstrip().split(b"\n"), start=1):
        reader.add(line, text)
    return reader.trace(hashlib.sha256(data).hexdigest())


class _Reader:
    """The columns of a trace, which grow line by line."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.timestamp_ms, self.input_length, self.output_length = array("q"), array("q"), array("q")
        self.offsets, self.hash_ids = array("q", [0]), array("q")

    def add(self, line: int, text: bytes) -> None:
        """Check one line and append it."""
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = text.decode(errors="replace")
        if not isinstance(row, dict):
            raise TraceError(self.file, line, "", "a JSON object", came(row))
        first, last = (self.timestamp_ms[0], self.timestamp_ms[-1]) if self.timestamp_ms else (0, 0)
        span_end = first + _SPAN_MS_MAX if self.timestamp_ms else _INT64_MAX
        self.timestamp_ms.append(self._integer(line, row, "timestamp", last, min(span_end, _INT64_MAX)))
        tokens = self._integer(line, row, "input_length", 1, _INT32_MAX)
        self.input_length.append(tokens)
        self.output_length.append(self._integer(line, row, "output_length", 0, _INT32_MAX))
        self.hash_ids.extend(self._ids(line, row, -(-tokens // BLOCK_TOKENS)))
        self.offsets.append(len(self.hash_ids))

    def _integer(self, line: int, row: dict[str, object], field: str, low: int, high: int) -> int:
        value = row.get(field)
        if type(value) is not int or not low <= value <= high:  # `type`, because True is an int too
            raise TraceError(self.file, line, field, f"an integer from {low} to {high}", came(value))
        return value

    def _ids(self, line: int, row: dict[str, object], blocks: int) -> list[int]:
        ids = row.get("hash_ids")
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            raise TraceError(self.file, line, "hash_ids", "a list of integers", came(ids))
        if ids and not 0 <= min(ids) <= max(ids) <= _INT64_MAX:
            raise TraceError(self.file, line, "hash_ids", f"integers from 0 to {_INT64_MAX}", came(ids))
        if len(ids) > blocks:  # a trace with other blocks would be read as one with far more prefix hits
            expected = f"at most {blocks} ids, one for each {BLOCK_TOKENS} tokens of input_length"
            raise TraceError(self.file, line, "hash_ids", expected, f"{len(ids)} ids")
        return ids

    def trace(self, sha256: str) -> Trace:
        """Return the trace of all lines."""
        columns = (self.timestamp_ms, self.input_length, self.output_length, self.offsets, self.hash_ids)
        return Trace(self.file, sha256, *(np.array(column, dtype=np.int64) for column in columns))


def bucket_width_ms(trace: Trace) -> int:
    """Return the width of the buckets that the time stamps were rounded to, in ms; 0 if they were not.

    The published conversation trace has 12,031 requests on 1,180 stamps about 3,000 ms apart. Replayed as
    given, its bursts make the mean wait 2 to 8 times too long. The rule: at least 10 distinct stamps, two or
    more requests on each in the mean, and nine steps of ten within 1 % (at least 1 ms) of a multiple of the
    median step.
    """
    steps = np.diff(np.unique(trace.timestamp_ms))
    if len(steps) < 9 or trace.requests < 2 * (len(steps) + 1):
        return 0
    width = int(np.median(steps))
    error = np.abs(steps - np.maximum(1, np.rint(steps / width)) * width)
    return width if np.mean(error <= max(1.0, 0.01 * width)) >= 0.9 else 0


def spread(timestamp_ms: Int64Array, width_ms: int, chance: np.random.Generator) -> Int64Array:
    """Spread arrivals evenly inside each bucket; return picoseconds after the first stamp, int64[n], ascending.

    One draw a request, then sorted, so that requests keep their order. A width of 0 spreads nothing.
    """
    bucket = (timestamp_ms - timestamp_ms[0]) * _PS_PER_MS
    return np.sort(bucket + chance.integers(0, max(1, width_ms * _PS_PER_MS), size=len(bucket)))


def uncached_tokens(trace: Trace) -> Int64Array:
    """Count the input tokens of each request that an infinite prefix cache does not have; int64[n].

    A block is found if all before it in the request are, and an earlier request had it. The cache starts
    empty and sees the whole trace in order. Of the conversation trace's tokens it has 37.4 %.
    """
    counts = np.diff(trace.offsets)
    owner = np.repeat(np.arange(trace.requests), counts)
    position = np.arange(len(owner)) - trace.offsets[owner]
    _, first, which = np.unique(trace.hash_ids, return_index=True, return_inverse=True)
    new = owner[first[which]] == owner
    found = counts.copy()
    np.minimum.at(found, owner[new], position[new])
    cached = np.minimum(found * BLOCK_TOKENS, trace.input_length)
    return np.asarray(trace.input_length - cached, dtype=np.int64)
