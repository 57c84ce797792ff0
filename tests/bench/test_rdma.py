"""`mooncache bench rdma` where there is no device, and its view of perftest. On a device: tests/rdma/test_bench.py."""

import itertools
import os
import sys

import pytest
from typer.testing import CliRunner

from mooncache import cli
from mooncache.bench import rdma
from mooncache.bench.harness import perftest
from mooncache.bench.harness.process import ProcessError
from mooncache.providers.rdma.ports import Choice, Gid, Port

RULE = "-" * 87

WRITE = f"""\
{RULE}
Warning: Large message requested and CQ moderation enabled
Warning: It can lead to inaccurate results
{RULE}
                    RDMA_Write BW Test
 Dual-port       : OFF\t\tDevice         : rxe0
 TX depth        : 128
 CQ Moderation   : 16
 Mtu             : 4096[B]
{RULE}
 local address: LID 0000 QPN 0x0011 PSN 0x4c3cca RKey 0x000363 VAddr 0x0055cee12da000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:127:00:00:01
{RULE}
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
{{}}
{RULE}
"""
SLOW = WRITE.format(" 65536      500              41.46              16.84  \t\t   0.000269")
FAST = WRITE.replace("rxe0", "mlx5_0").format(" 4096       20000            0.00               13642.55\t\t   3.492493")
TINY = WRITE.format(" 8          5000             0.05               0.05  \t\t   0.006721")
BROKEN_CLOCK = WRITE.format(" 65536      500              0.00               0.00  \t\t   0.000000")
GBITS = FAST.replace("MB/sec", "Gb/sec").replace("13642.55", "  114.44")

LATENCY = f"""\
{RULE}
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]\x20
 64      1000          10.83          14226.88      12.57    \t       98.69       \t869.89 \t\t4329.77 \t\t14226.88
{RULE}
"""  # noqa: E501


# ------------------------------------------------------------------------------ what perftest prints
@pytest.mark.parametrize(
    ("text", "size", "bytes_per_s", "messages_per_s"),
    [
        (SLOW, 65536, 16.84 * 2**20, 16.84 * 2**20 / 65536),
        (FAST, 4096, 13642.55 * 2**20, 3.492493e6),
        (TINY, 8, 8 * 6721, 6721),
        (GBITS, 4096, 114.44e9 / 8, 3.492493e6),
    ],
)
def test_bandwidth_is_read_from_the_column_with_more_digits(text, size, bytes_per_s, messages_per_s):
    found = perftest.read_bandwidth(text)
    assert found.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-3)
    assert found.messages_per_s == pytest.approx(messages_per_s, rel=1e-3)
    assert found.bytes_per_s == pytest.approx(found.messages_per_s * size)


def test_latency_is_the_typical_one_and_the_99th_percentile():
    assert perftest.read_latency(LATENCY) == pytest.approx((12.57e-6, 4329.77e-6))


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        (perftest.read_bandwidth, "", "it said last: nothing"),
        (perftest.read_bandwidth, "Couldn't connect to 127.0.0.1:18515\n----\n", "said last: Couldn't connect"),
        (perftest.read_bandwidth, BROKEN_CLOCK, "to be more than 0, got 0.00"),
        (perftest.read_bandwidth, LATENCY, "expected perftest to print BW average"),
        (perftest.read_bandwidth, SLOW.replace("MB/sec", "furlongs"), "in MB/sec or MiB/sec or Gb/sec, got furlongs"),
        (perftest.read_latency, SLOW, "expected perftest to print t_typical[usec]"),
        (perftest.read_latency, LATENCY.replace("12.57", "inf"), "t_typical[usec] of perftest to be more than 0"),
    ],
)
def test_what_is_no_figure_is_not_taken_for_one(read, text, says):
    with pytest.raises(perftest.NoFigures) as refused:
        read(text)
    assert says in str(refused.value)


# ------------------------------------------------------------------------------ its two processes
PROGRAM = """
import os, signal, socket, sys
port = int(sys.argv[sys.argv.index("-p") + 1])
if sys.argv[-1] == "127.0.0.1":
    with socket.create_connection(("127.0.0.1", port)) as server:
        print("server", server.recv(100).decode())
    sys.exit({status})
with socket.create_server(("", port)) as listener:
    listener.accept()[0].sendall(str(os.getpid()).encode())
    signal.pause()
"""


def test_the_client_starts_when_the_server_listens_and_no_process_stays():
    said = perftest.run([sys.executable, "-c", PROGRAM.format(status=0)])
    assert not os.path.exists(f"/proc/{int(said.split()[1])}")


def test_a_client_or_a_server_that_fails_is_quoted():
    with pytest.raises(ProcessError, match=r"(?s)client .* gave 3: server \d+"):
        perftest.run([sys.executable, "-c", PROGRAM.format(status=3)])
    with pytest.raises(ProcessError, match=r"server .* gave 1: no such device"):
        perftest.run([sys.executable, "-c", "raise SystemExit('no such device')"])


def test_a_server_that_never_listens_is_ended(monkeypatch):
    monkeypatch.setattr(perftest, "PATIENCE_S", 0.1)
    with pytest.raises(ProcessError, match=r"server .* did not finish within 0 s"):
        perftest.run([sys.executable, "-c", "import signal; signal.pause()"])


def test_a_listening_port_is_looked_up_not_tried(tmp_path):
    head = "  sl  local_address rem_address   st\n"
    (tmp_path / "tcp").write_text(head + "   0: 0100007F:4853 0100007F:9C40 01\n   1: 00000000:0016 00000000:0000 0A\n")
    (tmp_path / "tcp6").write_text(head + f"   0: {'0' * 32}:4854 {'0' * 32}:0000 0A\n")
    assert [perftest.listens(port, str(tmp_path)) for port in (0x4853, 0x4854, 22, 23)] == [False, True, True, False]
    assert not perftest.listens(22, str(tmp_path / "none"))


# ------------------------------------------------------------------------------ the bench
PORT = Port("mlx5_0", 1, "Ethernet", "ACTIVE", 4096, 400.0, 0, "eth0", "1", ())
ROCE = Choice(PORT, Gid(3, "0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2", "eth0", "ipv4"))
PLAN = rdma.Plan(iterations=500, repeats=2, depth=128, signal=16)
FOUND = {"mtu": 4096, "rd_atomic": 16}


class Ours:
    """Stands in for the two processes, which need a device."""

    plan = PLAN

    def stream(self, op, block, seed):
        return 0.5, {**PLAN.counts, "polls": 7}

    def each(self, block, seed):
        return [1e-5] * PLAN.operations


def rows():
    theirs, seeds = rdma.Theirs(ROCE, PLAN, FOUND), itertools.count()
    return [rdma.measure(Ours(), theirs, test, 4096, seeds) for test in rdma.TESTS]


def test_without_perftest_its_figures_are_null_and_the_table_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    found = rows()
    for row in found:
        assert row["ratio"] is None
        assert {value for name, value in row.items() if name.startswith("reference_seconds")} <= {None}
        assert row.get("reference_messages_per_s") is row.get("reference_gigabytes_per_s") is None
        assert row["reference_repeats"] == 0
        assert "apt-get install perftest" in row["reference_error"]
    report = {"results": [row | {"device": "mlx5_0:1"} for row in found], "ports": [], "depth": 128, "signal": 16}
    rdma.show(report)
    assert capsys.readouterr().out.count("apt-get") == 2
    assert perftest.version() is None


def test_both_sides_are_asked_for_the_same(monkeypatch):
    commands = []

    def run(command):
        commands.append(" ".join(command))
        return LATENCY if "lat" in command[0] else FAST

    monkeypatch.setattr(perftest, "installed", lambda *_: True)
    monkeypatch.setattr(perftest, "run", run)
    write, read, latency = rows()
    same = "-F -d mlx5_0 -i 1 -s 4096 -m 4096 -u 18"
    assert commands == [
        *[f"ib_write_bw {same} -n 500 -x 3 -t 128 -Q 16 -N"] * 2,
        *[f"ib_read_bw {same} -n 500 -x 3 -t 128 -Q 16 -N -o 16"] * 2,
        *[f"ib_write_lat {same} -n 50 -x 3"] * 2,
    ]
    assert write["ratio"] == read["ratio"] == pytest.approx(1000 / 3.492493e6, abs=1e-3)
    assert latency["ratio"] == pytest.approx(1e-5 / (2 * 12.57e-6), abs=1e-3)
    assert latency["reference_seconds_p99"] == pytest.approx(2 * 4329.77e-6)


def test_a_figure_that_cannot_be_true_is_asked_for_again(monkeypatch):
    said = [BROKEN_CLOCK, FAST, *[BROKEN_CLOCK] * rdma.ATTEMPTS]
    monkeypatch.setattr(perftest, "installed", lambda *_: True)
    monkeypatch.setattr(perftest, "run", lambda command: said.pop(0))
    theirs = rdma.Theirs(ROCE, PLAN, FOUND)
    assert theirs.stream("write", 4096) is not None
    assert theirs.why == {}
    assert theirs.stream("write", 4096) is None
    assert "more than 0" in theirs.why["write"]
    assert said == []
    assert theirs.stream("write", 4096) is None  # given up


def test_counts_expected_of_a_stream():
    assert PLAN.counts["doorbells"] == 8  # 7 chains of 64, and 52
    assert PLAN.counts["completions"] == 32  # 500 / 16, rounded up
    odd = rdma.Plan(iterations=129, repeats=1, depth=128, signal=60)
    assert (odd.counts["doorbells"], odd.counts["completions"]) == (3, 5)  # a chain ends in a completion


def bench(*arguments, status):
    result = CliRunner().invoke(cli.app, ["bench", "rdma", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--test", "swap"), "Invalid value for '--test'"),
        (("--bytes", "65KiB"), "expected --bytes of at most 64KiB"),
        (("--bytes", "none"), "expected a size"),
        (("--iterations", 4), "Invalid value for '--iterations'"),
        (("--repeat", 0), "Invalid value for '--repeat'"),
        (("--depth", 0), "Invalid value for '--depth'"),
        (("--signal", 65), "expected --signal in 1 .. 64, got 65"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, says):
    assert says in bench(*options, status=2).stderr


@pytest.mark.skipif(os.path.exists("/sys/class/infiniband"), reason="this machine has RDMA devices")
def test_without_a_device_it_says_how_to_get_one():
    assert "expected an RDMA device" in bench(status=2).stderr
