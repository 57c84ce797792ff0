"""Memory of NVIDIA GPUs: how an RDMA device may reach it.

    dma-buf      the GPU's driver hands the memory out as a file, which the NIC's driver takes
    peer memory  NVIDIA's module nvidia_peermem makes an ordinary registration find it

Whoever has a GPU write to registered memory waits for that (its stream or event) before the transfer is submitted.
Source: NVIDIA, GPUDirect RDMA, and the CUDA Driver API, both 12.4.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import NamedTuple

from mooncache.cuda import POINTER_DEVICE_ORDINAL, SUCCESS, library, memory_kind, pointer
from mooncache.errors import TransportError

PEER_MODULES = ("nvidia_peermem", "nv_peer_mem")

DEVICE_DMA_BUF_SUPPORTED = 124  # CUdevice_attribute
RANGE_DMA_BUF_FD = 1  # CUmemRangeHandleType


class DmaBuf(NamedTuple):
    """A dma-buf that contains a range of a GPU's memory.

    Attributes:
        fd: its descriptor; whoever asked for it closes it, once the range is registered.
        offset: bytes into it where the range begins.
    """

    fd: int
    offset: int


def choose(address: int, length: int) -> str:
    """Choose how an RDMA device reaches `length` bytes of a GPU's memory: by "dma-buf" or by "peer memory".

    Raises:
        TransportError: it is not a GPU's own memory, or neither way is open on this system; says what is missing.
    """
    kind = memory_kind(address)
    if kind != "gpu":
        raise TransportError(
            f"expected memory in a GPU, got {kind} memory ({length} bytes at {address:#x})"
            + ("; allocate it with cudaMalloc instead of cudaMallocManaged" if kind == "managed" else "")
        )
    if _exports(address):
        return "dma-buf"
    if peer_memory():
        return "peer memory"
    raise TransportError(
        f"RDMA cannot reach the GPU's {length} bytes at {address:#x}: its driver does not export dma-bufs (that takes "
        "CUDA 11.7, NVIDIA's open kernel modules and Linux 5.12), and nvidia_peermem is not loaded. Provide either "
        "(modprobe nvidia_peermem)"
    )


def dmabuf_fd(address: int, length: int) -> DmaBuf:
    """Export the pages around `length` bytes of a GPU's memory as a dma-buf.

    Raises:
        TransportError: the driver refused; a thread that calls this must have a CUDA context of that GPU.
    """
    cuda = library()
    offset = address % mmap.PAGESIZE  # the driver takes whole pages of the host only
    pages = -(-(offset + length) // mmap.PAGESIZE) * mmap.PAGESIZE
    fd = ctypes.c_int(-1)
    if cuda is None or not hasattr(cuda, "cuMemGetHandleForAddressRange"):
        raise TransportError("expected CUDA 11.7 or newer, loaded by this process, to export a dma-buf")
    start, size, flags = ctypes.c_uint64(address - offset), ctypes.c_size_t(pages), ctypes.c_ulonglong(0)
    code = cuda.cuMemGetHandleForAddressRange(ctypes.byref(fd), start, size, RANGE_DMA_BUF_FD, flags)
    if code != SUCCESS:
        raise TransportError(
            f"CUDA could not export {length} bytes at {address:#x} as a dma-buf: error {code}. Is the range within one "
            "allocation, and its GPU in use by this thread? If it still refuses: modprobe nvidia_peermem"
        )
    return DmaBuf(fd.value, offset)


def peer_memory(root: str = "/sys/module") -> bool:
    """Return whether the module is loaded by which ordinary registrations find a GPU's memory."""
    return any((Path(root) / module).is_dir() for module in PEER_MODULES)


def _exports(address: int) -> bool:
    cuda, device, able = library(), ctypes.c_int(), ctypes.c_int()
    return (
        cuda is not None
        and cuda.cuDeviceGet(ctypes.byref(device), pointer(address, POINTER_DEVICE_ORDINAL)) == SUCCESS
        and cuda.cuDeviceGetAttribute(ctypes.byref(able), DEVICE_DMA_BUF_SUPPORTED, device) == SUCCESS
        and bool(able.value)
    )
