"""The command line: `python -m tests.testbed test -k name`, `... two-hosts -x`, `... run -- ibv_devinfo -v`."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from types import FrameType

from tests.testbed import CACHE, BedError, interpreter, kernel, packages, pair, single

FAILED = 70  # the bed failed, and nothing is known of the tests; pytest uses 0 to 5
PYTEST = os.path.join(os.path.dirname(sys.executable), "pytest")


def main() -> int:
    """Run one bed; the exit status is that of what ran in it."""
    parser = argparse.ArgumentParser(prog="python -m tests.testbed", description=sys.modules["tests.testbed"].__doc__)
    parser.add_argument("--limit", type=int, default=900, help="seconds after which guests are ended (default 900)")
    parser.add_argument("what", choices=["test", "two-hosts", "run"])
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments for pytest, or the command of `run`")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        return _run(options.what, [word for word in options.rest[:1] if word != "--"] + options.rest[1:], options.limit)
    except BedError as error:
        print(f"test bed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(what: str, rest: list[str], limit: int) -> int:
    suite = [PYTEST, *_unless_named("tests/rdma", rest), "--ignore=tests/rdma/two_hosts", *rest]
    if what == "test" and (device := os.environ.get("MOONCACHE_TEST_RDMA_DEVICE")):
        single.run_here(suite, device)
    if what == "run" and not rest:
        raise BedError("run what? python -m tests.testbed run -- COMMAND")
    image = _prepare()
    if what == "two-hosts":
        return pair.run(image, [PYTEST, *_unless_named("tests/rdma/two_hosts", rest), *rest], limit)
    return single.run(image, rest if what == "run" else suite, limit)


def _unless_named(folder: str, arguments: list[str]) -> list[str]:
    """The folder to run, if the arguments name no tests themselves."""
    return [] if any(word.startswith(folder) for word in arguments) else [folder]


def _prepare() -> kernel.Kernel:
    """Everything that has to be there before a guest boots; one process at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packages.install()
        image = kernel.fetch()
        interpreter.prewarm()
    return image


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that guests are ended on the way out


if __name__ == "__main__":
    sys.exit(main())
