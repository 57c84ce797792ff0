import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from mooncache import Engine, cli
from mooncache.errors import DiscoveryError
from tests.helpers import LIMIT, environment, random_bytes

COMMAND = [sys.executable, "-c", "from mooncache.cli import main; main()", "serve", "--listen", "127.0.0.1:0"]


@pytest.fixture
def serve():
    """Starts `mooncache serve` with options; ends what is still running."""
    running = []

    def start(*options, **more):
        process = subprocess.Popen(
            [*COMMAND, "--bytes", "1MiB", *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment(**more),
        )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def ended(process, number):
    """Send a signal; exit status, and what came on stdout and stderr meanwhile."""
    process.send_signal(number)
    return (*process.communicate(timeout=LIMIT), process.returncode)


@pytest.mark.parametrize(("provider", "stop"), [("tcp", signal.SIGTERM), ("auto", signal.SIGINT)])
def test_peers_write_and_read_until_a_signal_ends_it(serve, provider, stop):
    process = serve("--provider", provider, "--name", "scratch", "--json")
    ready = json.loads(process.stdout.readline())
    assert set(ready) == {"name", "address", "region", "pid"}
    assert (ready["name"], ready["pid"], ready["region"]["length"]) == ("scratch", process.pid, 1 << 20)
    sent, back = random_bytes(1 << 20), np.zeros(1 << 20, np.uint8)
    with Engine(provider=provider, slices=4096) as engine:
        source, target = engine.register(sent), engine.register(back)
        peer = engine.connect(ready["address"])
        (scratch,) = peer.regions
        assert (scratch.address, scratch.length) == (ready["region"]["address"], 1 << 20)
        engine.write(peer, source.address, scratch.address, 1 << 20).wait(LIMIT).close()
        engine.read(peer, scratch.address, target.address, 1 << 20).wait(LIMIT).close()
    np.testing.assert_array_equal(back, sent)
    assert ended(process, stop) == ("", "", 0)


def test_for_people_it_says_how_to_connect_and_peers_need_the_secret(serve, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a long enough secret\n")
    process = serve("--secret-file", secret)
    first = process.stdout.readline()
    address = re.search(r"127\.0\.0\.1:\d+", first)[0]
    assert f'engine.connect("{address}")' in process.stdout.readline()
    with Engine(provider="auto", slices=256, secret="a long enough secret") as engine:
        assert engine.connect(address).regions[0].length == 1 << 20
    with Engine(provider="auto", slices=256, secret="something else") as engine, pytest.raises(DiscoveryError):
        engine.connect(address)
    out, _, status = ended(process, signal.SIGTERM)
    assert out.endswith("Closed.\n")
    assert status == 0


def test_the_secret_may_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(cli.serve.__globals__["SECRET"], "from outside")
    assert cli.serve.__globals__["secret_of"](None) == "from outside"
    (tmp_path / "secret").write_text("from a file\n")
    assert cli.serve.__globals__["secret_of"](tmp_path / "secret") == "from a file"


def test_a_wire_that_no_other_process_can_use_is_refused():
    refused = CliRunner().invoke(cli.app, ["serve", "--provider", "loopback"])
    assert refused.exit_code == 2, refused.output
    assert "Invalid value for '--provider'" in refused.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bytes", "some"), "expected a size of at least one byte"),
        (("--secret-file", "/no/such/file"), "expected a file of text with the secret"),
        (("--secret-file", "/dev/null"), "which is empty"),
        (("--listen", "0.0.0.0:0"), "secret"),
        (("--listen", "nonsense"), "nonsense"),
        (("--discovery", "carrier://pigeon"), "carrier"),
        (("--workers", "0"), "workers"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(monkeypatch, options, says):
    monkeypatch.delenv(cli.serve.__globals__["SECRET"], raising=False)
    refused = CliRunner().invoke(cli.app, ["serve", *options])
    assert refused.exit_code == 2, refused.output
    assert refused.stdout == ""
    assert says in refused.stderr
    assert refused.stderr.count("\n") == 1
