"""The region table of one engine, as Python changes it: kernels look ranges up in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mooncache import limits
from mooncache.errors import CapacityError, UsageError
from mooncache.kernels import regions
from mooncache.kernels.arrays import Row, address_of, put, rows_of, zeros
from mooncache.kernels.records.table import TABLE

FOR_GOOD = np.iinfo(np.int64).max
"""The entry in `refused` of a range that is no longer there: its slices are refused whatever key it had."""


class RegionTable:
    """The registered ranges of one engine, sorted by address; see `kernels/regions.py`. Changed by one thread at a
    time.

    `rows`: most ranges; a `State` takes tables of as many as its setting regions.
    """

    def __init__(self, owner: str, rows: int = limits.REGIONS) -> None:
        self.owner, self.rows = owner, rows
        self.header = Row(rows_of(TABLE))
        columns = [zeros(rows, np.int64) for _ in range(6)]
        self.bases, self.ends, self.slots, self.access, self.renewed, self.refused = columns
        self.keys = np.zeros((limits.NICS, rows), np.int64)
        self.header.set(
            bases=address_of(self.bases), ends=address_of(self.ends), slots=address_of(self.slots),
            keys=address_of(self.keys), access=address_of(self.access), renewed=address_of(self.renewed),
            refused=address_of(self.refused),
        )  # fmt: skip
        self._free = list(range(rows - 1, -1, -1))

    def __len__(self) -> int:
        return self.header["count"]

    def forgive(self) -> None:
        """Try refused regions again: the owner has said anew what is registered."""
        self.refused[:] = 0
        self.header.put("refusals", 0)

    def overlapping(self, address: int, length: int) -> tuple[int, int] | None:
        """Return the first registered (address, length) that overlaps the range, if any."""
        n = len(self)
        at = int(np.searchsorted(self.ends[:n], address, side="right"))
        if at < n and self.bases[at] < address + length:
            return int(self.bases[at]), int(self.ends[at] - self.bases[at])
        return None

    def add(self, address: int, length: int, keys: Sequence[int], access: int) -> int:
        """Insert a range with its key for each NIC; return its slot, which stays the same until `remove`."""
        taken = self.overlapping(address, length)
        if taken is not None:
            raise UsageError(
                f"{self.owner}: the range [{address:#x}, +{length}) overlaps the registered region "
                f"[{taken[0]:#x}, +{taken[1]}); register each byte once"
            )
        slot = self.reserve()
        self.grant(slot, keys, access)
        at = int(np.searchsorted(self.bases[: len(self)], address))
        regions.insert(self.header.address, at, address, address + length, slot)
        return slot

    def reserve(self) -> int:
        """Take a slot for a new range; no other gets it until `recycle`."""
        if not self._free:
            raise CapacityError(
                f"{self.owner}: all {self.rows} regions are in use; unregister some first, or open the engine with "
                "more `regions`"
            )
        return self._free.pop()

    def grant(self, slot: int, keys: Sequence[int], access: int, renewed: bool = False) -> None:
        """Let the range with this slot be reached by these keys, one a NIC.

        `renewed`: it takes the place of another that had the slot. Slices that carry it already are posted from here
        on under these keys.
        """
        renewals = self.header["renewals"] + renewed
        self.keys[: len(keys), slot], self.access[slot] = keys, access
        put(self.renewed, slot, renewals)
        put(self.refused, slot, 0)
        self.header.put("renewals", renewals)

    def refuse(self, slot: int) -> None:
        """Let slices that carry this slot be refused until `grant`."""
        put(self.refused, slot, FOR_GOOD)
        self.header.put("refusals", 1)

    def replace(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        """Let these (address, length, slot) take the place of all that is in the table, in one step."""
        base, length, slot = np.array(sorted(ranges), np.int64).reshape(-1, 3).T
        regions.replace(self.header.address, base.copy(), base + length, slot.copy())

    def position(self, slot: int) -> int:
        """Return where in the table the range with this slot stands."""
        return int(np.flatnonzero(self.slots[: len(self)] == slot)[0])

    @property
    def room(self) -> int:
        """The number of further ranges that it can take."""
        return len(self._free)

    def remove(self, slot: int) -> None:
        """Forget a range. Its slot may be given to another at once."""
        regions.remove(self.header.address, self.position(slot))
        self.recycle(slot)

    def recycle(self, slot: int) -> None:
        """Let another range have the slot of one that is no longer in the table."""
        self._free.append(slot)

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return (address, length, slot) of each region, ascending."""
        n = len(self)
        return [
            (int(base), int(end - base), int(slot))
            for base, end, slot in zip(self.bases[:n], self.ends[:n], self.slots[:n], strict=True)
        ]
