"""A deployment in a few words on the command line, as changes to a scenario."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import NamedTuple

from mooncache.errors import UsageError
from sim.units import BIT_RATE

BRIEF = "model_8k"
"""The scenario that these words change where no other is named."""


class Brief(NamedTuple):
    """What was said of a deployment; None where nothing was."""

    model: str | None = None
    tp: int | None = None
    prompt: str | None = None
    page: int | None = None

    def overrides(self, alone: bool) -> list[str]:
        """As `key=value`. `alone`: no scenario is named, so that a model has to be."""
        if alone and self.model is None:
            raise UsageError(
                "expected a scenario (such as tp4_layerwise, or a file) or --model, came neither; see compare --help"
            )
        said = {
            "workload.model": self.model,
            "workload.ranks": self.tp,
            "workload.tokens": self.prompt,
            "workload.page": self.page,
            "name": re.sub(r"[/\\]", "_", self.model) if alone and self.model else None,
        }
        return [f"{key}={json.dumps(value)}" for key, value in said.items() if value is not None]


def shared_out(nics: str, ranks: int) -> list[str]:
    """A machine's NICs ("4x400Gbps") as what each rank has, several of its own or a share of one, as `key=value`.

    Raises: UsageError for NICs that cannot be shared out evenly.
    """
    match = re.fullmatch(r"(?:([1-9][0-9]{0,3}) ?[x×] ?)?(.+)", nics.strip())
    count, rate = int(match[1] or 1) if match else 1, BIT_RATE.parse(match[2] if match else nics)
    if count % ranks and ranks % count:
        raise UsageError(f"--nics: expected NICs that share out evenly over {ranks} ranks, came {count}; see nic.rails")
    each = Fraction(rate * min(count, ranks), ranks)
    if each.denominator != 1:
        raise UsageError(f"--nics: expected a rate that {ranks // count} ranks can share, came {nics!r}")
    return [f"nic.rails={max(1, count // ranks)}", f"nic.rate={BIT_RATE.spell(int(each))}"]
