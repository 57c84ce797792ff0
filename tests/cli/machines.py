"""Made-up machines for checks of `mooncache doctor`: the files that a check reads, below a folder."""

import resource

from mooncache.providers.rdma.library import Installed

UNLIMITED = resource.RLIM_INFINITY
LOADS = Installed("44.0-2", "44.0", None, None)
LACKS = Installed(None, "44.0", "it is not installed", "apt-get install python3-pyverbs")
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.28.03  Release Build"
CLOSED_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03"


def write(root, texts):
    """Files of a made-up system below `root`, by path; returns `root`."""
    for name, text in texts.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def only(findings):
    """The one finding there is."""
    (finding,) = findings
    return finding


def levels(findings):
    return [finding.level for finding in findings]


def unreadable(path):
    """Something that cannot be read in the place of a file, also by root."""
    path.unlink()
    path.mkdir()


# ------------------------------------------------------------------ made-up systems
V4, V6, LOCAL = "0000:0000:0000:0000:0000:ffff:0a00:0001", "2001:0db8::1", "fe80:0000:0000:0000:0000:0000:0000:0001"
V2, V1 = "RoCE v2", "IB/RoCE v1"


def nic(device="mlx5_0", number=1, *, state="4: ACTIVE", layer="Ethernet", gids=((V4, V2),), netdev="eth0", **others):
    """Files of one RDMA port."""
    base, port = f"sys/class/infiniband/{device}", f"sys/class/infiniband/{device}/ports/{number}"
    roce = layer == "Ethernet"
    texts = {
        f"{base}/node_type": others.get("kind", "1: CA"),
        f"{base}/fw_ver": "20.31.1014",
        f"{base}/device/numa_node": others.get("node", 0),
        f"{port}/state": state,
        f"{port}/phys_state": "5: LinkUp" if "ACTIVE" in state else "3: Disabled",
        f"{port}/link_layer": layer,
        f"{port}/rate": "100 Gb/sec (4X EDR)",
        f"sys/class/infiniband_verbs/uverbs_{device}/ibdev": device,
        f"dev/infiniband/uverbs_{device}": "",
    }
    for index, (gid, kind) in enumerate(gids):
        texts |= {f"{port}/gids/{index}": gid, f"{port}/gid_attrs/types/{index}": kind}
        texts |= {f"{port}/gid_attrs/ndevs/{index}": netdev} if roce else {}
    return texts | ({f"sys/class/net/{netdev}/mtu": others.get("mtu", 9000)} if roce else {})


HEALTHY = {
    "proc/sys/kernel/osrelease": "6.8.0-45-generic",
    "proc/self/status": "Name:\tcat\nCapEff:\t0000000000000000",
    "proc/meminfo": "MemTotal:       65536000 kB\nMemFree:  1 kB",
    "sys/devices/system/cpu/online": "0-255",
    "sys/devices/system/node/online": "0",
    "sys/devices/system/node/node0/cpulist": "0-255",
    "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc",
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "1024",
    "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "1000",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
    "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never deny force",
}


def pci(address, vendor, kind, node=0):
    """Files of one PCI device."""
    base = f"sys/bus/pci/devices/{address}"
    return {f"{base}/vendor": vendor, f"{base}/class": kind, f"{base}/numa_node": node}
