"""Every chance of a simulation comes from an independent stream, one for each thing that has chance in it."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def stream(seed: int, entity: str, purpose: str) -> np.random.Generator:
    """Return the generator of `purpose` ("jitter") of `entity` ("request/7") under `seed`; the same on each call.

    The Philox key is a hash of all three, so a stream depends on nothing else: not on the order in which
    streams are made, not on how much others draw, not on PYTHONHASHSEED. That keeps the arrivals where they
    are when the reclaim policy changes (common random numbers), and the noise of a comparison small.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011 (Philox).
    """
    name = json.dumps([seed, entity, purpose])  # unlike joined strings, no two of these look alike
    key = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
