"""`mooncache bench finality` ends transfers early, at random moments: does anything land in pages called safe?

    initiator   writes all its pages    [..........]   is cancelled, closed, late, stopped or killed somewhere in there
    target      lies there, is stopped, or fences [..........]
    then        whoever was told that pages are safe gives them another value at once: what differs later came *late*

The moments are drawn from a seed. `late_bytes_source` are bytes of pages that were the initiator's own again,
`late_bytes_target` landed in pages that were the target's own again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import typer

from mooncache.bench.ends.finality import CANARY
from mooncache.bench.harness.measure import SEED, expect, quantile
from mooncache.bench.harness.options import JSON, names
from mooncache.bench.harness.process import Process
from mooncache.bench.harness.report import answer, progress, provenance, show_table

NBYTES = {"tcp": 16 << 20, "shm": 16 << 20, "rdma": 2 << 20}
"""The bytes of the pages. Moving them takes about as long as MOMENT_S; the RDMA device may be an emulated one."""


class Provider(str, Enum):
    """The wires on which transfers can end early."""

    TCP = "tcp"
    SHM = "shm"
    RDMA = "rdma"


DEFAULT_PROVIDERS = (Provider.TCP, Provider.SHM)
CASES, MOST_CASES = 1000, 100_000
BLOCKS = (4096, 16384, 65536)
MOMENT_S = 0.004  # within this the event comes
LOOK_S = 0.02  # after everybody goes on: time to land for whatever still lies in sockets
DEADLINE_S = 0.02
END = "mooncache.bench.ends.finality"


class Fight:
    """Two processes, and what was seen of them so far."""

    def __init__(self, provider: str, seed: int) -> None:
        self.provider, self.nbytes = provider, NBYTES[provider]
        self.chance = np.random.Generator(np.random.Philox(key=[seed, sum(provider.encode())]))
        self.kinds: dict[str, tuple[float, Callable[[], None]]] = {
            "fence": (0.40, self._fence),
            "close": (0.20, lambda: self._end("close")),
            "cancel": (0.20, lambda: self._end("cancel")),
            "deadline": (0.10, self._deadline),
            "fence, stopped": (0.08, self._fence_stopped),
            "fence, killed": (0.02, self._fence_killed),
        }
        self.seen: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        self.fences: dict[str, list[float]] = {"alive": [], "stopped or dead": []}
        self.refused = 0
        self.target, self.initiator = Process(END), Process(END)
        self.there = self.target.ask(do="open", provider=provider, nbytes=self.nbytes)
        self._open_initiator()

    def _open_initiator(self) -> None:
        """Open the initiator, and let one transfer arrive: else the cases would prove nothing."""
        self.here = self.initiator.ask(do="open", provider=self.provider, nbytes=self.nbytes)
        self._write()
        self._hear("wait")
        expect("bytes of the first transfer", self.target.ask(do="late")["written"], self.nbytes)
        self.target.ask(do="fill", value=CANARY)

    def case(self) -> None:
        """Run one case, from a quiet moment to the next."""
        names = list(self.kinds)
        kind = names[int(self.chance.choice(len(names), p=[weight for weight, _ in self.kinds.values()]))]
        self.seen[kind] += 1
        self.kinds[kind][1]()
        time.sleep(LOOK_S)
        self.late.update(self.target.ask(do="late"))
        self.target.ask(do="fill", value=CANARY)

    def close(self) -> None:
        """End both processes."""
        self.initiator.close()
        self.target.close()

    # -------------------------------------------------------------------------- what happens
    def _fence(self) -> None:
        self._write()
        self._moment()
        safe = self._fenced("alive")
        self._hear("wait", safe)

    def _fence_stopped(self) -> None:
        self._write()
        self._moment()
        self.initiator.pause(True)
        try:
            safe = self._fenced("stopped or dead")
        finally:
            self.initiator.pause(False)
        self._hear("wait", safe)

    def _fence_killed(self) -> None:
        self._write()
        self._moment()
        self.initiator.kill()
        self._fenced("stopped or dead")
        self.initiator.close()
        self.initiator = Process(END)
        time.sleep(LOOK_S)
        self.late.update(self.target.ask(do="late"))
        self._open_initiator()

    def _end(self, how: str) -> None:
        self._write()
        self._moment()
        self._hear(how, safe=False)

    def _deadline(self) -> None:
        self.initiator.ask(do="connect", peer=self.there["address"], base=self.there["base"])
        self.target.pause(True)
        try:
            self._write(DEADLINE_S)
            self.outcomes[self.initiator.ask(do="end", how="wait")["outcome"]] += 1
        finally:
            self.target.pause(False)
        self.initiator.ask(do="settle")
        self.target.ask(do="fill", value=CANARY)

    # -------------------------------------------------------------------------- pieces
    def _write(self, timeout: float | None = None) -> None:
        to, block = self.there, int(self.chance.choice(BLOCKS))
        self.initiator.ask(do="write", peer=to["address"], base=to["base"], block=block, timeout=timeout)

    def _moment(self) -> None:
        time.sleep(float(self.chance.uniform(0, MOMENT_S)))

    def _fenced(self, peer: str) -> bool:
        """Fence the peer at the target; return whether it could say that its pages are safe, and then reuses them."""
        said = self.target.ask(do="fence", peer=self.here["name"])
        self.fences[peer].append(said["seconds"])
        self.refused += "refused" in said
        return "refused" not in said

    def _hear(self, how: str, safe: bool = True) -> None:
        """Wait until the initiator's batch has ended and is final at both ends."""
        self.outcomes[self.initiator.ask(do="end", how=how)["outcome"]] += 1
        expect("a batch to be quiesced at", self.initiator.ask(do="settle"), "BOTH")
        if not safe:
            self.target.ask(do="fill", value=CANARY)


def measure(provider: str, cases: int, step: Callable[[], None]) -> dict[str, Any]:
    """Run all cases of one provider; return its row of the report."""
    fight = Fight(provider, SEED)
    try:
        for _ in range(cases):
            fight.case()
            step()
    finally:
        fight.close()
    alive, others = fight.fences["alive"], fight.fences["stopped or dead"]
    return {
        "provider": provider,
        "cases": cases,
        "late_bytes_source": fight.late["reused"],
        "late_bytes_target": fight.late["written"],
        "fence_ms_p50": round(quantile(alive, 0.5) * 1e3, 3) if alive else None,
        "fence_ms_max": round(max([*alive, *others]) * 1e3, 3) if alive or others else None,
        "fence_peer_stopped_ms_max": round(max(others) * 1e3, 3) if others else None,
        "fences_refused": fight.refused,
        "kinds": dict(fight.seen),
        "outcomes": dict(fight.outcomes),
    }


def run(providers: Sequence[str], cases: int) -> dict[str, Any]:
    """Try every provider; return the report that `--json` prints."""
    with progress("finality", cases * len(providers)) as bar:
        results = [measure(name, cases, bar) for name in providers]
    return {"bench": "finality", "results": results, "seed": SEED, "provenance": provenance()}


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    columns = (
        "provider",
        "cases",
        "late bytes\nsource",
        "late bytes\ntarget",
        "fence\np50 ms",
        "fence\nmax ms",
        "refused",
    )
    rows = [
        [
            row["provider"], row["cases"], row["late_bytes_source"], row["late_bytes_target"], row["fence_ms_p50"],
            row["fence_ms_max"], row["fences_refused"],
        ]
        for row in report["results"]
    ]  # fmt: skip
    late = sum(row["late_bytes_source"] + row["late_bytes_target"] for row in report["results"])
    says = (
        f"{late or 'No'} bytes landed in pages after they had been called safe. A fence is refused, and its pages are "
        "not called safe, where a process of this host was stopped in the middle of a copy and cannot look again "
        "whether it may go on."
    )
    show_table("Ended early", columns, rows, says)


def command(
    provider: list[Provider] = typer.Option(list(DEFAULT_PROVIDERS), help="rdma needs a device. Repeatable."),
    cases: int = typer.Option(CASES, min=1, max=MOST_CASES, help="Transfers that end early, of each provider."),
    json: bool = JSON,
) -> None:
    """Cancel, close, let time out, stop, kill and fence in mid-transfer; count the bytes that land afterwards.

    Exit status 1 if any byte does.
    """
    report = run(names(provider), cases)
    answer(report, json, show)
    if any(row["late_bytes_source"] or row["late_bytes_target"] for row in report["results"]):
        raise typer.Exit(1)
