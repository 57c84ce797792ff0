"""Moves LLM KV cache between machines, and predicts what that will cost. See README.md."""

from mooncache.batch import Batch
from mooncache.engine import Engine
from mooncache.errors import (
    CapacityError,
    EngineClosed,
    Failure,
    MooncacheError,
    Status,
    TransferFailed,
    TransportError,
    UsageError,
)
from mooncache.memory import Region
from mooncache.peer import Peer
from mooncache.stats import Stats

__all__ = [
    "Batch",
    "CapacityError",
    "Engine",
    "EngineClosed",
    "Failure",
    "MooncacheError",
    "Peer",
    "Region",
    "Stats",
    "Status",
    "TransferFailed",
    "TransportError",
    "UsageError",
]
