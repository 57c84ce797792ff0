"""The traits of reclaim policies, for all that has to allow for a policy.

Each policy's file declares its own `TRAITS`.
"""

from enum import Enum, auto
from typing import NamedTuple


class FreesIn(Enum):
    """The thread in which a policy frees slices that arrived."""

    NOBODY = auto()
    CALLER = auto()  # whoever closes the batch
    WORKER = auto()
    REAPER = auto()


class Traits(NamedTuple):
    """The places and ways in which a policy deletes.

    Attributes:
        frees_in: the thread that frees.
        whole_chain: a batch's chain of chunks goes at once; else it is freed slice by slice.
        retires: closed batches wait in the ring of retired ones until somebody frees them in an idle moment.
    """

    frees_in: FreesIn
    whole_chain: bool
    retires: bool = False

    @property
    def frees(self) -> bool:
        """False when slots never come back."""
        return self.frees_in != FreesIn.NOBODY

    @property
    def needs_reaper(self) -> bool:
        """True when an engine has to run a reaper."""
        return self.frees_in == FreesIn.REAPER
