"""The lengths that this CPU copies faster by banks than by lines: see `kernels/copying.py`.

What `mooncache bench copy --save` has measured on such a CPU goes before what is known of its kind. Others copy by
lines, which is nowhere slow.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mooncache.kernels.cache import base_directory
from mooncache.limits import KiB

log = logging.getLogger("mooncache")

FILE = "copy_ways.json"  # {CPU: [banks_from, banks_below]}


class Banks(NamedTuple):
    """Lengths that are copied by banks: from the first on, below the second, bytes."""

    first: int
    below: int


NONE = Banks(1 << 62, 0)
ZEN_4 = Banks(16 * KiB, 32 * KiB)
"""`mooncache bench copy`: 16 KiB in 0.75 to 0.78 of the time by lines. Longer ones gain little, 0.85 to 0.95."""

KNOWN = {("AuthenticAMD", 25, model): ZEN_4 for model in (*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0))}
"""The shipped lengths by vendor, family and model, of which AMD's Zen 4 has several."""


def cpu() -> tuple[str, int, int]:
    """Return vendor, family and model of this machine's first CPU, as /proc/cpuinfo has them; ("", 0, 0) elsewhere."""
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return fields["vendor_id"], int(fields["cpu family"]), int(fields["model"])
    return "", 0, 0


@cache
def banks() -> Banks:
    """Return the lengths that engines of this process copy by banks."""
    return saved().get(name(), KNOWN.get(cpu(), NONE))


def name() -> str:
    """Return what a measurement on this CPU is kept under."""
    return " ".join(map(str, cpu()))


def saved() -> dict[str, Banks]:
    """Return what was measured, by CPU. A file that cannot be read counts as none, and the log says so."""
    path = base_directory() / FILE
    try:
        return {cpu: Banks(*map(int, lengths)) for cpu, lengths in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning(
            "%s is not used (%s: %s); `mooncache bench copy --save` makes it anew", path, type(error).__name__, error
        )
        return {}


def save(lengths: Banks) -> Path:
    """Keep what was measured on this CPU for engines of this user that are opened from now on; return the file.

    Raises OSError.
    """
    path = base_directory() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(".new")
    made.write_text(json.dumps({**saved(), name(): list(lengths)}, indent=2) + "\n")
    made.replace(path)
    return path
