import itertools
import json
import os
import socket
import sys
import threading
from contextlib import ExitStack

import numpy as np
import pytest
from typer.testing import CliRunner

from mooncache import cli, sizes
from mooncache.bench import transfer
from mooncache.bench.ends import rank
from mooncache.bench.harness import against, blocks, sockets, trial, wires
from mooncache.bench.harness.measure import FingerprintError
from mooncache.bench.harness.process import Process, ProcessError
from mooncache.errors import UsageError
from mooncache.kernels.arrays import address_of

ROW = {
    "provider", "transport", "op", "ranks", "workers", "slices", "block_bytes", "layers", "seconds_p50", "seconds_min",
    "seconds_max", "slices_per_s", "gigabytes_per_s", "reference", "reference_seconds_p50", "ratio",
    "first_seconds", "first_ratio", "repeats",
    "verified_bytes",
}  # fmt: skip


def bench(*arguments, status=0):
    """Run `mooncache bench transfer ...`; returns its result, and its report if it printed one."""
    result = CliRunner().invoke(cli.app, ["bench", "transfer", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result, json.loads(result.stdout) if "--json" in arguments and result.stdout else None


# ------------------------------------------------------------------------------ the command
@pytest.mark.parametrize("provider", ["loopback", "tcp", "shm"])
def test_every_combination_is_measured_and_verified(provider, capsys):
    options = ("--provider", provider, "--op", "write", "--op", "read", "--slices", 1, "--slices", 300)
    _, report = bench(*options, "--block", 13, "--block", "4KiB", "--repeat", 2, "--json")
    rows = report["results"]
    shapes = [(row["op"], row["slices"], row["block_bytes"]) for row in rows]
    assert shapes == list(itertools.product(["write", "read"], [1, 300], [13, 4096]))
    for row in rows:
        assert set(row) == ROW
        assert row["provider"] == row["transport"] == provider
        assert row["reference"] == ("plain socket" if provider == "tcp" else "plain copy")
        assert row["seconds_max"] >= row["seconds_p50"] >= row["seconds_min"] > 0
        assert row["ratio"] > 0
        assert row["verified_bytes"] == 3 * row["slices"] * row["block_bytes"]
    assert report["violations"] == []
    assert report["provenance"]["cores"] >= 1
    transfer.show(report)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"times as long as a plain {'socket' if provider == 'tcp' else 'copy'}. Every byte" in shown


def test_ranks_are_pairs_of_processes_and_auto_says_what_it_chose():
    _, report = bench("--provider", "auto", "--ranks", 2, "--slices", 300, "--block", 512, "--repeat", 1, "--json")
    (row,) = report["results"]
    assert (row["ranks"], row["provider"], row["transport"]) == (2, "auto", "shm")
    assert row["verified_bytes"] == 2 * 2 * 300 * 512


def test_what_grows_over_layers_is_a_violation(monkeypatch, capsys):
    monkeypatch.setattr(transfer, "GROWTH_MIB", -1.0)
    options = ("--provider", "tcp", "--slices", 300, "--block", 64, "--layers", 8, "--repeat", 1)
    _, report = bench(*options, "--json", status=1)
    (row,) = report["results"]
    assert set(row) == ROW | {"growth"}
    assert set(row["growth"]) == set(trial.GROWING)
    assert row["growth"]["initiator_fds"] == row["growth"]["target_fds"] == 0
    assert len(report["violations"]) == 2
    transfer.show(report)
    assert "violated: tcp write, 300 x 64B: the target grew by" in capsys.readouterr().out


def test_descriptors_may_not_grow_at_all():
    row = {"provider": "tcp", "op": "read", "slices": 3, "block_bytes": 8, "growth": dict.fromkeys(trial.GROWING, 0)}
    assert transfer.violations(row) == []
    row["growth"]["target_fds"] = 1
    (violation,) = transfer.violations(row)
    assert "the target grew by 1 descriptors" in violation


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--provider", "pigeon"), "Invalid value for '--provider'"),
        (("--op", "swap"), "Invalid value for '--op'"),
        (("--block", "much"), "expected a size of at least one byte"),
        (("--block", "0"), "expected a size of at least one byte"),
        (("--slices", "0"), "Invalid value for '--slices'"),
        (("--ranks", "-1"), "Invalid value for '--ranks'"),
        (("--layers", "0"), "Invalid value for '--layers'"),
        (("--repeat", "0"), "Invalid value for '--repeat'"),
        (("--against", "pigeon"), "Invalid value for '--against'"),
        (("--slices", "1000000", "--block", "1GiB"), "GiB of memory"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, says):
    refused, _ = bench(*options, status=2)
    assert refused.stdout == ""
    assert says in refused.stderr


def test_the_standard_shapes_are_used_only_if_nothing_is_asked_for():
    assert transfer.shapes([], [], [], [], []) == list(transfer.STANDARD)
    asked = transfer.shapes(["read"], [], [], [7, 7], ["1KiB"])
    assert asked == [transfer.Shape("read", 1, 1, 7, "1KiB")]


# ------------------------------------------------------------------------------ the check can fail
def test_blocks_of_another_sample_are_noticed(monkeypatch):
    tell = Process.tell

    def falsified(self, **command):
        tell(self, **(command | {"seed": 0} if command["do"] == "fill" else command))

    monkeypatch.setattr(Process, "tell", falsified)
    refused, _ = bench("--provider", "loopback", "--slices", 300, "--block", 512, "--json", status=2)
    assert refused.stdout == ""
    assert "expected 300 blocks of 512B to arrive unchanged by loopback, 300 did not" in refused.stderr


@pytest.mark.parametrize("op", ["write", "read"])
def test_a_single_wrong_byte_is_noticed(op):
    case = wires.Case("loopback", "loopback", op, 1, 1, slices=300, block=77, layers=1)
    target = rank.Side("target", case, "plain copy")
    initiator = rank.Side("initiator", case, "plain copy", target.found())
    sender, receiver = (initiator, target) if op == "write" else (target, initiator)
    sender.fill(5)
    initiator.transfer(0)
    assert receiver.count_wrong(5) == 0
    for byte in (0, 8, 76):
        place = receiver.offsets[123] + byte
        receiver.buffer[place] ^= 1
        assert receiver.count_wrong(5) == 1
        receiver.buffer[place] ^= 1
    assert receiver.count_wrong(6) == 300
    initiator.check()
    initiator.moved_blocks += 1
    with pytest.raises(FingerprintError, match="slices_filled"):
        initiator.check()
    for side in (initiator, target):
        side.close()


def test_a_reference_that_leaves_a_block_out_is_noticed():
    case = wires.Case("loopback", "loopback", "write", 1, 1, slices=300, block=64, layers=1)
    target = rank.Side("target", case, "plain copy")
    initiator = rank.Side("initiator", case, "plain copy", target.found())
    initiator.fill(5)
    initiator.reference.copying.parts = [(to[:-1], from_[:-1]) for to, from_ in initiator.reference.copying.parts]
    initiator.refer(0)
    assert target.count_wrong(5) == 1
    for side in (initiator, target):
        side.close()


# ------------------------------------------------------------------------------ what it is made of
def expected_block(seed, block, length):
    """The twin of `blocks.fill`, in Python's own integers."""
    words = [
        (seed * blocks.SEEDS + block * blocks.BLOCKS + word * blocks.STEPS) % 2**64 for word in range(length // 8 + 1)
    ]
    return b"".join(word.to_bytes(8, "little") for word in words)[:length]


@pytest.mark.parametrize("length", [1, 7, 8, 13, 64, 4099])
def test_blocks_hold_what_belongs_there_and_gaps_stay(length):
    places = blocks.places(20, length)[1]
    buffer = np.zeros(blocks.span(20, length), np.uint8)
    addresses = address_of(buffer) + places
    assert blocks.fill(address_of(addresses), 20, length, 2**40 + 3) == 0
    expected = np.zeros_like(buffer)
    for block, at in enumerate(places):
        expected[at : at + length] = list(expected_block(2**40 + 3, block, length))
    np.testing.assert_array_equal(buffer, expected)
    assert blocks.count_wrong(address_of(addresses), 20, length, 2**40 + 3) == 0
    if length > 1:  # a single byte may be the same by chance
        assert blocks.count_wrong(address_of(addresses), 20, length, 2**40 + 4) == 20


def test_both_sides_know_where_blocks_lie_and_none_touch():
    for places in blocks.places(1000, 48):
        assert (np.diff(np.sort(places)) >= 96).all()
        assert places.max() + 48 <= blocks.span(1000, 48)
    np.testing.assert_array_equal(blocks.places(1000, 48), blocks.places(1000, 48))
    assert (blocks.places(1000, 48)[0] != blocks.places(1000, 48)[1]).any()


@pytest.mark.parametrize("sends", [True, False])
def test_plain_sockets_move_blocks_that_go_over_in_parts(sends):
    """A timeout makes Python's sockets non-blocking, so that calls end in the middle of a block."""
    length, n = 3001, 2500
    buffers = [np.zeros(blocks.span(n, length), np.uint8) for _ in range(2)]
    sides = list(zip(buffers, blocks.places(n, length), strict=True))
    views = [sockets.Blocks(buffer, offsets, length) for buffer, offsets in sides]
    ends = [address_of(buffer) + offsets for buffer, offsets in sides]
    source, target = ends if sends else ends[::-1]
    blocks.fill(address_of(source), n, length, 1)
    with sockets.listening() as listener, sockets.connected(listener.getsockname()[1]) as here:
        there = listener.accept()[0]
        for plain in (here, there):
            plain.settimeout(60)
        with there:
            other = threading.Thread(target=views[1].exchange, args=(there, not sends, False))
            other.start()
            views[0].exchange(here, sends, True)
            other.join(60)
    assert blocks.count_wrong(address_of(target), n, length, 1) == 0


def test_a_plain_socket_whose_other_side_is_gone_says_so():
    here, there = socket.socketpair()
    there.close()
    with here, pytest.raises(ConnectionError, match="other side is gone"):
        sockets.take(here)


@pytest.mark.parametrize(("text", "size"), [("8", 8), ("4KiB", 4096), ("1.5MiB", 3 << 19), ("10MB", 10**7)])
def test_sizes(text, size):
    assert sizes.size_of(text) == size
    assert sizes.size_of(sizes.spell(size)) == size


@pytest.mark.parametrize("text", ["", "many", "-1", "0", "0.1", "1 XiB", "9e99"])
def test_what_is_not_a_size(text):
    with pytest.raises(UsageError, match="expected a size"):
        sizes.size_of(text)


def test_slices_of_long_blocks():
    assert [wires.slices_of(n << 10) for n in (1, 64, 80, 81, 128, 144, 1 << 20)] == [1, 1, 1, 2, 2, 2, 16384]


# ------------------------------------------------------------------------------ processes
def test_a_process_that_fails_says_why():
    with Process("mooncache.bench.ends.rank") as process:
        with pytest.raises(ProcessError, match="KeyError: 'nothing'"):
            process.ask(do="nothing")
        with pytest.raises(ProcessError, match="did not answer within 0 s"):
            process.answer(0)


def test_a_process_that_dies_is_quoted():
    with Process("no_such_module") as process, pytest.raises(ProcessError, match="No module named 'no_such_module'"):
        process.answer()


# ------------------------------------------------------------------------------ other packages
@pytest.fixture
def package(tmp_path, monkeypatch):
    """Says which module stands for `mooncake.engine`, "installed" in an environment that is this one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MOONCACHE_CACHE_DIR", os.path.expanduser("~/.cache/mooncache"))
    against.prepare.cache_clear()

    def stand_in(module):
        entry = against.PACKAGES["mooncake"]._replace(module=module)
        monkeypatch.setitem(against.PACKAGES, "mooncake", entry)
        home = against.folder("mooncake")
        (home / "bin").mkdir(parents=True)
        (home / "bin/python").symlink_to(sys.executable)
        (home / "installed").touch()

    yield stand_in
    against.prepare.cache_clear()


def test_a_package_that_cannot_be_imported_is_one_entry_and_the_bench_goes_on(package, capsys):
    package("no_such_engine")
    options = ("--provider", "loopback", "--slices", 1, "--slices", 20, "--block", 64, "--repeat", 1)
    _, report = bench(*options, "--against", "mooncake", "--json")
    *measured, missing = report["results"]
    assert [row["slices"] for row in measured] == [1, 20]
    assert set(missing) == {"against", "error"}
    assert missing["error"].startswith("cannot import no_such_engine: ModuleNotFoundError")
    transfer.show(report)
    assert "mooncake was not measured: cannot import" in " ".join(capsys.readouterr().out.split())


def test_a_package_that_fails_a_case_is_an_entry_of_that_case(package):
    package("json")  # can be imported; but the process then looks for mooncake.engine itself
    options = ("--provider", "loopback", "--slices", 20, "--block", 64, "--repeat", 1)
    _, report = bench(*options, "--against", "mooncake", "--json")
    _, failed = report["results"]
    assert failed["error"].startswith("ModuleNotFoundError")
    assert (failed["slices"], failed["block_bytes"], failed["transport"]) == (20, 64, "tcp")


def test_processes_of_a_run_are_used_again():
    case = wires.Case("loopback", "loopback", "write", 1, 1, slices=1, block=8, layers=1)
    with ExitStack() as stack:
        crew = trial.Crew(stack)
        assert crew.pair(case, 0) is crew.pair(case, 0)
        assert crew.pair(case, 0).initiator is crew.pair(case, 0).target
