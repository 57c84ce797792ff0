"""The settings that an engine is made with."""

from __future__ import annotations

from dataclasses import dataclass

from mooncache import limits
from mooncache.errors import UsageError, came
from mooncache.kernels.arrays import WORD
from mooncache.kernels.enums import Policy, Store


@dataclass(frozen=True)
class Settings:
    """The settings of an engine. Capacities default to the sums in `limits`; times are ns."""

    store: Store = Store.POOL
    policy: Policy = Policy.BULK
    workers: int = 1
    slices: int = limits.POOL_SLICES  # rounded up to whole chunks of 256
    batches: int = limits.BATCHES
    peers: int = limits.PEERS
    regions: int = limits.REGIONS
    notes: int = limits.INBOX_NOTES
    note_bytes: int = limits.NOTE_BYTES
    slice_bytes: int = limits.SLICE_BYTES
    queue_depth: int = limits.QUEUE_DEPTH
    chain: int = limits.CHAIN
    poll_lot: int = limits.POLL_LOT
    retries: int = limits.RETRIES
    signal: int = 0  # ask for a completion every so many work requests; 0: as the wire prefers
    cache_slices: int = limits.CACHE_SLICES
    reaper_lot: int = limits.REAPER_LOT
    reaper_period_ns: int = limits.REAPER_PERIOD_NS
    spin_ns: int = limits.SPIN_NS

    def __post_init__(self) -> None:
        upper = {
            "workers": limits.WORKERS,
            "slices": limits.SLICES_MAX,
            "batches": 1 << 20,
            "peers": 1 << 15,
            "regions": limits.REGIONS_MOST,
            "notes": 1 << 20,
            "note_bytes": limits.NOTE_BYTES_MOST,
            "slice_bytes": 1 << 30,
            "queue_depth": 1 << 16,
            "chain": 1 << 12,
            "poll_lot": 1 << 12,
            "retries": 100,
            "signal": 1 << 12,
            "cache_slices": 1 << 24,
            "reaper_lot": limits.SLICES_MAX,
            "reaper_period_ns": 10**12,
            "spin_ns": 10**12,
        }
        for name, most in upper.items():
            value = getattr(self, name)
            least = 0 if name in ("retries", "signal", "cache_slices", "spin_ns") else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UsageError(f"{name} must be an integer from {least} to {most}, got {came(value)}")

    @property
    def chunks(self) -> int:
        """The chunks of the pool."""
        return -(-self.slices // limits.CHUNK_SLICES)

    @property
    def note_stride(self) -> int:
        """The bytes of the longest notification as it travels, whole words."""
        return limits.NOTE_HEAD_BYTES + (self.note_bytes + WORD - 1 & -WORD)

    @property
    def chain_length(self) -> int:
        """The work requests behind one doorbell; at most half the queue, so that posting never empties it."""
        return max(1, min(self.chain, self.queue_depth // 2))
