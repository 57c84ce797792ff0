"""Which NIC reaches which, and with what weight."""

import os

import pytest

from mooncache.errors import TransportError
from mooncache.kernels.records.queue import WEIGHT_ONE
from mooncache.providers.rdma.gids import common, parse, text_of
from mooncache.providers.rdma.paths import NEAR, End, PathOf, distance, pair, weights


def ipv4(a, b, c, d, **changes):
    return End(parse(f"::ffff:{a}.{b}.{c}.{d}"), 0, 1024, 16, 100.0)._replace(**changes)


def ipv6(last):
    return End(parse(f"fe80::{last:x}"), 0, 1024, 16, 100.0)


def infiniband(lid):
    return End(parse(f"fe80::{lid:x}"), lid, 4096, 16, 200.0)


def test_rails_find_each_other_by_their_subnet_whatever_their_order():
    here = [ipv4(10, 0, 1, 5), ipv4(10, 0, 2, 5)]
    there = [ipv4(10, 0, 2, 9), ipv4(10, 0, 1, 9)]
    assert pair(here, there, "p") == [PathOf(0, 1), PathOf(1, 0)]


def test_nics_of_one_subnet_take_turns():
    assert pair([infiniband(1), infiniband(1)], [infiniband(1), infiniband(1)], "p") == [PathOf(0, 0), PathOf(1, 1)]


def test_a_nic_without_a_counterpart_is_left_out():
    assert pair([ipv4(10, 0, 1, 5), ipv6(1)], [ipv4(10, 0, 1, 6)], "p") == [PathOf(0, 0)]


def test_a_path_that_is_down_at_one_end_is_one_as_long_as_another_is_up():
    here, there = [ipv4(10, 0, 1, 5), ipv4(10, 0, 2, 5)], [ipv4(10, 0, 1, 9), ipv4(10, 0, 2, 9)]
    there[0] = there[0]._replace(up=False)
    assert pair(here, there, "p") == [PathOf(0, 0), PathOf(1, 1)]
    here[1] = here[1]._replace(up=False)
    with pytest.raises(TransportError, match=f"down: {text_of(here[1].gid)}, {text_of(there[0].gid)}"):
        pair(here, there, "p")


@pytest.mark.parametrize(
    ("here", "there"), [([ipv4(10, 0, 1, 5)], [ipv6(1)]), ([infiniband(1)], [ipv4(1, 2, 3, 4)]), ([ipv6(1)], [])]
)
def test_networks_that_cannot_meet_are_an_error_that_names_both(here, there):
    with pytest.raises(TransportError, match=f"(?s)peer 'p'.*{text_of(here[0].gid)}.*family"):
        pair(here, there, "p")


def test_common_counts_leading_bits():
    assert common(ipv4(10, 0, 1, 5).gid, ipv4(10, 0, 1, 5).gid) == 128
    assert common(ipv4(10, 0, 1, 5).gid, ipv4(10, 0, 1, 4).gid) == 127
    assert common(parse("8000::"), parse("::")) == 0


def nodes(tmp_path, distances, cores):
    for node, (row, cpus) in enumerate(zip(distances, cores, strict=True)):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / "distance").write_text(" ".join(map(str, row)) + "\n")
        (folder / "cpulist").write_text(cpus + "\n")
    return str(tmp_path)


def test_a_far_nic_gets_less_of_the_load(tmp_path):
    own = min(os.sched_getaffinity(0))
    root = nodes(tmp_path, [[10, 20], [20, 10]], [f"{own}-{own}", "4000-4007"])
    assert distance(0, root) == NEAR
    assert distance(1, root) == 20
    assert weights([100, 100], [0, 1], root) == [WEIGHT_ONE, WEIGHT_ONE // 2]
    assert weights([100, 400], [0, 1], root) == [WEIGHT_ONE // 2, WEIGHT_ONE]


@pytest.mark.parametrize("node", [-1, 7])
def test_an_unknown_node_is_near(tmp_path, node):
    assert distance(node, nodes(tmp_path, [[10]], ["0"])) == NEAR


def test_paths_without_a_known_rate_share_evenly(tmp_path):
    assert weights([0, 0], [-1, -1], str(tmp_path)) == [WEIGHT_ONE, WEIGHT_ONE]
