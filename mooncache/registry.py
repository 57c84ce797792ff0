"""An engine's registered memory: in its table for kernels, with its provider, and in a snapshot for peers.

A provider may pin memory for seconds. Meanwhile its range is only reserved; no lock is held, so other threads register
other ranges, and peers are told what was registered before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from mooncache.descriptor import Keys, RemoteRegion
from mooncache.errors import UsageError, came
from mooncache.kernels import calls
from mooncache.kernels.enums import Access
from mooncache.kernels.tables import RegionTable
from mooncache.memory import ACCESS, Part, Region, cut, range_of
from mooncache.operands import is_text
from mooncache.owner import Owner
from mooncache.providers.base import Provider


class Registry:
    """The regions of one engine. Methods may be called from any thread.

    Attributes:
        regions: by the slot of their first part.
        described: what peers are told of them. A new tuple takes its place whenever they change.
    """

    def __init__(self, table: RegionTable, provider: Provider) -> None:
        self._table, self._provider = table, provider
        self._lock = threading.Lock()  # never held while the provider is at work
        self._reserved: list[tuple[int, int]] = []
        self.regions: dict[int, Region] = {}
        self.described: tuple[RemoteRegion, ...] = ()

    def register(self, engine: Owner, buffer: Any, access: str) -> Region:
        """Register a buffer for `engine`. Raises what `Engine.register` does, with nothing left behind."""
        if not is_text(access) or access not in ACCESS:
            raise UsageError(f"access must be one of {', '.join(map(repr, ACCESS))}, got {came(access)}")
        memory = range_of(buffer)
        if memory.device and not self._provider.reaches_gpus:
            raise UsageError(
                f"expected memory of the host, got memory of {memory.device}; provider {self._provider.name!r} copies "
                "with the CPU, which cannot reach it: 'rdma' can, or copy it to the host first"
            )
        if not memory.writable and access != "read":
            raise UsageError(f"this {type(buffer).__name__} is read-only; register it with access='read'")
        bits = ACCESS[access] | (Access.LOCAL if memory.writable else 0) | (0 if memory.owner is None else Access.HELD)
        with self._reserve(memory.address, memory.length), ExitStack() as undo:
            keyed: list[tuple[int, int, Keys]] = []
            for address, length in cut(memory, self._provider.region_bytes):
                keys = self._provider.register(address, length, bits)
                undo.callback(self._provider.unregister, keys)
                keyed.append((address, length, keys))
            with self._lock:
                parts = self._enter(keyed, bits)
                region = self.regions[parts[0].slot] = Region(engine, memory, access, parts)
                self._describe()
            undo.pop_all()
        return region

    @contextmanager
    def _reserve(self, address: int, length: int) -> Iterator[None]:
        """Keep a range from being registered by others meanwhile."""
        with self._lock:
            taken = self._table.overlapping(address, length)
            pending = next(((a, n) for a, n in self._reserved if a < address + length and address < a + n), None)
            other = taken or pending
            if other:
                what = "registered region" if taken else "range being registered"
                raise UsageError(
                    f"{self._table.owner}: the range [{address:#x}, +{length}) overlaps the {what} "
                    f"[{other[0]:#x}, +{other[1]}); register each byte once"
                )
            self._reserved.append((address, length))
        try:
            yield
        finally:
            with self._lock:
                self._reserved.remove((address, length))

    def _enter(self, keyed: list[tuple[int, int, Keys]], bits: int) -> list[Part]:
        """Enter all parts of a region into the table, or none."""
        with ExitStack() as undo:
            parts = []
            for address, length, keys in keyed:
                slot = self._table.add(address, length, keys.lkeys, bits)
                undo.callback(self._table.remove, slot)
                parts.append(Part(address, length, slot, keys))
            undo.pop_all()
        return parts

    def unregister(self, region: Region, ctl: int) -> None:
        """Withdraw a region. `ctl`: control block of the calling thread. Raises what `Region.unregister` does."""
        with self._lock:
            if not region.registered:
                raise UsageError(f"{region!r} is not registered with this engine")
            slots = np.array([part.slot for part in region._parts], np.int64)
            busy = calls.withdraw(ctl, slots)
            if busy:
                raise UsageError(f"{region!r} is in use by {busy} slices; wait for their batches, then unregister it")
            del self.regions[region._parts[0].slot]
            self._describe()

    def release(self, region: Region) -> None:
        """Have the provider withdraw what `unregister` took out; may wait for peers."""
        with ExitStack() as undo:
            for part in region._parts:
                undo.callback(self._recycle, part.slot)
                undo.callback(self._provider.unregister, part.keys)

    def _recycle(self, slot: int) -> None:
        with self._lock:
            self._table.recycle(slot)

    def _describe(self) -> None:
        self.described = tuple(
            RemoteRegion(part.address, part.length, part.keys.rkeys, ACCESS[region.access])
            for region in self.regions.values()
            for part in region._parts
        )

    def __repr__(self) -> str:
        return f"<Registry of {len(self.regions)} regions, {len(self._reserved)} being registered>"
