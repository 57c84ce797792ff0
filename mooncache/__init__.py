"""Mooncache moves LLM KV cache between machines, and predicts what that will cost. See README.md."""

from mooncache.batch import Batch, Quiesced
from mooncache.engine import Engine
from mooncache.errors import (
    CapacityError,
    DiscoveryError,
    EngineClosed,
    EngineInherited,
    Failure,
    MooncacheError,
    Status,
    TransferFailed,
    TransportError,
    UsageError,
)
from mooncache.inbox import Inbox, Notification
from mooncache.memory import Region
from mooncache.peer import Peer
from mooncache.stats import Stats

__all__ = [
    "Batch",
    "CapacityError",
    "DiscoveryError",
    "Engine",
    "EngineClosed",
    "EngineInherited",
    "Failure",
    "Inbox",
    "MooncacheError",
    "Notification",
    "Peer",
    "Quiesced",
    "Region",
    "Stats",
    "Status",
    "TransferFailed",
    "TransportError",
    "UsageError",
]
