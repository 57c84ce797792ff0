from __future__ import annotations

import errno
import resource

import pytest

from mooncache.providers.rdma.failure import memlock, refused


def test_a_refusal_names_device_operation_reason_and_cure() -> None:
    error = refused("mlx5_0", "be opened", errno.EACCES)
    assert str(error).startswith(
        "RDMA device mlx5_0 could not be opened: Permission denied (errno 13); this user needs"
    )


def test_what_has_no_errno_is_told_in_pyverbs_words() -> None:
    assert str(refused("mlx5_0", "be opened", -1, said="Failed to find device")) == (
        "RDMA device mlx5_0 could not be opened: Failed to find device"
    )


def test_the_operations_own_cure_comes_first() -> None:
    assert str(refused("mlx5_0", "connect", errno.ENODEV, {errno.ENODEV: "do this"})).endswith("; do this")


@pytest.mark.parametrize(
    ("limit", "cure"),
    [
        (
            65536,
            r"may lock 64 KiB of memory \(ulimit -l\)\. Raise that: .*limits\.conf, LimitMEMLOCK=infinity .*docker",
        ),
        (resource.RLIM_INFINITY, "is not limited"),
    ],
)
def test_no_memory_is_explained_by_the_limit_of_locked_memory(
    monkeypatch: pytest.MonkeyPatch, limit: int, cure: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    with pytest.raises(type(refused("mlx5_0", "register", errno.ENOMEM)), match=cure):
        raise refused("mlx5_0", "register", errno.ENOMEM)
    assert memlock() in str(refused("mlx5_0", "register", errno.ENOMEM))
