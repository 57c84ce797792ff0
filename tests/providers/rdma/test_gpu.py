from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mooncache import cuda
from mooncache.errors import TransportError
from mooncache.providers.rdma import gpu


@pytest.fixture(autouse=True)
def _without_cuda() -> None:
    if cuda.library() is not None:
        pytest.skip("this process has loaded libcuda")


def test_without_cuda_all_memory_is_the_hosts() -> None:
    assert cuda.memory_kind(np.zeros(8).ctypes.data) == "host"
    assert cuda.memory_kind(0x7F00_0000_0000) == "host"


def test_memory_of_the_host_has_no_way_to_a_gpu() -> None:
    with pytest.raises(TransportError, match=r"expected memory in a GPU, got host memory \(64 bytes at 0x1000\)"):
        gpu.choose(0x1000, 64)


def test_without_cuda_there_is_no_dmabuf() -> None:
    with pytest.raises(TransportError, match=r"CUDA 11\.7"):
        gpu.dmabuf_fd(0x1000, 64)


@pytest.mark.parametrize(("module", "loaded"), [("nvidia_peermem", True), ("nv_peer_mem", True), ("nvidia_uvm", False)])
def test_peer_memory_is_a_module_of_the_kernel(tmp_path: Path, module: str, loaded: bool) -> None:
    (tmp_path / module).mkdir()
    assert gpu.peer_memory(str(tmp_path)) is loaded
