"""File descriptors: each connection to a peer is one."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from mooncache import limits
from mooncache.cli.checks.base import Finding, check

WORKERS = 4
LANES = 4 * limits.PEERS  # to each peer and from it, and as many again while peers restart
ENOUGH = WORKERS * LANES
ASK = 65_536  # what the cures set: all 16 workers, and the descriptors of the serving process itself


@check("open files")
def descriptors(soft: int, hard: int) -> Iterator[Finding]:
    """Compare the limits of open files (RLIMIT_NOFILE) with the connections of a fleet."""
    unlimited = soft == resource.RLIM_INFINITY
    text = "unlimited" if unlimited else f"{soft:,} at once"
    if unlimited or soft >= ENOUGH:
        yield Finding("open files", "ok", text)
        return
    reason = (
        f"a worker has up to {LANES:,} connections ({limits.PEERS} peers of as many workers, one each way, and as many "
        f"again while peers restart), so {WORKERS} workers need {ENOUGH:,}"
    )
    most = ASK if hard == resource.RLIM_INFINITY else min(hard, ASK)
    shell = f"shell: ulimit -n {most}"
    if most < ENOUGH:
        shell = f"shell: ulimit -Hn {ASK}; ulimit -n {ASK}    (as root; the hard limit is {hard})"
    cures = (shell, f"systemd: LimitNOFILE={ASK}", f"docker: docker run --ulimit nofile={ASK}:{ASK} ...")
    yield Finding("open files", "warning", f"{text}: {reason}", "\n".join(cures))
