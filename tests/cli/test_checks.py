"""Each check of `mooncache doctor` by itself, on made-up machines and on this one."""

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

from mooncache.cli import checks
from mooncache.cli.checks.base import Finding
from mooncache.cli.warm import WarmError, compile_by
from mooncache.kernels import jit
from mooncache.kernels.cache import Place
from tests.cli.machines import (
    UNLIMITED,
    levels,
    only,
    unreadable,
    write,
)
from tests.helpers import environment
from tests.warm import warm


# ------------------------------------------------------------------ system, Python, kernels
def test_the_system_and_whether_it_is_a_container(machine):
    assert only(checks.system.system(machine, "x86_64")) == Finding("system", "ok", "Linux 6.8.0-45-generic on x86_64")
    write(machine, {"run/.containerenv": ""})
    assert only(checks.system.system(machine, "aarch64")).text.endswith("on aarch64, in a container (Podman)")
    assert only(checks.system.system(machine, "riscv64")).level == "error"


def test_a_system_without_a_version_is_told(tmp_path):
    assert "osrelease" in only(checks.system.system(tmp_path, "x86_64")).text
    with pytest.raises(ValueError, match="expected a version of Linux, got 'fast'"):
        checks.system.release(write(tmp_path, {"proc/sys/kernel/osrelease": "fast"}))


@pytest.mark.parametrize(
    ("running", "level"), [((3, 9), "error"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "error")]
)
def test_python_is_compared_with_what_the_package_supports(running, level):
    assert only(checks.system.python(running, "<3.14,>=3.10")).level == level


def test_python_here_is_supported_and_packages_have_versions():
    here = only(checks.system.python())
    assert here.level == "ok"
    assert all(name in here.text for name in ("numba", "llvmlite", "numpy"))


def test_bounds_of_python_that_cannot_be_understood_are_told():
    assert only(checks.system.python((3, 11), ">=3")).level == "warning"


def test_a_cold_and_a_warm_cache_of_kernels(tmp_path):
    place = Place(tmp_path / "kernels-now", lasting=True)
    cold = only(checks.cache.cache(place, cold=True))
    assert (cold.level, cold.cure) == ("warning", checks.cache.COMPILE)
    write(tmp_path, {"kernels-now/one.kernel": "x" * 199_999, "kernels-now/one.kernel.lock": ""})
    assert only(checks.cache.cache(place, cold=False)).text == f"warm: 1 kernels, 0.2 MB in {place.path}"
    write(tmp_path, {"kernels-before/one.kernel": "z" * 299_999})
    assert only(checks.cache.cache(place, cold=False)).text.endswith("beside it those of 1 other versions, 0.3 MB")


def test_it_compiles_what_is_missing_and_says_what_that_took(tmp_path):
    warm()
    shutil.copytree(jit.place().path, tmp_path / jit.place().path.name)
    (quick,) = tmp_path.rglob("mooncache.kernels.reclaim.leak.restart-*.kernel")
    quick.unlink()
    command = [sys.executable, "-m", "mooncache", "doctor", "--warm"]
    elsewhere = environment(MOONCACHE_CACHE_DIR=str(tmp_path))
    for compiled in (1, 0):
        done = subprocess.run([*command, "--json"], env=elsewhere, capture_output=True, text=True, check=False)
        report = json.loads(done.stdout)
        took = report["warm"]
        assert took["kernels"] == len(list(tmp_path.rglob("*.kernel"))) > 50
        assert took["compiled"] == compiled
        assert took["seconds"] >= 0
        assert (took["cpu_seconds"] > 0) == (compiled > 0)
        (cached,) = (finding for finding in report["findings"] if finding["check"] == "kernel cache")
        assert cached["level"] == "ok"
    shown = subprocess.run(command, env=elsewhere, capture_output=True, text=True, check=False).stdout
    assert shown.startswith(f"Compiled 0 of {took['kernels']} kernels in ")


def test_a_compiler_that_fails_is_told():
    with pytest.raises(WarmError, match="processes that compile kernels failed"):
        compile_by([sys.executable, "-c", "raise SystemExit('no luck')"])


def test_a_cache_elsewhere_than_asked_for_is_a_warning(tmp_path):
    for place in (Place(tmp_path, lasting=False), None):
        elsewhere = only(checks.cache.cache(place, cold=True))
        assert elsewhere.level == "warning"
        assert "MOONCACHE_CACHE_DIR" in elsewhere.cure


# ------------------------------------------------------------------ sockets
@pytest.mark.parametrize(
    ("limit", "tuned", "level", "mib"),
    [(212_992, 6 << 20, "ok", "6.0"), (212_992, 1 << 20, "warning", "1.0"), (4 << 20, 1 << 20, "ok", "8.0")],
)
def test_buffers_of_sockets_are_what_tuning_or_asking_gives(machine, limit, tuned, level, mib):
    for way in "rw":
        write(
            machine,
            {f"proc/sys/net/core/{way}mem_max": f"{limit}", f"proc/sys/net/ipv4/tcp_{way}mem": f"4096\t9\t{tuned}"},
        )
    write(machine, {"proc/sys/net/ipv4/tcp_moderate_rcvbuf": "1"})
    found = only(checks.sockets.sockets(machine))
    assert (found.level, found.text.split()[0]) == (level, mib)
    write(machine, {"proc/sys/net/ipv4/tcp_moderate_rcvbuf": "0"})
    assert (only(checks.sockets.sockets(machine)).level == "ok") == (limit > 1 << 20)


# ------------------------------------------------------------------ cores, nodes, clock
def test_enough_cores(machine):
    assert only(checks.cpu.cores(set(range(8)), machine)) == Finding("cores", "ok", "8 of 256 cores may be used")


def test_few_cores_of_many_can_be_mended_and_few_of_few_not(machine):
    few = only(checks.cpu.cores({4, 5}, machine))
    assert few.level == "warning"
    assert "taskset -c 0-255" in few.cure
    small = only(checks.cpu.cores({0, 1}, write(machine, {"sys/devices/system/cpu/online": "0-1"})))
    assert (small.level, small.cure) == ("warning", None)


@pytest.mark.parametrize("group", ["pod/box", "pod", ""])
def test_a_quota_on_any_control_group_above_counts(machine, group):
    write(machine, {"proc/self/cgroup": "0::/pod/box", f"sys/fs/cgroup/{group}/cpu.max": "250000 100000"})
    write(machine, {"sys/fs/cgroup/pod/box/memory.max": "max"})
    assert checks.cpu.quota(machine) == 2.5
    limited = only(checks.cpu.cores(set(range(8)), machine))
    assert limited.level == "warning"
    assert "2.5 cores' worth" in limited.text
    assert "--cpus" in limited.cure


def test_no_quota(machine):
    assert checks.cpu.quota(machine) == float("inf")
    assert checks.cpu.quota(write(machine, {"sys/fs/cgroup/cpu.max": "max 100000"})) == float("inf")


def test_frequency_governors(machine):
    assert only(checks.cpu.frequency({0, 1}, machine)).text.startswith("not governed here")
    place = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
    write(machine, {place.format(0): "performance", place.format(1): "powersave"})
    assert only(checks.cpu.frequency({0}, machine)).level == "ok"
    slow = only(checks.cpu.frequency({0, 1}, machine))
    assert (slow.level, slow.cure) == ("warning", "cpupower frequency-set -g performance")
    unreadable(machine / place.format(1))
    assert only(checks.cpu.frequency({0, 1}, machine)).text.startswith("cannot be told")


TWO_NODES = {
    "sys/devices/system/node/online": "0-1",
    "sys/devices/system/node/node0/cpulist": "0-3",
    "sys/devices/system/node/node1/cpulist": "4-7",
}


def test_one_node_or_none_is_fine(machine, tmp_path_factory):
    assert only(checks.numa.numa({0}, {"mlx5_0": 0}, {}, machine)).text == "one node: everything is near"
    assert only(checks.numa.numa({0}, {}, {}, tmp_path_factory.mktemp("empty"))).text == "this kernel knows no nodes"


def test_what_is_near_on_two_nodes_is_fine(machine):
    near = only(checks.numa.numa({0, 4}, {"mlx5_0": 0, "mlx5_1": -1}, {"GPU a": 0}, write(machine, TWO_NODES)))
    assert near.level == "ok"
    assert near.text == (
        "2 nodes; cores of nodes 0 and 1; mlx5_0 on node 0; mlx5_1 on an unknown node; GPU a on node 0"
    )


def test_a_nic_far_from_the_cores_and_a_gpu_far_from_every_nic(machine):
    told, nic_far, gpu_far = checks.numa.numa({0, 1}, {"mlx5_0": 1}, {"GPU a": 0}, write(machine, TWO_NODES))
    assert levels([told, nic_far, gpu_far]) == ["ok", "warning", "warning"]
    assert "numactl --cpunodebind=1" in nic_far.cure
    assert "GPU a is on node 0" in gpu_far.text
    assert levels(checks.numa.numa({0}, {}, {"GPU a": 1}, machine)) == ["ok"]  # nothing to be far from


@pytest.mark.parametrize(
    ("source", "cost", "level"),
    [("tsc", 80, "ok"), ("arch_sys_counter", 90, "ok"), ("hpet", 80, "warning"), ("acpi_pm", 900, "warning"),
     ("xen", 700, "warning")],
)  # fmt: skip
def test_the_clock_is_judged_by_its_source_and_by_its_cost(tmp_path, source, cost, level):
    place = "sys/devices/system/clocksource/clocksource0"
    write(tmp_path, {f"{place}/current_clocksource": source, f"{place}/available_clocksource": f"{source} acpi_pm"})
    found = only(checks.clock.clock(cost, tmp_path))
    assert found.level == level
    assert found.text.startswith(f"{source}; one read takes {cost} ns")
    assert found.cure is None or "dmesg" in found.cure


def test_a_slow_clock_beside_a_fast_one_is_cured_by_choosing_it(tmp_path):
    place = "sys/devices/system/clocksource/clocksource0"
    write(tmp_path, {f"{place}/current_clocksource": "hpet", f"{place}/available_clocksource": "tsc hpet acpi_pm"})
    assert only(checks.clock.clock(900, tmp_path)).cure.startswith("echo tsc > ")


def test_a_read_of_the_clock_takes_time():
    assert 0 < checks.clock.read_ns() < 1e6


# ------------------------------------------------------------------ limits and memory
def test_open_files():
    assert (
        levels(checks.files.descriptors(UNLIMITED, UNLIMITED)) == levels(checks.files.descriptors(4096, 4096)) == ["ok"]
    )
    few = only(checks.files.descriptors(1024, 1 << 20))
    assert few.level == "warning"
    assert "256 peers" in few.text
    assert few.cure.splitlines()[0] == "shell: ulimit -n 65536"
    assert "ulimit -Hn 65536" in only(checks.files.descriptors(1024, 2048)).cure


@pytest.mark.parametrize(("need", "level"), [("auto", "warning"), ("tcp", "warning"), ("rdma", "error")])
def test_a_limit_of_locked_memory_matters_most_to_rdma(machine, need, level):
    found = only(checks.memory.locked(need, 8 << 20, machine))
    assert found.level == level
    assert found.text.startswith("8 MiB: ")
    assert [line.partition(":")[0] for line in found.cure.splitlines()] == ["shell", "systemd", "docker"]


def test_locked_memory_without_a_limit_that_could_be_met(machine):
    assert only(checks.memory.locked("rdma", UNLIMITED, machine)).text == "unlimited"
    assert only(checks.memory.locked("rdma", 1 << 40, machine)).level == "ok"  # more than there is


def test_a_capability_lifts_the_limit_except_in_a_user_namespace(machine):
    write(machine, {"proc/self/status": "CapEff:\t0000000000004000", "proc/self/uid_map": "0 0 4294967295"})
    assert only(checks.memory.locked("rdma", 8 << 20, machine)).text == "8 MiB, which CAP_IPC_LOCK lifts"
    write(machine, {"proc/self/uid_map": "0 1000 1"})
    assert only(checks.memory.locked("rdma", 8 << 20, machine)).level == "error"


def test_memory_that_is_not_told_is_a_finding(machine):
    write(machine, {"proc/meminfo": "nothing"})
    assert "expected MemTotal" in only(checks.memory.locked("rdma", 8 << 20, machine)).text


def test_huge_pages(machine):
    assert only(checks.memory.huge(machine)) == Finding(
        "huge pages", "ok",
        "1,000 of 1,024 pages of 2 MiB are free; transparent ones: madvise, in shared memory: advise",
    )  # fmt: skip
    write(machine, {"sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "0"})
    assert only(checks.memory.huge(machine)).cure == "sysctl -w vm.nr_hugepages=4096"
    write(machine, {"sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "some"})
    assert "expected a number, got 'some'" in only(checks.memory.huge(machine)).text
    shutil.rmtree(machine / "sys/kernel/mm")
    assert only(checks.memory.huge(machine)).text.startswith("this kernel has none of 2 MiB; transparent ones: unknown")


@pytest.mark.parametrize(("need", "level"), [("auto", "error"), ("shm", "error"), ("tcp", "warning")])
def test_memory_that_cannot_be_shared(monkeypatch, need, level):
    assert only(checks.memory.shareable(need)).level == "ok"

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    found = only(checks.memory.shareable(need))
    assert found.level == level
    assert "Operation not permitted" in found.text


def test_another_process_is_really_asked_to_read_memory():
    assert checks.processes.refusal() in (0, errno.EPERM, errno.ENOSYS)


def test_an_asker_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(checks.processes, "PROBE", "raise SystemExit('no')")
    assert only(checks.processes.process_memory()).text == "cannot be told: the process that tried it ended with 1: no"


def test_an_asker_that_hangs_is_ended_and_told(monkeypatch):
    monkeypatch.setattr(checks.processes, "PROBE", "import signal; signal.pause()")
    monkeypatch.setattr(checks.processes, "PROBE_S", 0.01)
    assert only(checks.processes.process_memory()).text.endswith("did not end within 0.01 s")


def test_process_memory(tmp_path):
    scope = "proc/sys/kernel/yama/ptrace_scope"
    refused = partial(checks.processes.process_memory, root=tmp_path)
    assert only(refused(0)).level == "ok"
    assert "seccomp" in only(refused(errno.ENOSYS)).cure
    assert only(refused(errno.EPERM)).cure == "docker: docker run --cap-add SYS_PTRACE ..."
    write(tmp_path, {scope: "1"})
    limited = only(refused(errno.EPERM))
    assert limited.level == "warning"
    assert "Yama allows it to its descendants only" in limited.text
    assert limited.cure.startswith("sysctl -w kernel.yama.ptrace_scope=0\n")
    write(tmp_path, {scope: "3"})
    assert "reboot" in only(refused(errno.EPERM)).cure
