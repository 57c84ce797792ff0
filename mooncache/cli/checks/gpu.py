"""GPUs, and whether an RDMA device may reach their memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mooncache.cli.checks.base import ROOT, Finding, check, number, read_if_there
from mooncache.cli.checks.system import release

VENDORS = {0x10DE: "NVIDIA", 0x1002: "AMD"}
CLASSES = (0x0300, 0x0302, 0x0380, 0x1200)  # VGA, 3D, other display, processing accelerator (Instinct since MI300)
DMA_BUF = (5, 12)  # the first Linux whose RDMA core registers dma-bufs
PEER_MODULES = ("nvidia_peermem", "nv_peer_mem")


@dataclass(frozen=True)
class Gpu:
    """One GPU as PCI shows it."""

    address: str  # such as 0000:17:00.0
    vendor: str
    node: int  # NUMA, -1 unknown

    @property
    def name(self) -> str:
        """The name that findings have for it."""
        return f"GPU {self.address}"


def gpus(root: Path = ROOT) -> list[Gpu]:
    """Return the GPUs of this machine, by address. Raises OSError or ValueError for what cannot be read."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = VENDORS.get(number(device / "vendor", 16))
        if vendor and number(device / "class", 16) >> 8 in CLASSES:
            node = read_if_there(device / "numa_node")  # absent where the kernel knows no nodes
            found.append(Gpu(device.name, vendor, int(node or -1)))
    return found


@check("gpu")
def peer_memory(devices: list[Gpu], root: Path = ROOT) -> Iterator[Finding]:
    """Check whether an RDMA device may reach GPU memory directly: by a peer memory module, or dma-buf."""
    if not devices:
        yield Finding("gpu", "ok", "none")
    for vendor in sorted({device.vendor for device in devices}):
        count = sum(device.vendor == vendor for device in devices)
        yield (nvidia if vendor == "NVIDIA" else amd)(f"{count} by {vendor}", release(root), root)


def nvidia(what: str, linux: tuple[int, int], root: Path) -> Finding:
    """Check NVIDIA's ways: nvidia-peermem, or dma-buf by the open kernel modules."""
    driver = read_if_there(root / "proc/driver/nvidia/version")
    if driver is None:
        return Finding("gpu", "warning", f"{what}, without a driver (no /proc/driver/nvidia)", "modprobe nvidia")
    modules = [module for module in PEER_MODULES if (root / "sys/module" / module).is_dir()]
    opened = "Open Kernel Module" in driver
    if opened and linux >= DMA_BUF:
        return Finding("gpu", "ok", f"{what}; RDMA devices reach their memory by dma-buf")
    if modules:
        return Finding("gpu", "ok", f"{what}; RDMA devices reach their memory by {modules[0]}")
    lacking = "the open kernel modules" if linux >= DMA_BUF else f"Linux {DMA_BUF[0]}.{DMA_BUF[1]}"
    text = f"{what}; RDMA devices cannot reach their memory: dma-buf needs {lacking}, and nvidia_peermem is not loaded"
    return Finding("gpu", "warning", text, "modprobe nvidia-peermem")


def amd(what: str, linux: tuple[int, int], root: Path) -> Finding:
    """Check AMD's way: dma-buf by amdgpu."""
    if not (root / "sys/module/amdgpu").is_dir():
        return Finding("gpu", "warning", f"{what}, without a driver (amdgpu is not loaded)", "modprobe amdgpu")
    if linux >= DMA_BUF:
        return Finding("gpu", "ok", f"{what}; RDMA devices reach their memory by dma-buf")
    text = f"{what}; RDMA devices cannot reach their memory: dma-buf needs Linux {DMA_BUF[0]}.{DMA_BUF[1]}"
    return Finding("gpu", "warning", text)
