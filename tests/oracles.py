"""Slow, obvious twins of the kernels, in plain Python."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mooncache.errors import Status


# ------------------------------------------------------------------------------ regions
class Range(NamedTuple):
    """A registered range: base, end, the slot it got, and who may: 1 peers read, 2 peers write, 4 own reads write."""

    base: int
    end: int
    slot: int
    access: int = 3


def region_of(regions: list[Range], address: int) -> Range | None:
    """The region that contains the address."""
    for region in regions:
        if region.base <= address < region.end:
            return region
    return None


# ------------------------------------------------------------------------------ split
class Cut(NamedTuple):
    """One slice."""

    source: int
    target: int
    length: int
    first: int
    last: int
    local: int
    remote: int


class Refused(Exception):
    """The call is refused; `request` is the one at fault."""

    def __init__(self, status: Status, request: int) -> None:
        super().__init__(status, request)
        self.status, self.request = status, request


def runs(requests: list[tuple[int, int, int]]) -> list[list[int]]:
    """Indices of requests, those that follow one another at both ends together."""
    grouped: list[list[int]] = []
    for i, (source, target, _) in enumerate(requests):
        before = requests[i - 1]
        if i > 0 and source == before[0] + before[2] and target == before[1] + before[2]:
            grouped[-1].append(i)
        else:
            grouped.append([i])
    return grouped


def cut(
    requests: list[tuple[int, int, int]], local: list[Range], remote: list[Range], *, slice_bytes: int,
    needs: int = 2, longest: int = 1 << 40,
) -> list[Cut]:  # fmt: skip
    """The slices of the requests (source, target, length), or Refused."""
    slices: list[Cut] = []
    for run in runs(requests):
        for i in run:
            if not 0 < requests[i][2] <= longest:
                raise Refused(Status.LENGTH, i)
        slices += cut_run(requests, run, local, remote, slice_bytes, needs)
    return slices


def cut_or_refuse(*arguments, **options) -> list[Cut] | Refused:
    """What `cut` returns or raises."""
    try:
        return cut(*arguments, **options)
    except Refused as refused:
        return refused


def cut_run(
    requests: list[tuple[int, int, int]], run: list[int], local: list[Range], remote: list[Range], slice_bytes: int,
    needs: int,
) -> list[Cut]:  # fmt: skip
    source, target, _ = requests[run[0]]
    total = sum(requests[i][2] for i in run)

    def carrier(position: int) -> int:
        """The request that the run's byte at `position` belongs to."""
        for i in run:
            if position < requests[i][2]:
                return i
            position -= requests[i][2]
        raise AssertionError("beyond the run")

    slices, done = [], 0
    while done < total:
        here = region_of(local, source + done)
        if here is None:
            raise Refused(Status.SOURCE_NOT_REGISTERED, carrier(done))
        if needs == 1 and not here.access & 4:  # a read writes here
            raise Refused(Status.READ_ONLY, carrier(done))
        there = region_of(remote, target + done)
        if there is None:
            raise Refused(Status.TARGET_NOT_REGISTERED, carrier(done))
        if not there.access & needs:
            raise Refused(Status.ACCESS_DENIED, carrier(done))
        length = min(total - done, here.end - source - done, there.end - target - done)
        if length > slice_bytes + slice_bytes // 4:  # a shorter tail joins the slice
            length = slice_bytes
        slices.append(
            Cut(source + done, target + done, length, carrier(done), carrier(done + length - 1), here.slot, there.slot)
        )
        done += length
    return slices


# ------------------------------------------------------------------------------ the pool
class Pool:
    """A set of free chunks, and what each owner holds."""

    def __init__(self, chunks: int) -> None:
        self.free = set(range(chunks))
        self.held: dict[int, list[int]] = {}

    def acquire(self, owner: int, chain: list[int]) -> None:
        assert len(set(chain)) == len(chain)
        assert set(chain) <= self.free, "a chunk was handed out twice"
        self.free -= set(chain)
        self.held[owner] = chain

    def release(self, owner: int) -> None:
        self.free |= set(self.held.pop(owner))

    def release_one(self, owner: int, chunk: int) -> None:
        self.held[owner].remove(chunk)
        self.free.add(chunk)
        if not self.held[owner]:
            del self.held[owner]


# ------------------------------------------------------------------------------ the batch state table
BATCH_TABLE = {
    ("FREE", "ACQUIRE"): "OPEN",
    ("OPEN", "SEAL"): "SEALED",
    ("OPEN", "CLOSE"): "DRAINING",
    ("SEALED", "FINISH"): "RECLAIMABLE",
    ("SEALED", "CLOSE"): "DRAINING",
    ("RECLAIMABLE", "CLOSE"): "DRAINING",
    ("DRAINING", "FINISH"): "DRAINING",
    ("DRAINING", "RECLAIM"): "FREE",
}
"""(state, event) -> state; whatever is not listed is refused and changes nothing."""


# ------------------------------------------------------------------------------ what arrived
def arrived(source: np.ndarray, target: np.ndarray, at: int, to: int, length: int) -> bool | None:
    """True when all bytes are there, False when none is, None when only some are."""
    same = source[at : at + length] == target[to : to + length]
    return True if same.all() else False if not target[to : to + length].any() else None


# ------------------------------------------------------------------------------ queue pairs
def answered_by(last: int, signaled: list[bool], answered: list[bool]) -> list[int]:
    """The work requests that a completion of number `last` answers: those before it up to one that asks for its own."""
    group = [last]
    for i in range(last - 1, -1, -1):
        if signaled[i] or answered[i]:
            break
        group.insert(0, i)
    return group


class Lane(NamedTuple):
    """A queue pair as the policy of spreading sees it."""

    ready: bool
    depth: int
    in_flight: int
    weight: int
    credits: int


def chosen(lanes: list[Lane], n: int) -> int | None:
    """The one that a chain of `n` work requests goes to."""
    best = None
    for i, lane in enumerate(lanes):
        in_flight = min(lane.in_flight, lane.depth)
        wanted = min(n, max(1, lane.depth // 2))
        if lane.ready and min(lane.depth - in_flight, lane.credits) >= wanted:
            burden = (in_flight + wanted) * 1024 // lane.weight
            if best is None or burden < best[0]:
                best = burden, i
    return None if best is None else best[1]


def gathered(slices: list[tuple[int, int, int]], chunk: int, most: int) -> list[list[int]]:
    """Which slices share a work request: they follow one another at the target, in one region and one chunk of slots.

    `slices`: target, length, region of each; `chunk`: slots in one.
    """
    groups: list[list[int]] = []
    for i, (target, _, region) in enumerate(slices):
        before = slices[i - 1]
        side_by_side = i % chunk > 0 and target == before[0] + before[1] and region == before[2]
        if side_by_side and len(groups[-1]) < most:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# ------------------------------------------------------------------------------ the life of a queue pair
QUEUE_TABLE = {
    **{(state, "NONE"): state for state in ("CLOSED", "READY", "BROKEN", "DRAINED", "PROBING")},
    ("CLOSED", "BREAK"): "CLOSED",
    ("CLOSED", "RETURN"): "CLOSED",
    ("CLOSED", "LOSE"): "CLOSED",
    ("CLOSED", "PROBE"): "PROBING",
    ("READY", "BREAK"): "BROKEN",
    ("READY", "RETURN"): "READY",
    ("READY", "LOSE"): "BROKEN",
    ("READY", "PROBE"): "READY",
    ("BROKEN", "BREAK"): "BROKEN",
    ("BROKEN", "RETURN"): "BROKEN",
    ("BROKEN", "LOSE"): "BROKEN",
    ("BROKEN", "PROBE"): "BROKEN",
    ("DRAINED", "BREAK"): "DRAINED",
    ("DRAINED", "RETURN"): "CLOSED",
    ("DRAINED", "LOSE"): "CLOSED",
    ("DRAINED", "PROBE"): "DRAINED",
    ("PROBING", "BREAK"): "BROKEN",
    ("PROBING", "RETURN"): "PROBING",
    ("PROBING", "LOSE"): "BROKEN",
    ("PROBING", "PROBE"): "PROBING",
}
"""(state, order) -> state, of a queue pair with something on it that has not been answered yet."""

QUEUE_EVENTS = {
    ("READY", "BREAK"): "BROKEN",
    ("PROBING", "BREAK"): "BROKEN",
    ("BROKEN", "DRAIN"): "DRAINED",
    ("BROKEN", "CLOSE"): "CLOSED",
    ("DRAINED", "CLOSE"): "CLOSED",
    ("CLOSED", "PROBE"): "PROBING",
    ("PROBING", "PASS"): "READY",
}
"""(state, event) -> state; what is not here changes nothing."""


# ------------------------------------------------------------------------------ what failed
TRANSIENT = {"WR_FLUSH_ERR", "RETRY_EXC_ERR", "RNR_RETRY_EXC_ERR"}


def outcome_of(wc: str, slices: int, retries: int, note: bool, breaks: bool, overdue: bool) -> str:
    """What becomes of a work request that failed."""
    if breaks and overdue:
        return "FLUSH"
    if slices > 1 and retries and wc != "REM_ACCESS_ERR":
        return "HOLD" if breaks else "FLUSH"
    full = note and wc == "RNR_RETRY_EXC_ERR"
    return "HOLD" if breaks and not full and wc in TRANSIENT | {"LOC_QP_OP_ERR"} else "ANSWER"


def fate_of(wc: str, note: bool, stopped: str, exhausted: bool, askable: bool) -> str:
    """What becomes of a slice of a work request that failed; `stopped`: what its batch was stopped with, if it was."""
    if note and wc == "RNR_RETRY_EXC_ERR":
        return "FULL"
    if wc in TRANSIENT:
        goes_on, ended = "FAIL" if exhausted else "AGAIN", "STOP"
    elif wc == "REM_ACCESS_ERR":
        goes_on, ended = "ASK" if askable else "FAIL", "FAIL"
    elif wc == "REM_ABORT_ERR":
        goes_on, ended = "FAIL", "STOP" if stopped == "TIMED_OUT" else "FAIL"
    else:
        goes_on = ended = "FAIL"
    return ended if stopped else goes_on


def status_of(wc: str) -> str:
    """The status of a slice whose work request ended so, and that is not posted again."""
    known = {
        "REM_ACCESS_ERR": "REMOTE_ACCESS", "REM_INV_REQ_ERR": "REMOTE_ERROR", "REM_OP_ERR": "REMOTE_ERROR",
        "RETRY_EXC_ERR": "RETRIES_EXCEEDED", "RNR_RETRY_EXC_ERR": "RETRIES_EXCEEDED", "WR_FLUSH_ERR": "FLUSHED",
        "REM_ABORT_ERR": "PEER_GONE",
    }  # fmt: skip
    return known.get(wc, "LOCAL_ERROR")
