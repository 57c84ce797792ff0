"""The keys of software wires: which memory a peer may reach, checked at the target for every work request."""

from __future__ import annotations

import secrets

import numpy as np

from mooncache import limits
from mooncache.errors import CapacityError
from mooncache.kernels.arrays import Row, address_of, rows_of
from mooncache.kernels.enums import Access, Opcode
from mooncache.kernels.jit import kernel
from mooncache.kernels.publication import publish, withdraw_key
from mooncache.kernels.records.base import acquire
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.records import KEY, key_at

KEY_SLOT_MASK = limits.REGIONS_MOST - 1


@kernel
def key_status(keys, rkey, address, length, opcode):
    """Check whether the target lets this range be reached under this key: a WcStatus; forms no sum that overflows.

    0 is the key of entries that are not in use.
    """
    entry = key_at(keys, rkey & KEY_SLOT_MASK)
    needed = Access.READ if opcode == Opcode.READ else Access.WRITE
    base, end = entry.base, entry.end
    if rkey == 0 or acquire(entry, "key") != rkey or entry.access & needed == 0:
        return np.int64(WcStatus.REM_ACCESS_ERR)
    if address < base or address >= end or length > end - address:
        return np.int64(WcStatus.REM_ACCESS_ERR)
    return np.int64(WcStatus.SUCCESS)


class KeyTable:
    """The memory that peers reach, by key. Keys are drawn at random, so that an old one names nothing by chance."""

    def __init__(self, words: np.ndarray | None = None) -> None:
        """`words`: zeroed int64 of REGIONS_MOST keys to use, on a cache line of its own."""
        self.entries = rows_of(KEY, limits.REGIONS_MOST) if words is None else words.view(KEY)
        self.closed = False
        self._free = list(range(limits.REGIONS_MOST - 1, -1, -1))

    @property
    def address(self) -> int:
        """The address of the entries, for kernels."""
        return address_of(self.entries)

    def add(self, address: int, length: int, access: int) -> int:
        """Enter a range; return its key, never 0."""
        if not self._free:
            raise CapacityError(
                f"all {limits.REGIONS_MOST} registrations of this device are in use; unregister some first"
            )
        slot = self._free.pop()
        key = secrets.randbelow(1 << 51) * limits.REGIONS_MOST + slot  # 51 random bits above twelve of the slot
        Row(self.entries, slot).set(base=address, end=address + length, access=access)
        publish(self._entry(slot), key)
        return key

    def _entry(self, slot: int) -> int:
        return self.address + slot * KEY.itemsize

    def remove(self, key: int) -> None:
        """Refuse the key from now on."""
        withdraw_key(self._entry(key & KEY_SLOT_MASK))
        self._free.append(key & KEY_SLOT_MASK)

    def clear(self) -> None:
        """Refuse all keys from now on."""
        self.closed = True
        for slot in np.flatnonzero(self.entries["key"]):
            withdraw_key(self._entry(int(slot)))

    def release(self) -> None:
        """Free the entries. Nobody in this process looks at them any more, nor will."""
        self.entries = self.entries[:0].copy()
