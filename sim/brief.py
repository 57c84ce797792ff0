"""A deployment in a few words on the command line becomes changes to a scenario."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from mooncache.errors import UsageError
from sim.config import Change
from sim.units import BIT_RATE

BRIEF = "model_8k"
"""The scenario that these words change where no other is named."""


class Brief(NamedTuple):
    """The options that describe a deployment; None where one was not given."""

    model: str | None = None
    tp: int | None = None
    prompt: str | None = None
    page: int | None = None

    def changes(self, alone: bool) -> list[Change]:
        """Return the options as changes of a scenario. `alone`: no scenario is named, so that a model has to be."""
        if alone and self.model is None:
            raise UsageError(
                "expected a scenario (such as tp4_layerwise, or a file) or --model, came neither; see compare --help"
            )
        keys = {"model": "workload.model", "tp": "workload.ranks", "prompt": "workload.tokens", "page": "workload.page"}
        given = {option: value for option, value in self._asdict().items() if value is not None}
        found = [Change(f"--{option} {value}", keys[option], value) for option, value in given.items()]
        if alone and self.model is not None:
            found.append(Change(f"--model {self.model}", "name", re.sub(r"[/\\]", "_", self.model)))
        return found


def shared_out(nics: str, ranks: int) -> list[Change]:
    """Turn a machine's NICs ("4x400Gbps") into those of each rank, several of its own or a share of one.

    Raises: UsageError for NICs that cannot be shared out evenly.
    """
    match = re.fullmatch(r"(?:([1-9][0-9]{0,3}) ?[x×] ?)?(.+)", nics.strip())
    said, count = f"--nics {nics}", int(match[1] or 1) if match else 1
    try:
        rate = BIT_RATE.parse(match[2] if match else nics)
    except UsageError as error:
        raise UsageError(f"{said}: {error}") from None
    if count % ranks and ranks % count:
        raise UsageError(f"{said}: expected NICs that share out evenly over {ranks} ranks, came {count}; see nic.rails")
    each = Fraction(rate * min(count, ranks), ranks)
    if each.denominator != 1:
        raise UsageError(f"{said}: expected a rate that {ranks // count} ranks can share")
    return [Change(said, "nic.rails", max(1, count // ranks)), Change(said, "nic.rate", BIT_RATE.spell(int(each)))]
