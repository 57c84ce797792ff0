"""CUDA's driver is asked for the kind of an address only where this process has loaded it: else nothing is a GPU's.

Source: NVIDIA, CUDA Driver API 12.4.
"""

from __future__ import annotations

import ctypes
import os

LIBCUDA = "libcuda.so.1"

SUCCESS = 0
POINTER_MEMORY_TYPE, POINTER_IS_MANAGED, POINTER_DEVICE_ORDINAL = 2, 8, 9  # CUpointer_attribute
MEMORY_DEVICE = 2  # CUmemorytype


def memory_kind(address: int) -> str:
    """Return the kind of memory an address is in: "host", "gpu", or "managed" (which moves between both)."""
    if pointer(address, POINTER_IS_MANAGED):
        return "managed"
    return "gpu" if pointer(address, POINTER_MEMORY_TYPE) == MEMORY_DEVICE else "host"


def device_of(address: int) -> str:
    """Return the GPU whose memory an address is in, as torch names it ("cuda:0"); empty where the host can reach it."""
    return f"cuda:{pointer(address, POINTER_DEVICE_ORDINAL)}" if memory_kind(address) == "gpu" else ""


def pointer(address: int, attribute: int) -> int:
    """Read an attribute of the memory at an address; 0 where CUDA does not know the address."""
    cuda, value = library(), ctypes.c_uint()
    if cuda and cuda.cuPointerGetAttribute(ctypes.byref(value), attribute, ctypes.c_uint64(address)) == SUCCESS:
        return value.value
    return 0


def library() -> ctypes.CDLL | None:
    """Return the driver's library, if this process has it."""
    try:
        return ctypes.CDLL(LIBCUDA, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
