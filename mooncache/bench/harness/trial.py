"""A case of a transfer bench: pairs of processes, and samples that are checked where they arrive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from time import monotonic_ns
from typing import Any, NamedTuple

from mooncache.bench.harness import against as packages
from mooncache.bench.harness.measure import FingerprintError
from mooncache.bench.harness.process import Process
from mooncache.bench.harness.wires import Case
from mooncache.kernels import jit
from mooncache.sizes import spell

REFERENCE = {"tcp": "plain socket", "shm": "plain copy", "loopback": "plain copy"}
START_NS = 10_000_000  # from now to a sample's start: all processes have read the command and sleep by then
MIB = 1 << 20
GROWING = "initiator_rss_mib", "initiator_fds", "target_rss_mib", "target_fds"  # as `Side.transfer` looks at them


# ------------------------------------------------------------------------------ processes
class Pair(NamedTuple):
    """The two processes of a rank; one and the same where the wire stays within a process."""

    initiator: Process
    target: Process


def ends(op: str) -> tuple[str, str]:
    """Return the role that an operation's bytes come from, and the role that they go to."""
    return ("initiator", "target") if op == "write" else ("target", "initiator")


class Crew:
    """The processes of a run. They are kept from case to case, since one takes a second to start."""

    def __init__(self, stack: ExitStack) -> None:
        if jit.cold():
            jit.prewarm()  # says so, once, instead of each process in silence
        self._stack = stack
        self._pairs: dict[tuple[str, str, int], Pair] = {}

    def pair(self, case: Case, rank: int) -> Pair:
        """Return the processes of this rank that can run the case, started if need be."""
        package, alone = packages.PACKAGES.get(case.provider), case.provider == "loopback"
        kind = (case.provider, case.transport) if package else ("loopback" if alone else "ours", "")
        if (key := (*kind, rank)) not in self._pairs:
            options = packages.options(case.provider, case.transport) if package else {}
            first, *second = [
                self._stack.enter_context(Process("mooncache.bench.ends.rank", **options))
                for _ in range(1 if alone else 2)
            ]
            self._pairs[key] = Pair(first, *second or [first])
        return self._pairs[key]

    def dismiss(self, provider: str) -> None:
        """End all processes of another package; what they were doing cannot be finished."""
        for key in [key for key in self._pairs if key[0] == provider]:
            for process in self._pairs.pop(key):
                process.kill()


# ------------------------------------------------------------------------------ one case
class Trial:
    """One case, opened in its processes."""

    def __init__(self, case: Case, crew: Crew, reference: str = "") -> None:
        self.case = case
        self.pairs = [crew.pair(case, rank) for rank in range(case.ranks)]
        self.patience = 60 + case.sample_bytes / 1e8 + case.ranks * case.layers * case.slices / 5e3
        self.reference = reference or REFERENCE.get(case.transport, "plain copy")
        words = {"do": "open", "case": asdict(case), "reference": self.reference}
        for pair in self.pairs:
            target = pair.target.ask(role="target", **words)
            opened = pair.initiator.ask(role="initiator", target=target, **words)
            self.case = replace(case, transport=case.transport or opened["transport"])
        self.looks: list[list[list[int]]] = [[] for _ in self.pairs]

    def sample(self, what: str, seed: int) -> float:
        """Send one sample by "wire" or "reference", in all ranks at once; return seconds from first begin to end."""
        sender, receiver = ends(self.case.op)
        self._all(sender, do="fill", seed=seed)
        start = monotonic_ns() + START_NS
        doing = {"do": "transfer" if what == "wire" else "refer", "start": start}
        assisted = what == "reference" and self.reference == "plain socket"
        for role in ("target", "initiator") if assisted else ("initiator",):
            self._tell(role, **doing)
        times = self._answers("initiator")
        if assisted:
            self._answers("target")
        for looks, one in zip(self.looks, times, strict=True):
            looks += one.get("looks", ())
        self._verify(receiver, what, seed)
        return float(max(one["end"] for one in times) - min(one["begin"] for one in times)) / 1e9

    def each(self, what: str, count: int, seed: int, cores: tuple[int, int]) -> list[int]:
        """Move `count` blocks one at a time by "wire" or "reference", of one rank; return how long each took, ns.

        The initiator's Python runs on the first of the cores meanwhile, the target's on the other.
        """
        sender, receiver = ends(self.case.op)
        self._all(sender, do="fill", seed=seed)
        doing = {"do": "each", "what": what, "count": count, "start": monotonic_ns() + START_NS}
        if what != "wire":
            self._tell("target", core=cores[1], **doing)
        self._tell("initiator", core=cores[0], **doing)
        took: list[int] = self._answers("initiator")[0]
        if what != "wire":
            self._answers("target")
        self._verify(receiver, what, seed)
        return took

    def _verify(self, receiver: str, what: str, seed: int) -> None:
        wrong = sum(self._all(receiver, do="count_wrong", seed=seed))
        if wrong:
            blocks = f"{self.case.ranks * self.case.slices} blocks of {spell(self.case.block)}"
            who = self.case.provider if what == "wire" else self.reference
            raise FingerprintError(f"expected {blocks} to arrive unchanged by {who}, {wrong} did not")

    def _tell(self, role: str, **command: Any) -> None:
        for pair in self.pairs:
            getattr(pair, role).tell(role=role, **command)

    def _answers(self, role: str) -> list[Any]:
        return [getattr(pair, role).answer(self.patience) for pair in self.pairs]

    def _all(self, role: str, **command: Any) -> list[Any]:
        """Send a command to all processes of a role; return their answers. They work at the same time."""
        self._tell(role, **command)
        return self._answers(role)

    def pause(self, paused: bool) -> None:
        """Stop all processes of the trial, or let them go on."""
        for pair in self.pairs:
            for process in pair:
                process.pause(paused)

    def close(self) -> None:
        """Check what the engines counted, and close them."""
        self._all("initiator", do="check")
        self._all("initiator", do="close")
        self._all("target", do="close")

    def growth(self) -> dict[str, float]:
        """Return how resident memory (MiB) and descriptors of both sides grew after the first quarter, at worst."""
        grown: list[float] = []
        for at in range(len(GROWING)):
            series = [[look[at] for look in looks] for looks in self.looks]
            grown.append(max(max(one[len(one) // 4 :]) - one[len(one) // 4] for one in series))
        memory = {at: round(grown[at] / MIB, 3) for at, name in enumerate(GROWING) if name.endswith("mib")}
        return {name: memory.get(at, grown[at]) for at, name in enumerate(GROWING)}


@contextmanager
def paused(trial: Trial) -> Iterator[None]:
    """Stop the trial's processes meanwhile."""
    trial.pause(True)
    try:
        yield
    finally:
        trial.pause(False)
