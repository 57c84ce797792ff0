"""A peer: an engine's knowledge of another that it is connected to."""

from __future__ import annotations

import threading
from itertools import pairwise
from time import monotonic_ns

from mooncache import limits
from mooncache.descriptor import Descriptor, RemoteRegion
from mooncache.errors import CapacityError, TransportError
from mooncache.kernels.tables import RegionTable


class Peer:
    """A connected engine. `table` mirrors what it has registered.

    Attributes:
        name: what it was called when it was connected to: its name, or "host:port".
        generation: another one than last time means that it has restarted.
        forgotten: by `Engine.forget`, or for want of room when it was gone; it is of no use any more.
    """

    def __init__(self, index: int, name: str, regions: int = limits.REGIONS) -> None:
        self.index, self.name, self.generation = index, name, 0
        self.handle = index  # how submits name it: its row, and how often that had been another's
        self.engine = ""  # what it calls itself, once it was connected to
        self.table = RegionTable(f"peer {name!r}", regions)
        self.connecting = threading.Lock()  # held while the network is waited for, and while it is forgotten
        self.met = 0.0  # when it was last connected to; 0: never
        self.forgotten = False
        self.kept: list[object] = []  # what workers may still look at, of a row that is given back
        self._known: dict[RemoteRegion, int] = {}
        self._retired: list[tuple[int, int]] = []  # (when, slot) of regions that are no longer there
        self.gone = True

    @property
    def regions(self) -> tuple[RemoteRegion, ...]:
        """The regions that it has registered, as of the last connect or look."""
        return tuple(sorted(self._known))

    @property
    def breaks(self) -> int:
        """The number of connections to it that ended with sent slices unanswered."""
        return self.table.header["breaks"]

    @property
    def confirmed(self) -> int:
        """The number of those connections of which it is known that nothing lands any more."""
        return self.table.header["confirmed"]

    @property
    def gone(self) -> bool:
        """True while it has to be connected to, for the first time or again. Submits are refused meanwhile."""
        return bool(self.table.header["gone"])

    @gone.setter
    def gone(self, gone: bool) -> None:
        self.table.header.put("gone", gone)

    def refresh(self, described: Descriptor, oldest: int) -> None:
        """Bring the table up to date with the peer's own description.

        Slices that are not posted yet name a region by its slot: so another region gets a slot only when every batch
        that was submitted before its former region went has ended. But one that covers a former one takes over its
        slot at once, and the slices go on under the new key.

        Args:
            oldest: when the oldest batch to this peer that is under way was submitted, ns.

        Raises, with nothing changed:
            TransportError: what it says does not hold. CapacityError: more regions than slots.
        """
        now = set(described.regions)
        ordered = sorted(now)
        for before, after in pairwise(ordered):
            if before.address + before.length > after.address:
                raise TransportError(f"peer {self.name!r} says that it has registered {after.address:#x} twice")
        for when, slot in [entry for entry in self._retired if entry[0] < oldest]:
            self._retired.remove((when, slot))
            self.table.recycle(slot)
        new = sorted(now - self._known.keys())
        gone = [region for region in self._known if region not in now]
        heirs = {heir: region for region in gone if (heir := next(filter(region.covered_by, new), None)) is not None}
        if len(new) - len(heirs) > self.table.room:
            raise CapacityError(
                f"peer {self.name!r} has {len(now)} regions registered, and of {self.table.rows} this engine can know "
                f"{len(self._retired)} are still used by batches under way: wait for those, register fewer, or open "
                "this engine with more `regions`"
            )
        self.generation, self.engine = described.generation, described.name
        self.table.forgive()
        slots = {region: self._known.pop(region) for region in gone}
        for region in slots.keys() - heirs.values():
            self.table.refuse(slots[region])
            self._retired.append((monotonic_ns(), slots[region]))
        for region in new:
            former = heirs.get(region)
            slot = self.table.reserve() if former is None else slots[former]
            self.table.grant(slot, region.rkeys, region.access, renewed=former is not None)
            self._known[region] = slot
        self.table.replace((region.address, region.length, slot) for region, slot in self._known.items())

    def __repr__(self) -> str:
        return f"<Peer {self.name!r}, {len(self.table)} regions>"
